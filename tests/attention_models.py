"""Attention in every spelling: real Hugging Face and torch modules, tiny and random, and hand-written ones.

An entry says how many attentions are fused and what each becomes, as `described` writes it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from tilecut_passes.graph import Graph, arguments, sizes_of, value_of
from tilecut_runtime import attention as _attention_op
from zoo import GQA, SEQ2SEQ, SOUND_IN, TEXT

assert _attention_op
OP = torch.ops.tilecut.attention.default
ONE = {**TEXT, "num_hidden_layers": 1}
LLAMA = {**GQA, "num_hidden_layers": 1}
TWO = {**LLAMA, "num_hidden_layers": 2}
EAGER = {"attn_implementation": "eager"}
SEQ2SEQ_ONE = {**SEQ2SEQ, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 64}


@dataclass(frozen=True)
class Spelling:
    """A model (or a model and its example inputs), and what its attentions become, in order."""

    build: Callable[[], Any]
    becomes: tuple[str, ...]
    slow: bool = False


def described(node: torch.fx.Node) -> str:
    """A fused attention in a few words."""
    a = arguments(node)
    words = [] if a["causal"] == "none" else ["causal" if a["causal"] == "top_left" else "causal to the last key"]
    words += [f"window {a['window'][0]} {a['window'][1]}"] if list(a["window"]) != [-1, -1] else []
    words += [f"{a['global_tokens']} global"] if a["global_tokens"] else []
    words += ["padding"] if a["key_padding"] is not None else []
    words += [f"bias {shape_of(a['bias'])}"] if a["bias"] is not None else []
    words += ["alibi"] if a["alibi_slopes"] is not None else []
    words += [f"softcap {a['softcap']:g}"] if a["softcap"] else []
    q, k = (value_of(a[name]).shape[1] for name in "qk")
    words += [f"{q} heads on {k}"] if q != k else []
    return " ".join(words) or "plain"


def shape_of(node: torch.fx.Node) -> str:
    """A bias's shape, with letters for sizes that are not fixed."""
    return "x".join(
        re.sub(r"[^\d]+.*", "n", str(s)) if not isinstance(s, int) else str(s) for s in sizes_of(value_of(node))
    )


def fused_nodes(graph: Graph) -> list[torch.fx.Node]:
    """The ops, in order."""
    return [n for n in graph.nodes if n.target is OP]


def score_sized(graph: Graph) -> list[str]:
    """Nodes as large as the scores of an attention, [.., Sq, Sk], that no bias is made of."""
    pairs, biases = [], []
    for node in fused_nodes(graph):
        a = arguments(node)
        pairs.append([sizes_of(value_of(a["q"]))[2], sizes_of(value_of(a["k"]))[2]])
        biases += [] if a["bias"] is None else [a["bias"]]
    made, todo = set(), list(biases)
    while todo:
        node = todo.pop()
        if node not in made:
            made.add(node)
            todo += node.all_input_nodes
    values = {n: value_of(n) for n in graph.nodes if n not in made and n.op == "call_function"}
    return [n.name for n, v in values.items() if isinstance(v, Tensor) and v.ndim >= 2 and sizes_of(v)[-2:] in pairs]


def mistral(window: int, **options: Any) -> nn.Module:
    """A Mistral that sees `window` tokens."""
    longest = {"max_position_embeddings": 8192} if window > 64 else {}
    return hf.MistralForCausalLM(hf.MistralConfig(**{**LLAMA, **longest}, sliding_window=window, **options))


def gpt_neo() -> nn.Module:
    """A global layer and a local one."""
    config = hf.GPTNeoConfig(
        hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=5,
        vocab_size=99, max_position_embeddings=64, intermediate_size=48,
    )  # fmt: skip
    return hf.GPTNeoForCausalLM(config)


def bloom() -> nn.Module:
    return hf.BloomModel(hf.BloomConfig(vocab_size=99, hidden_size=32, n_layer=1, n_head=4))


