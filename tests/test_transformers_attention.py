"""attn_implementation="tilecut": outputs and gradients of Hugging Face models are `eager`'s, and masks are not tensors."""

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    DataCollatorWithFlattening,
    DynamicCache,
    Gemma2Config,
    GPT2Config,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    StaticCache,
    T5Config,
)

import tilecut
import tilecut.transformers_attention as under_test
from tilecut.transformers_attention import Segments, Visibility, attend, make_mask
from tilecut_passes.capture import capture
from tilecut_passes.graph import arguments, value_of
from tilecut_runtime.errors import ConfigError, InputError

tilecut.register_attention()

SIZES = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
GROUPED = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CONFIGS = {
    "bert": lambda: BertConfig(**SIZES, **QUIET, max_position_embeddings=64),
    "gpt2": lambda: GPT2Config(
        vocab_size=60,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=1,
    ),
    "llama": lambda: LlamaConfig(**GROUPED),
    # Shorter than the text.
    "mistral": lambda: MistralConfig(**GROUPED, sliding_window=4),
    "gemma2": lambda: Gemma2Config(**GROUPED, head_dim=8, sliding_window=4, attn_logit_softcapping=1.5),
    "modernbert": lambda: ModernBertConfig(
        **SIZES,
        local_attention=6,
        global_attn_every_n_layers=2,
        max_position_embeddings=64,
        pad_token_id=0,
        cls_token_id=1,
    ),
    "llama4": lambda: Llama4TextConfig(
        **GROUPED,
        head_dim=8,
        attention_chunk_size=4,
        intermediate_size_mlp=40,
        num_local_experts=2,
        no_rope_layers=[1, 0],
    ),
}
CAUSAL = ("gpt2", "llama", "mistral", "gemma2")
SEQUENCE = 11


def pair(name):
    """The same random model with both implementations, in float64."""
    config = CONFIGS[name]()
    eager = transformers.AutoModel.from_config(config, attn_implementation="eager").double().train()
    with torch.no_grad():
        for parameter in eager.parameters():
            parameter.normal_(std=0.3)
    ours = copy.deepcopy(eager)
    ours.set_attn_implementation("tilecut")
    assert ours.config._attn_implementation == "tilecut"
    return eager, ours


def gradients(model, weight, **inputs):
    """Output, and the gradients of all parameters of a loss on the weighted rows."""
    model.zero_grad()
    out = model(**inputs).last_hidden_state
    (out * weight).sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(eager, ours, rows, **inputs):
    weight = torch.randn(*rows.shape, 32, dtype=torch.float64) * rows[..., None]
    want, expected = gradients(eager, weight, **inputs)
    got, found = gradients(ours, weight, **inputs)
    assert torch.allclose(got[rows], want[rows], atol=1e-10)
    assert found.keys() == expected.keys() and len(found) > 10
    for name, grad in found.items():
        assert torch.allclose(grad, expected[name], atol=1e-9), name


@pytest.fixture(autouse=True)
def _wide_softmax(monkeypatch):
    """`eager` rounds its weights to float32 on the way; without that the two agree to the last digits."""
    softmax = nn.functional.softmax
    monkeypatch.setattr(nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim))


@pytest.fixture
def seen():
    """The masks that reach the layers."""
    masks = []

    def spy(module, query, key, value, attention_mask, **kwargs):
        masks.append(attention_mask)
        return attend(module, query, key, value, attention_mask, **kwargs)

    transformers.AttentionInterface.register("tilecut", spy)
    yield masks
    transformers.AttentionInterface.register("tilecut", attend)


def padding(side):
    """Rows of 11, 7 and 1 tokens."""
    keep = torch.arange(SEQUENCE) < torch.tensor([[11], [7], [1]])
    return keep.flip(1) if side == "left" else keep


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["bert", "modernbert", *CAUSAL])
def test_padded_batches_are_eagers(name, side, seen):
    eager, ours = pair(name)
    keep = padding(side)
    inputs = {"input_ids": torch.randint(2, 60, keep.shape), "attention_mask": keep.long()}
    if name in CAUSAL:
        inputs |= {"position_ids": (keep.cumsum(-1) - 1).clamp_min(0), "use_cache": False}
    assert_same(eager, ours, keep, **inputs)
    assert len(seen) == 2
    assert all(isinstance(m, Visibility) and m.segments is None and torch.equal(m.key_padding, keep) for m in seen)
    windows = {"mistral": [(3, -1)] * 2, "gemma2": [(3, -1), (-1, -1)], "modernbert": [(-1, -1), (3, 3)]}
    assert [m.window for m in seen] == windows.get(name, [(-1, -1)] * 2)
    assert {m.causal for m in seen} == {"top_left" if name in CAUSAL else "none"}


