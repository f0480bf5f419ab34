"""Packed segments become sequences of the packed op: real models, numbers, unpadded texts, and what stays a tensor."""

import functools
import io

import pytest
import torch
import transformers as hf
from torch import nn

from checks import op_names, randomise
from test_recognize_mask import Attends, ramp, tril
from tilecut_passes.capture import capture
from tilecut_passes.fuse_attention import FuseAttention
from tilecut_passes.graph import Graph, sizes_of, value_of
from tilecut_passes.run_passes import largest_error, run_passes
from tilecut_targets.export_program import export_program
from zoo import GQA

DENSE, PACKED = torch.ops.tilecut.attention.default, torch.ops.tilecut.attention_varlen.default
TWO = {**GQA, "num_hidden_layers": 2, "max_position_embeddings": 64}
GPT2 = {"vocab_size": 99, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
MODELS = {
    "llama": lambda how: hf.LlamaForCausalLM(hf.LlamaConfig(**TWO, **how)),
    "mistral": lambda how: hf.MistralForCausalLM(hf.MistralConfig(**TWO, sliding_window=3, **how)),
    "gpt2": lambda how: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, bos_token_id=0, eos_token_id=0, **how)),
    "qwen3": lambda how: hf.Qwen3ForCausalLM(hf.Qwen3Config(**TWO, **how)),
    "gemma2": lambda how: hf.Gemma2ForCausalLM(hf.Gemma2Config(**TWO, sliding_window=4, **how)),
}
# Windows, left and right, of the two layers.
WINDOWS = {"mistral": [[2, -1], [2, -1]], "gemma2": [[3, -1], [-1, -1]]}
CASES = [
    ("llama", "sdpa"),
    ("mistral", "eager"),
    ("gpt2", "sdpa"),
    *(
        pytest.param(*one, marks=pytest.mark.slow)
        for one in (
            ("llama", "eager"),
            ("mistral", "sdpa"),
            ("gpt2", "eager"),
            ("qwen3", "sdpa"),
            ("qwen3", "eager"),
            ("gemma2", "eager"),
        )
    ),
]
# Lengths of the texts of each row.
ROWS = [
    [[5, 1, 1, 6, 2]],
    [[7]],
    [[1]],
    [[9, 2], [1, 10], [3, 8]],
    [[1, 1, 1, 1], [4], [2, 2]],
    [[2], [2]],
]


@functools.cache
def packed(name: str, how: str) -> tuple[nn.Module, Graph, Graph]:
    model = randomise(MODELS[name]({"attn_implementation": how}))
    graph = capture(model, texts([[6, 5], [6, 5]]))
    made = graph.copy()
    assert run_passes(made, [FuseAttention(packed=True)])[0].rewrites == 2
    assert FuseAttention(packed=True)(made) == 0
    return model, graph, made