def ids(length: int = 11) -> Tensor:
    return torch.randint(1, 99, (2, length), generator=torch.Generator().manual_seed(0))


def packed_llama() -> tuple[nn.Module, dict[str, Tensor]]:
    """Two texts in one row: positions start again."""
    positions = torch.cat([torch.arange(6), torch.arange(5)])[None].repeat(2, 1)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA))
    return model, {"input_ids": ids(), "position_ids": positions}


class Torch(nn.Module):
    """Modules of torch.nn that attend, over embedded tokens and a mask of tokens to leave out."""

    def __init__(self, module: nn.Module, causal: bool = False, weights: bool | None = None):
        super().__init__()
        self.module, self.causal, self.weights = module, causal, weights

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        dropped = attention_mask == 0
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device) if self.causal else None
        if isinstance(self.module, nn.MultiheadAttention):
            return self.module(
                x, x, x, key_padding_mask=dropped, need_weights=bool(self.weights), attn_mask=mask, is_causal=False
            )[0]
        return self.module(x, mask, dropped, is_causal=self.causal)


def torch_module(make: Callable[[], nn.Module], **options: Any) -> Callable[[], Any]:
    """A torch module with its example inputs."""
    return lambda: (Torch(make(), **options), embedded())


def embedded(length: int = 11) -> dict[str, Tensor]:
    """Embedded tokens and their mask."""
    x = torch.randn(2, length, 32, generator=torch.Generator().manual_seed(0))
    return {"x": x, "attention_mask": torch.ones(2, length, dtype=torch.int64)}