@pytest.mark.parametrize("name", ["bert", "modernbert", *CAUSAL, "llama4"])
def test_without_a_mask(name, seen):
    eager, ours = pair(name)
    ids = torch.randint(2, 60, (2, SEQUENCE))
    assert_same(eager, ours, torch.ones_like(ids, dtype=torch.bool), input_ids=ids)
    assert len(seen) == 2
    if name == "llama4":
        # Chunks have no equal; the other layer is causal.
        assert [type(m) for m in seen] == [torch.Tensor, Visibility]
    elif name == "bert":
        assert seen == [None, None]
    else:
        assert all(m is None or (isinstance(m, Visibility) and m.key_padding is None) for m in seen)


PACKED = [[5, 1, 5], [2, 6, 3]]


@pytest.mark.parametrize("name", CAUSAL)
def test_packed_position_ids_are_eagers_without_a_mask(name, seen):
    eager, ours = pair(name)
    places = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in PACKED])
    ids = torch.randint(2, 60, places.shape)
    rows = torch.ones_like(places, dtype=torch.bool)
    assert_same(eager, ours, rows, input_ids=ids, position_ids=places, use_cache=False)
    assert [m.segments.cu_seqlens_q.tolist() for m in seen] == [[0, 5, 6, 11, 13, 19, 22]] * 2
    assert [m.segments.max_k for m in seen] == [6, 6]
    # The same as every sequence on its own.
    with torch.no_grad():
        packed = ours(input_ids=ids, position_ids=places, use_cache=False).last_hidden_state
        alone = ours(input_ids=ids[1:, 2:8], use_cache=False).last_hidden_state
    assert torch.allclose(packed[1, 2:8], alone[0], atol=1e-10)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_flattening_collator_brings_the_bounds(name):
    eager, ours = pair(name)
    texts = [{"input_ids": list(range(2, 2 + n)), "labels": list(range(2, 2 + n))} for n in (5, 1, 7)]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(texts)
    batch.pop("labels")
    with torch.no_grad():
        got = ours(**batch, use_cache=False).last_hidden_state[0]
        compiled = torch.compile(ours, backend="eager", fullgraph=True)(**batch, use_cache=False).last_hidden_state[0]
        want = [eager(input_ids=torch.tensor([t["input_ids"]])).last_hidden_state[0] for t in texts]
    assert torch.allclose(got, torch.cat(want), atol=1e-10)
    assert torch.allclose(compiled, got, atol=1e-10)


def test_a_bidirectional_model_takes_bounds():
    _, ours = pair("bert")
    query = torch.randn(1, 4, 6, 8, dtype=torch.float64)
    bounds = torch.tensor([0, 2, 6])
    lengths = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 4, "max_length_k": 4}
    layer = ours.encoder.layer[0].attention.self
    got, _ = attend(layer, query, query, query, None, **lengths)
    want = torch.cat(
        [nn.functional.scaled_dot_product_attention(*[query[:, :, s]] * 3) for s in (slice(2), slice(2, 6))], 2
    )
    assert not layer.is_causal and torch.allclose(got, want.transpose(1, 2))
    narrow, _ = attend(layer, query, query, query, None, sliding_window=1, **lengths)
    assert torch.allclose(narrow, query.transpose(1, 2))


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("cached", [DynamicCache, StaticCache])
def test_generation_with_a_cache(name, cached, seen):
    eager, ours = pair(name)
    ids, keep = torch.randint(2, 60, (2, 9)), padding("left")[:2, -9:].long()
    outs = []
    for model in (eager.eval(), ours.eval()):
        more = {"max_cache_len": 16} if cached is StaticCache else {}
        cache = cached(config=model.config, **more)
        places = (keep.cumsum(-1) - 1).clamp_min(0)
        with torch.no_grad():
            for part in (slice(0, 6), slice(6, 7), slice(7, 9)):
                out = model(
                    input_ids=ids[:, part],
                    attention_mask=keep[:, : part.stop],
                    position_ids=places[:, part],
                    past_key_values=cache,
                ).last_hidden_state
        outs.append(out)
    assert torch.allclose(outs[0], outs[1], atol=1e-10)
    kinds = [type(m) for m in seen]
    if cached is DynamicCache:
        assert kinds == [Visibility] * 6
        assert [m.causal for m in seen[2:]] == ["bottom_right"] * 4 if name not in ("mistral", "gemma2") else True
    else:
        assert torch.Tensor in kinds


def test_generated_text_is_eagers():
    for name in ("gpt2", "gemma2"):
        config = CONFIGS[name]()
        eager = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
        ours = copy.deepcopy(eager)
        ours.set_attn_implementation("tilecut")
        ids = torch.randint(2, 60, (2, 6))
        given = {
            "attention_mask": padding("left")[:2, -6:].long(),
            "max_new_tokens": 6,
            "do_sample": False,
            "pad_token_id": 0,
        }
        assert torch.equal(ours.generate(ids, **given), eager.generate(ids, **given))