def texts(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Texts of these lengths packed into rows."""
    generator = torch.Generator().manual_seed(sum(map(len, rows)))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    return {"input_ids": torch.randint(0, 99, positions.shape, generator=generator), "position_ids": positions}


def score_shaped(graph: Graph) -> list[str]:
    """Nodes whose last two dimensions are the length of a row."""
    length = sizes_of(value_of(graph.placeholders[0]))[1]
    values = {n.name: value_of(n) for n in graph.nodes if n.op == "call_function"}
    return [
        name
        for name, value in values.items()
        if isinstance(value, torch.Tensor) and value.ndim >= 2 and sizes_of(value)[-2:] == [length, length]
    ]


@pytest.mark.parametrize(("name", "how"), CASES)
def test_packed_models_have_one_packed_op_a_layer_and_no_mask(name, how):
    _, graph, made = packed(name, how)
    first, second = [n for n in made.nodes if n.target is PACKED]
    assert not any(n.target is DENSE for n in made.nodes) and made.refusals == []
    assert score_shaped(graph) and not score_shaped(made)
    assert "softmax" not in op_names(made) and op_names(made).split().count("nonzero") == 1
    assert first.args[3] is first.args[4] is second.args[3]
    assert [list(n.kwargs["window"]) for n in (first, second)] == WINDOWS.get(name, [[-1, -1]] * 2)
    assert [n.kwargs["causal"] for n in (first, second)] == ["top_left"] * 2
    assert (first.kwargs["softcap"] > 0) == (name == "gemma2")
    assert [value_of(x).shape[1] for x in first.args[:2]] == ([4, 4] if name == "gpt2" else [8, 4])


@pytest.mark.parametrize(("name", "how"), CASES)
def test_packed_models_give_the_same_numbers(name, how):
    model, graph, made = packed(name, how)
    for rows in ROWS:
        given = texts(rows)
        got = made.run(given)
        assert largest_error(graph.run(given), got) < 2e-5, rows
        with torch.no_grad():
            for b, lengths in enumerate(rows):
                parts = given["input_ids"][b].split(lengths)
                alone = torch.cat([model(input_ids=part[None], use_cache=False).logits[0] for part in parts])
                assert largest_error({"logits": alone}, {"logits": got["logits"][b]}) < 2e-5, rows


@pytest.mark.parametrize(("name", "how"), CASES)
def test_positions_may_begin_anywhere_and_stand_still(name, how):
    _, graph, made = packed(name, how)
    for shape in ((1, 9), (3, 13)):
        steps = torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(3))
        given = {"input_ids": steps + 7, "position_ids": steps.clamp_max(1).cumsum(1) % 7 + 20}
        assert largest_error(graph.run(given), made.run(given)) < 2e-5


@pytest.mark.parametrize(("name", "how"), CASES)
def test_packed_models_can_be_exported_saved_and_loaded_again(name, how):
    _, graph, made = packed(name, how)
    file = io.BytesIO()
    torch.export.save(export_program(made), file)
    file.seek(0)
    program = torch.export.load(file)
    assert sum(n.target is PACKED for n in program.graph.nodes) == 2
    loaded = program.module()
    for rows in ROWS:
        given = texts(rows)
        with torch.no_grad():
            assert largest_error(graph.run(given), loaded(**given)) < 2e-5, rows


def test_without_being_asked_the_mask_stays_a_bias():
    _, graph, _ = packed("llama", "sdpa")
    made = graph.copy()
    run_passes(made, [FuseAttention()])
    assert [n.target for n in made.nodes].count(DENSE) == 2 and PACKED not in [n.target for n in made.nodes]
    assert {r.why for r in made.refusals} == {"mask kept as a tensor: packed segments of position_ids x causal"}


def breaks(mask):
    """Segments as transformers counts them."""
    return (torch.diff(mask, prepend=mask[:, :1] - 1, dim=-1) != 1).cumsum(-1)


def same(number):
    return number[:, None, :, None] == number[:, None, None, :]


def alibi(s):
    return -torch.tensor([0.5, 0.25])[:, None, None] * (ramp(s)[:, None] - ramp(s)).abs().float()


def hand(make, rows=2):
    """An attention with a mask of its own, before and after."""
    example = {"x": torch.randn(2, 9, 8), "mask": torch.ones(rows, 9, dtype=torch.long)}
    sizes = {"x": {0: "batch", 1: "sequence"}, "mask": {0: "batch", 1: "sequence"} if rows > 1 else {1: "sequence"}}
    graph = capture(randomise(Attends(make)), example, sizes)
    made = graph.copy()
    assert run_passes(made, [FuseAttention(packed=True)])[0].rewrites == 1
    return graph, made


def assert_equal(graph, made, rows=None):
    generator = torch.Generator().manual_seed(0)
    for batch, length in ((3, 11), (1, 1), (2, 2), (1, 30)):
        for mask in (
            torch.randint(0, 3, (rows or batch, length), generator=generator),
            (torch.arange(length) % 4)[None].repeat(rows or batch, 1) + 1,
            # Every row goes on where the one before it ended, and is a sequence of its own.
            torch.arange((rows or batch) * length).view(-1, length),
        ):
            given = {"x": torch.randn(batch, length, 8, generator=generator), "mask": mask}
            assert largest_error(graph.run(given), made.run(given)) < 1e-5, (batch, length)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda self, mask, s: same(breaks(mask)), ("none", [-1, -1], False)),
        (lambda self, mask, s: same((mask == 0).cumsum(1)) & tril(s), ("top_left", [-1, -1], False)),
        # Texts that end with token 2: a count of what is no input's zeros.
        (lambda self, mask, s: same((mask == 2).cumsum(1)) & tril(s), ("top_left", [-1, -1], False)),
        (lambda self, mask, s: same((mask == 2).long().cumsum(-1)), ("none", [-1, -1], False)),
        (
            lambda self, mask, s: same(breaks(mask)) & ((ramp(s)[:, None] - ramp(s)).abs() < 3),
            ("none", [2, 2], False),
        ),
        (lambda self, mask, s: same(breaks(mask)) & tril(s).triu(-2), ("top_left", [2, -1], False)),
        (
            lambda self, mask, s: alibi(s).masked_fill(~(same((mask == 0).cumsum(1)) & tril(s)), -torch.inf),
            ("top_left", [-1, -1], True),
        ),
        # Two kinds of segments: a sequence ends where either does.
        (
            lambda self, mask, s: same((mask == 1).cumsum(1)) & same((mask == 2).cumsum(1)) & tril(s),
            ("top_left", [-1, -1], False),
        ),
    ],
)
def test_products_that_the_packed_op_holds(make, options):
    graph, made = hand(make)
    (node,) = [n for n in made.nodes if n.target is PACKED]
    assert (node.kwargs["causal"], list(node.kwargs["window"]), node.args[7] is not None) == options
    assert not score_shaped(made)
    assert_equal(graph, made)


def test_one_row_of_positions_serves_the_whole_batch():
    graph, made = hand(lambda self, mask, s: same(breaks(mask)) & tril(s), rows=1)
    assert any(n.target is PACKED for n in made.nodes)
    assert_equal(graph, made, rows=1)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda self, mask, s: same(mask), "equal values of mask may come back later in a row"),
        (lambda self, mask, s: same(mask) & tril(s), "packed segments of mask x causal; equal values of mask"),
        (
            lambda self, mask, s: same((mask == 0).cumsum(1)) & (mask != 2)[:, None, None],
            "padding beside segments",
        ),
        (
            lambda self, mask, s: (same((mask == 0).cumsum(1)) & (ramp(s)[:, None] // 6 == ramp(s) // 6) & tril(s)),
            "chunks of 6 beside segments",
        ),
        (
            lambda self, mask, s: self.bias[:s, :s].masked_fill(~same((mask == 0).cumsum(1)), -torch.inf),
            "a bias beside segments",
        ),
        (
            lambda self, mask, s: (
                same((mask == 0).cumsum(1)) & (((ramp(s)[:, None] - ramp(s)).abs() < 4) | (ramp(s) < 2) | (ramp(s) < 2)[:, None])
            ),
            "global tokens beside segments",
        ),
    ],
)  # fmt: skip
def test_other_products_stay_a_bias_and_say_why(make, why):
    graph, made = hand(make)
    assert [n.target for n in made.nodes if n.target in (DENSE, PACKED)] == [DENSE]
    (refusal,) = made.refusals
    assert refusal.why.startswith("mask kept as a tensor: ") and why in refusal.why
    generator = torch.Generator().manual_seed(0)
    given = {
        "x": torch.randn(3, 11, 8, generator=generator),
        # No row is all padding.
        "mask": torch.randint(0, 2, (3, 11), generator=generator),
    }
    assert largest_error(graph.run(given), made.run(given)) < 1e-5