class Hand(nn.Module):
    """q, k and v of 4 heads, and an attention function of the caller's over them and the mask."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], kv_heads: int = 4):
        super().__init__()
        self.attend, self.kv_heads = attend, kv_heads
        self.q, self.out = nn.Linear(32, 32), nn.Linear(32, 32)
        self.k, self.v = nn.Linear(32, 8 * kv_heads), nn.Linear(32, 8 * kv_heads)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (p(x).view(b, s, -1, 8).transpose(1, 2) for p in (self.q, self.k, self.v))
        return self.out(self.attend(q, k, v, attention_mask).transpose(1, 2).reshape(b, s, 32))


def hand(attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], kv_heads: int = 4) -> Callable[[], Any]:
    return lambda: (Hand(attend, kv_heads), embedded())


def padded(mask: Tensor) -> Tensor:
    """The additive mask of old BERTs."""
    return (1.0 - mask[:, None, None, :].float()) * -10000.0


def places(x: Tensor) -> tuple[Tensor, Tensor]:
    """Query and key positions of [B, H, S, D], as a column and a row."""
    ramp = torch.arange(x.shape[2], device=x.device)
    return ramp[:, None], ramp[None, :]


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2)


def baddbmm(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    b, h, s, d = q.shape
    folded = [x.reshape(b * h, s, d) for x in (q, k, v)]
    added = padded(mask).expand(b, h, s, s).reshape(b * h, s, s)
    weights = torch.baddbmm(added, folded[0], folded[1].transpose(1, 2), alpha=0.3).softmax(-1)
    return torch.bmm(weights, folded[2]).view(b, h, s, d)


def einsum(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    weights = torch.einsum("bhid,bhjd->bhij", q, k) / 8**0.5
    weights = weights.masked_fill((mask == 0)[:, None, None, :], -torch.inf).softmax(-1)
    return torch.einsum("bhij,bhjd->bhid", weights, v)


def on_query(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (scores(q * 0.3, k) + padded(mask)).softmax(-1) @ v


def on_key(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (scores(q, k / 3) + padded(mask)).softmax(-1) @ v


def on_both(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (scores(q * 8**-0.25, k * 8**-0.25) + padded(mask)).float().softmax(-1).to(q.dtype) @ v


def with_where(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.where((mask != 0)[:, None, None, :], scores(q, k) * 0.4, torch.finfo(q.dtype).min).softmax(-1) @ v


def soft_capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (5 * torch.tanh(scores(q, k) * 0.1 / 5) + padded(mask)).softmax(-1) @ v


def with_globals(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    i, j = places(q)
    seen = (((i - j).abs() <= 3) | (i < 2) | (j < 2)) & (mask != 0)[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, seen)


def looking_ahead(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    i, j = places(q)
    return F.scaled_dot_product_attention(q, k, v, (j <= i + 2) & (i - j < 6) & (mask != 0)[:, None, None, :])


def with_alibi(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    i, j = places(q)
    slopes = 2.0 ** -torch.arange(1, 5, device=q.device)
    bias = -slopes[:, None, None] * (i - j).abs()
    return (scores(q, k) * 0.3 + bias + padded(mask)).softmax(-1) @ v


def repeated(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    return (scores(q, k) * 0.3 + padded(mask)).softmax(-1) @ v


def expanded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    b, _, s, d = q.shape
    k, v = (x[:, :, None].expand(b, 2, 2, s, d).reshape(b, 4, s, d) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, (mask != 0)[:, None, None, :])


def block_diagonal(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """`mask` holds the number of the text that a token is of."""
    return F.scaled_dot_product_attention(q, k, v, (mask[:, :, None] == mask[:, None, :])[:, None])


MHA = lambda: nn.MultiheadAttention(32, 4, batch_first=True)
ENCODER = lambda: nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
PADDED, CAUSAL = ("padding",), ("causal padding",)
GROUPED = ("causal padding 8 heads on 4",)

SPELLINGS: dict[str, Spelling] = {
    "bert": Spelling(lambda: hf.BertModel(hf.BertConfig(**ONE)), PADDED),
    "bert_eager": Spelling(lambda: hf.BertModel(hf.BertConfig(**ONE, **EAGER)), PADDED),
    "roberta_eager": Spelling(lambda: hf.RobertaModel(hf.RobertaConfig(**ONE, **EAGER)), PADDED, slow=True),
    "distilbert_eager": Spelling(
        lambda: hf.DistilBertModel(
            hf.DistilBertConfig(vocab_size=99, dim=32, n_layers=1, n_heads=4, hidden_dim=48, **EAGER)
        ),
        PADDED,
        slow=True,
    ),
    "modernbert": Spelling(
        lambda: hf.ModernBertModel(hf.ModernBertConfig(**TEXT, local_attention=8)),
        ("padding", "window 4 4 padding"),
        slow=True,
    ),
    "gpt2_eager": Spelling(
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=99, n_embd=32, n_layer=1, n_head=4, n_positions=64, **EAGER)
        ),
        CAUSAL,
    ),
    "gpt_neo": Spelling(gpt_neo, ("causal padding", "causal window 4 -1 padding"), slow=True),
    "gptj_eager": Spelling(
        lambda: hf.GPTJForCausalLM(
            hf.GPTJConfig(vocab_size=99, n_embd=32, n_layer=1, n_head=4, rotary_dim=4, n_positions=64, **EAGER)
        ),
        CAUSAL,
        slow=True,
    ),
    "gpt_neox_eager": Spelling(lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**ONE, **EAGER)), CAUSAL, slow=True),
    "opt_eager": Spelling(
        lambda: hf.OPTForCausalLM(hf.OPTConfig(**ONE, ffn_dim=48, word_embed_proj_dim=32, **EAGER)), CAUSAL, slow=True
    ),
    "llama": Spelling(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)), GROUPED, slow=True),
    "llama_eager": Spelling(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA, **EAGER)), GROUPED),
    "llama_packed": Spelling(packed_llama, ("bias nx1xnxn 8 heads on 4",), slow=True),
    "mistral_1": Spelling(lambda: mistral(1), ("causal window 0 -1 padding 8 heads on 4",), slow=True),
    "mistral_2_eager": Spelling(lambda: mistral(2, **EAGER), ("causal window 1 -1 padding 8 heads on 4",), slow=True),
    "mistral_4": Spelling(lambda: mistral(4), ("causal window 3 -1 padding 8 heads on 4",)),
    "mistral_4096": Spelling(lambda: mistral(4096), ("causal window 4095 -1 padding 8 heads on 4",)),
    "qwen2_window": Spelling(
        lambda: hf.Qwen2ForCausalLM(
            hf.Qwen2Config(**TWO, use_sliding_window=True, sliding_window=6, max_window_layers=1)
        ),
        ("causal padding 8 heads on 4", "causal window 5 -1 padding 8 heads on 4"),
        slow=True,
    ),
    "gemma2_eager": Spelling(
        lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**TWO, sliding_window=4, **EAGER)),
        ("causal window 3 -1 padding softcap 50 8 heads on 4", "causal padding softcap 50 8 heads on 4"),
    ),
    "falcon_alibi": Spelling(
        lambda: hf.FalconModel(
            hf.FalconConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, alibi=True)
        ),
        ("causal padding bias nx4x1xn 4 heads on 1",),
        slow=True,
    ),
    "bloom": Spelling(bloom, ("causal padding bias nx4x1xn",)),
    "bloom_without_a_mask": Spelling(lambda: (bloom(), {"input_ids": ids()}), ("causal alibi",)),
    "mpt": Spelling(
        lambda: hf.MptModel(hf.MptConfig(vocab_size=99, d_model=32, n_layers=1, n_heads=4, max_seq_len=2048)),
        ("causal padding alibi",),
        slow=True,
    ),
    "t5": Spelling(
        lambda: hf.T5Model(hf.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)),
        ("padding bias 1x4xnxn", "causal bias 1x4xnxn", "padding"),
    ),
    "t5_eager": Spelling(
        lambda: hf.T5Model(hf.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, **EAGER)),
        ("padding bias 1x4xnxn", "causal bias 1x4xnxn", "padding"),
        slow=True,
    ),
    "bart_eager": Spelling(
        lambda: hf.BartModel(hf.BartConfig(**SEQ2SEQ_ONE, **EAGER)), ("padding", "causal", "padding"), slow=True
    ),
    "whisper": Spelling(
        lambda: hf.WhisperModel(
            hf.WhisperConfig(**{**SEQ2SEQ, "encoder_layers": 1, "decoder_layers": 1}, **SOUND_IN, **EAGER)
        ),
        ("plain", "causal", "plain"),
        slow=True,
    ),
    "bigbird_full": Spelling(
        lambda: hf.BigBirdModel(hf.BigBirdConfig(**ONE, attention_type="original_full")), PADDED, slow=True
    ),
    "multihead_attention": Spelling(torch_module(MHA), PADDED, slow=True),
    "multihead_attention_weights": Spelling(torch_module(MHA, weights=True), PADDED),
    "multihead_attention_causal": Spelling(torch_module(MHA, causal=True, weights=True), CAUSAL),
    "encoder_layer": Spelling(torch_module(ENCODER), PADDED, slow=True),
    "encoder_layer_causal": Spelling(torch_module(ENCODER, causal=True), CAUSAL, slow=True),
    "baddbmm": Spelling(hand(baddbmm), PADDED),
    "einsum": Spelling(hand(einsum), PADDED),
    "scale_on_query": Spelling(hand(on_query), PADDED),
    "scale_on_key": Spelling(hand(on_key), PADDED),
    "scale_on_both": Spelling(hand(on_both), PADDED),
    "where": Spelling(hand(with_where), PADDED),
    "soft_capped": Spelling(hand(soft_capped), ("padding softcap 5",)),
    "global_tokens": Spelling(hand(with_globals), ("window 3 3 2 global padding",)),
    "looking_ahead": Spelling(hand(looking_ahead), ("window 5 2 padding",)),
    "alibi": Spelling(hand(with_alibi), ("padding alibi",)),
    "repeated": Spelling(hand(repeated, 2), ("padding 4 heads on 2",)),
    "expanded": Spelling(hand(expanded, 2), ("padding 4 heads on 2",)),
    "block_diagonal": Spelling(hand(block_diagonal), ("bias nx1xnxn",)),
}