def test_position_bias_and_encoder_decoder():
    config = T5Config(vocab_size=60, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4, dropout_rate=0.0)
    eager = transformers.T5Model(config).double()
    eager.set_attn_implementation("eager")
    ours = copy.deepcopy(eager)
    ours.set_attn_implementation("tilecut")
    keep = padding("right")
    inputs = {
        "input_ids": torch.randint(2, 60, keep.shape),
        "attention_mask": keep.long(),
        "decoder_input_ids": torch.randint(2, 60, (3, 5)),
    }
    assert_same(eager, ours, torch.ones(3, 5, dtype=torch.bool), **inputs)


@pytest.mark.parametrize("kind", ["additive", "bool"])
def test_masks_of_the_caller(kind):
    eager, ours = pair("llama")
    ids = torch.randint(2, 60, (2, SEQUENCE))
    visible = (torch.rand(2, 1, SEQUENCE, SEQUENCE) > 0.4) | torch.eye(SEQUENCE, dtype=torch.bool)
    additive = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, torch.finfo(torch.float64).min)
    with torch.no_grad():
        want = eager(input_ids=ids, attention_mask=additive).last_hidden_state
        got = ours(input_ids=ids, attention_mask=additive if kind == "additive" else visible).last_hidden_state
    assert torch.allclose(got, want, atol=1e-10)


@pytest.mark.parametrize("name", ["bert", *CAUSAL])
def test_a_training_step_with_dropout(name):
    config = CONFIGS[name]()
    for key in ("attention_probs_dropout_prob", "attn_pdrop", "attention_dropout"):
        if hasattr(config, key):
            setattr(config, key, 0.5)
    kind = transformers.AutoModelForMaskedLM if name == "bert" else transformers.AutoModelForCausalLM
    model = kind.from_config(config, attn_implementation="tilecut").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    keep = padding("right")
    ids = torch.randint(2, 60, keep.shape)
    batch = {"input_ids": ids, "attention_mask": keep.long(), "labels": ids.masked_fill(~keep, -100)}
    with torch.no_grad():
        assert not torch.equal(model(**batch).logits, model(**batch).logits)
        assert torch.equal(*(model.eval()(**batch).logits for _ in range(2)))
    losses = []
    for _ in range(12):
        loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("name", ["gpt2", "mistral"])
def test_checkpointed_layers_draw_the_same_dropout_again(name, seen):
    config = CONFIGS[name]()
    setattr(config, "attn_pdrop" if name == "gpt2" else "attention_dropout", 0.5)
    model = transformers.AutoModel.from_config(config, attn_implementation="tilecut").double().train()
    keep = padding("right")
    inputs = {"input_ids": torch.randint(2, 60, keep.shape), "attention_mask": keep.long(), "use_cache": False}
    weight = torch.randn(*keep.shape, 32, dtype=torch.float64) * keep[..., None]
    torch.manual_seed(5)
    want, expected = gradients(model, weight, **inputs)
    expected = {name: grad.clone() for name, grad in expected.items()}
    assert len(seen) == 2
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(5)
    got, found = gradients(model, weight, **inputs)
    assert torch.equal(got, want) and len(seen) == 6
    assert all(torch.allclose(found[name], expected[name], atol=1e-12) for name in expected)


def test_training_under_autocast():
    _, ours = pair("llama")
    ours = ours.float()
    ids = torch.randint(2, 60, (2, SEQUENCE))
    exact = ours(input_ids=ids).last_hidden_state
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(input_ids=ids).last_hidden_state
    out.float().sum().backward()
    assert 0 < (out - exact).norm() / exact.norm() < 0.05
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in ours.parameters())


def test_compiled_training_is_one_node_a_layer():
    _, ours = pair("llama")
    keep = padding("right")
    inputs = {"input_ids": torch.randint(2, 60, keep.shape), "attention_mask": keep.long(), "use_cache": False}
    found = []

    def backend(graph, _):
        found.extend(str(n.target) for n in graph.graph.nodes if "tilecut" in str(n.target))
        return graph

    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    got, want = compiled(**inputs).last_hidden_state, ours(**inputs).last_hidden_state
    assert found == ["tilecut.attention"] * 2
    assert torch.allclose(got, want, atol=1e-10)


