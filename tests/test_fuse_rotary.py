"""Rotary embeddings in every spelling as one op: graphs as text, what is left alone, numbers, models; its axis rule."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from checks import op_names, randomise
from norm_models import MODELS
from support import groups_by_kind
from tilecut.make_cases import make_inputs
from tilecut_passes.axes.groups import find_groups
from tilecut_passes.axes.infer import infer
from tilecut_passes.capture import capture
from tilecut_passes.fuse_attention import FuseAttention
from tilecut_passes.fuse_rotary import FuseRotary
from tilecut_passes.graph import source, value_of
from tilecut_passes.mask import Mask
from tilecut_passes.plan import PrunePlan
from tilecut_passes.prune import Prune
from tilecut_passes.run_passes import largest_error, run_passes
from tilecut_runtime.attention import attention
from tilecut_runtime.rotary import rotary

OP = torch.ops.tilecut.rotary.default


class Turns(nn.Module):
    """x [B, 3, S, D] turned in some spelling."""

    def __init__(self, body):
        super().__init__()
        self.body = body
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x, cos, sin):
        return {"out": self.body(x * self.scale, cos, sin)}


def captured(body, width=8, shape=(2, 3, 5), table=(1, 1, 5), dtype=torch.float32):
    example = {"x": torch.randn(*shape, width), "cos": torch.randn(*table, width), "sin": torch.randn(*table, width)}
    example = {name: one if name == "x" else one.to(dtype) for name, one in example.items()}
    return capture(randomise(Turns(body)), example, {}), example


def halves(x):
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)


def chunked(x):
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def split(x):
    a, b = torch.split(x, x.shape[-1] // 2, -1)
    return torch.cat((-b, a), 3)


def neighbours(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def reshaped(x):
    return torch.stack((-x[:, :, :, 1::2], x[:, :, :, ::2]), dim=-1).reshape(x.shape)


def by_parts(x, cos, sin):
    a, b = x.chunk(2, -1)
    c, s = cos[..., : cos.shape[-1] // 2], sin[..., : sin.shape[-1] // 2]
    return torch.cat((a * c - b * s, b * c + a * s), -1)


def crosswise(x, cos, sin):
    a, b = x[..., :4], x[..., 4:]
    c, s = cos[..., :4], sin[..., :4]
    return torch.cat((c * a - s * b, s * a + c * b), -1)


def partial(x, cos, sin):
    turned, rest = x[..., :4], x[..., 4:]
    return torch.cat((turned * cos[..., :4] + halves(turned) * sin[..., :4], rest), -1)


SPELLINGS = {
    "halves": (lambda x, c, s: x * c + halves(x) * s, False, "mul rotary"),
    "other order": (lambda x, c, s: s * halves(x) + c * x, False, "mul rotary"),
    "chunk": (lambda x, c, s: x * c + chunked(x) * s, False, "mul rotary"),
    "split": (lambda x, c, s: x * c + split(x) * s, False, "mul rotary"),
    "neighbours": (lambda x, c, s: x * c + neighbours(x) * s, True, "mul rotary"),
    "reshaped": (lambda x, c, s: x * c + reshaped(x) * s, True, "mul rotary"),
    "by parts": (by_parts, False, "mul slice cat slice cat rotary"),
    "crosswise": (crosswise, False, "mul slice cat slice cat rotary"),
    "partial": (partial, False, "mul slice slice slice slice rotary cat"),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_becomes_one_op(name):
    body, interleaved, after = SPELLINGS[name]
    graph, example = captured(body)
    (record,) = run_passes(graph, [FuseRotary()], check=example, limit=1e-6)
    assert record.rewrites == 1 and op_names(graph) == after
    (node,) = [n for n in graph.nodes if n.target is OP]
    assert node.kwargs == {"interleaved": interleaved}
    assert run_passes(graph, [FuseRotary()])[0].rewrites == 0 and not graph.refusals


@settings(deadline=None, max_examples=15)
@given(
    name=st.sampled_from(["halves", "chunk", "neighbours", "by parts"]), half=st.integers(1, 8),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 6)),
    kept=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)  # fmt: skip
def test_any_width_and_any_tables_that_broadcast(name, half, shape, kept):
    table = tuple(n if keep else 1 for n, keep in zip(shape, kept))
    graph, example = captured(SPELLINGS[name][0], 2 * half, shape, table)
    assert run_passes(graph, [FuseRotary()], check=example, limit=1e-6)[0].rewrites == 1


def test_tables_of_fewer_dimensions_get_the_others():
    graph, example = captured(lambda x, c, s: x * c + halves(x) * s, table=(5,))
    assert run_passes(graph, [FuseRotary()], check=example, limit=1e-6)[0].rewrites == 1
    (node,) = [n for n in graph.nodes if n.target is OP]
    assert [list(value_of(source(node, i)).shape) for i in (1, 2)] == [[1, 1, 5, 8]] * 2


@pytest.mark.parametrize(
    ("body", "options", "why"),
    [
        (lambda x, c, s: (y := x[0]) * c[0] + halves(y) * s[0], {}, "x has 3 dimensions"),
        (lambda x, c, s: x * c + halves(x) * s, {"shape": (1, 3, 5), "table": (2, 1, 5)}, "does not broadcast"),
        (lambda x, c, s: x * c + halves(x) * s, {"dtype": torch.float64}, "x is torch.float32 and cos torch.float64"),
    ],
)
def test_what_is_refused_says_why(body, options, why):
    graph, _ = captured(body, **options)
    before = op_names(graph)
    assert run_passes(graph, [FuseRotary()])[0].rewrites == 0
    assert op_names(graph) == before
    (refusal,) = graph.refusals
    assert why in refusal.why and refusal.by == "FuseRotary"


@pytest.mark.parametrize(
    "body",
    [
        # Not negated, the wrong half negated, halves of something else, unequal halves, odd before even.
        lambda x, c, s: x * c + torch.cat((x[..., 4:], x[..., :4]), -1) * s,
        lambda x, c, s: x * c + torch.cat((x[..., 4:], -x[..., :4]), -1) * s,
        lambda x, c, s: x * c + torch.cat((-x[..., :4], x[..., 4:]), -1) * s,
        lambda x, c, s: x * c + halves(x * 2) * s,
        lambda x, c, s: x * c + torch.cat((-x[..., 3:], x[..., :3]), -1) * s,
        lambda x, c, s: x * c + torch.cat((-x[:, 2:], x[:, :2]), 1) * s,
        lambda x, c, s: x * c + torch.stack((-x[..., ::2], x[..., 1::2]), -1).flatten(-2) * s,
        lambda x, c, s: x * c - halves(x) * s,
        lambda x, c, s: torch.add(x * c, halves(x) * s, alpha=2),
        lambda x, c, s: torch.cat(((a := x[..., :4]) * c[..., :4] + (b := x[..., 4:]) * s[..., :4], b * c[..., :4] + a * s[..., :4]), -1),  # noqa: E501
        lambda x, c, s: torch.cat(((a := x[..., :4]) * c[..., :4] - (b := x[..., 4:]) * s[..., :4], b * s[..., :4] + a * c[..., :4]), -1),  # noqa: E501
    ],
)  # fmt: skip
def test_what_is_no_rotation_is_left_alone(body):
    graph, _ = captured(body)
    before = op_names(graph)
    assert run_passes(graph, [FuseRotary()])[0].rewrites == 0
    assert op_names(graph) == before and not graph.refusals


@pytest.mark.parametrize("name", MODELS)
def test_models_turn_queries_and_keys_once_a_layer(name):
    model, _, turned, interleaved = MODELS[name]
    graph = capture(model())
    for check in (make_inputs(graph, 2, 9, seed=1, ragged=False), make_inputs(graph, 1, 23, seed=2, ragged=False)):
        fused = graph.copy()
        records = run_passes(fused, [FuseAttention(), FuseRotary(), FuseRotary()], check=check, limit=1e-5)
        assert [r.rewrites for r in records[1:]] == [turned, 0]
        nodes = [n for n in fused.nodes if n.target is OP]
        assert [n.kwargs["interleaved"] for n in nodes] == [interleaved] * turned
        assert not [r for r in fused.refusals if r.by == "FuseRotary"]


class Decoder(nn.Module):
    """Attention that calls the op itself."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 32) for _ in range(3))
        self.out = nn.Linear(32, 16)

    def forward(self, x):
        b, s, _ = x.shape
        q, k, v = (one(x).view(b, s, 4, 8).transpose(1, 2) for one in (self.q, self.k, self.v))
        turn = torch.arange(s, device=x.device)[:, None] / torch.arange(1, 5, device=x.device)
        cos, sin = (torch.cat((t, t), -1)[None, None] for t in (turn.cos(), turn.sin()))
        q, k = (rotary(one, cos, sin) for one in (q, k))
        return self.out(attention(q, k, v, causal="bottom_right").transpose(1, 2).reshape(b, s, -1))


def test_a_graph_that_has_the_op_keeps_its_heads_and_freezes_the_width_of_pairs():
    graph = capture(randomise(Decoder()), torch.randn(2, 5, 16))
    assert [n.target for n in graph.nodes].count(OP) == 2
    assert groups_by_kind(graph).keys() == {"heads"}
    groups = [g for g in find_groups(infer(graph)) if g.kind == "heads"]
    assert [g.size for g in groups] == [4]
    plan = PrunePlan.keep_all(graph, groups).keeping({g.name: [0, 3] for g in groups})
    cut, masked = graph.copy(), graph.copy()
    run_passes(cut, [Prune(plan)])
    run_passes(masked, [Mask(plan)])
    for batch, length in ((2, 5), (3, 9)):
        inputs = {"x": torch.randn(batch, length, 16)}
        assert largest_error(masked.run(inputs), cut.run(inputs)) < 1e-5