def test_what_no_mask_means():
    layer = nn.Module()
    layer.is_causal = True
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8)
    sdpa = nn.functional.scaled_dot_product_attention
    assert torch.allclose(attend(layer, q, k, k, None)[0].transpose(1, 2), sdpa(q, k, k, is_causal=True), atol=1e-6)
    for got in (attend(layer, q, k, k, None, is_causal=False), attend(layer, q[:, :, :1], k, k, None)):
        assert torch.allclose(got[0].transpose(1, 2), sdpa(q[:, :, : got[0].shape[1]], k, k), atol=1e-6)
    scaled = attend(layer, q, k, k, None, is_causal=False, scaling=0.1)[0].transpose(1, 2)
    assert torch.allclose(scaled, sdpa(q, k, k, scale=0.1), atol=1e-6)


def test_a_mask_beyond_the_padding_hides():
    keep = torch.tensor([[True, False, True]])
    made = make_mask(1, 1, 4, 4, 1, attention_mask=keep)
    assert isinstance(made, Visibility)
    assert (made.causal, made.key_padding.tolist()) == ("bottom_right", [[False, True, False, False]])
    # Query 3, keys 0 to 5: the diagonal is at neither corner.
    assert isinstance(make_mask(1, 1, 6, 3, 0, device="cpu"), torch.Tensor)


BOUNDS = torch.tensor([0, 3], dtype=torch.int32)


@pytest.mark.parametrize(
    ("mask", "given", "message"),
    [
        (None, {"output_attentions": True}, 'output_attentions=True; load the model with attn_implementation="eager"'),
        (None, {"s_aux": torch.zeros(2)}, "the model passes s_aux, which tilecut::attention has no equal of"),
        (Visibility("top_left", (-1, -1), None, 4), {}, "the mask is not of these keys; got 4; wanted 3"),
        (torch.ones(1, 3), {}, r"the mask has the wrong rank; got \[1, 3\]; wanted \[B, H|1, Sq, Sk\]"),
        (
            Visibility("top_left", (-1, -1), None, 3, Segments(BOUNDS, BOUNDS, 3, 3)),
            {"position_bias": torch.zeros(1, 2, 3, 3)},
            "packed sequences take no position_bias",
        ),
        (
            Visibility("top_left", (-1, -1), torch.ones(1, 3, dtype=torch.bool), 3),
            {"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS, "max_length_q": 3, "max_length_k": 3},
            "packed sequences have no padding; got attention_mask and cu_seq_lens_q",
        ),
    ],
)
def test_what_has_no_equal_is_refused(mask, given, message):
    x = torch.randn(1, 2, 3, 8)
    with pytest.raises(InputError, match=message):
        attend(nn.Module(), x, x, x, mask, **given)


def test_a_packed_mask_that_is_made_otherwise_stays_a_tensor(monkeypatch, seen):
    """What is not recognised is not guessed: the names of transformers' functions are all that is known of them."""
    monkeypatch.setattr(under_test, "_closure", lambda function, maker, name, otherwise=None: otherwise)
    eager, ours = pair("llama")
    places = torch.tensor([[0, 1, 2, 0, 1]])
    ids = torch.randint(2, 60, places.shape)
    assert_same(eager, ours, places >= 0, input_ids=ids, position_ids=places, use_cache=False)
    assert all(isinstance(m, torch.Tensor) for m in seen)


def test_an_old_transformers_is_refused(monkeypatch):
    monkeypatch.setattr(under_test, "eager_mask", lambda batch_size, cache_position, kv_length: None)
    with pytest.raises(ConfigError, match="transformers is too old: it makes masks from cache_position; got 5"):
        tilecut.register_attention()


@pytest.mark.parametrize("name", ["bert", "mistral"])
def test_a_captured_model_holds_the_op_and_no_mask(name):
    _, ours = pair(name)
    ours = ours.float().eval()
    graph = capture(ours)
    nodes = [n for n in graph.nodes if n.target is torch.ops.tilecut.attention.default]
    rules = {"bert": ("none", [-1, -1]), "mistral": ("top_left", [3, -1])}
    assert [(n.kwargs["causal"], list(n.kwargs["window"])) for n in nodes] == [rules[name]] * 2
    # The bool copy of the mask itself: nothing in the graph is as long as the text in two dimensions.
    assert all(value_of(arguments(n)["key_padding"]).ndim == 2 for n in nodes)
    values = [x for n in graph.nodes if isinstance(x := value_of(n), torch.Tensor)]
    assert not any(sum(not isinstance(size, int) for size in x.shape) > 2 for x in values)
    keep = padding("right")
    given = {name: keep.long() for name in graph.inputs}
    want = ours(**given, **({} if name == "bert" else {"use_cache": False})).last_hidden_state
    assert torch.allclose(graph.run(given)["last_hidden_state"][keep], want[keep], atol=1e-5)


def test_bert_is_registered_once_more():
    tilecut.register_attention()
    model = BertModel._from_config(CONFIGS["bert"](), attn_implementation="tilecut")
    assert model.config._attn_implementation == "tilecut"
