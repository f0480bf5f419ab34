"""RMS norms in every spelling as one op: graphs as text, what is left alone, numbers, models, 16 bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from checks import op_names, randomise
from norm_models import MODELS
from tilecut.make_cases import make_inputs
from tilecut_passes.capture import capture
from tilecut_passes.fuse_rms_norm import FuseRmsNorm
from tilecut_passes.graph import arguments
from tilecut_passes.run_passes import largest_error, run_passes

OP = torch.ops.aten.rms_norm.default
HALF = torch.bfloat16


class Norm(nn.Module):
    """A layer, a norm in some spelling, a layer."""

    def __init__(self, body, width=8, dtype=torch.float32):
        super().__init__()
        self.body = body
        self.up, self.down = nn.Linear(6, width, dtype=dtype), nn.Linear(width, 3, dtype=dtype)
        self.weight = nn.Parameter(torch.zeros(width, dtype=dtype))
        self.wide = nn.Parameter(torch.zeros(width))
        self.by_place = nn.Parameter(torch.zeros(5, width, dtype=dtype))
        self.torchs = nn.RMSNorm(width, eps=1e-3, dtype=dtype)

    def forward(self, x):
        made = self.body(self, self.up(x))
        first, *others = made if isinstance(made, tuple) else (made,)
        return {"out": self.down(first), **{f"other_{i}": one for i, one in enumerate(others)}}


def captured(body, width=8, dtype=torch.float32, batch=2):
    return capture(randomise(Norm(body, width, dtype)), torch.randn(batch, 5, 6, dtype=dtype))


def mean_square(x):
    return x.pow(2).mean(-1, keepdim=True)


SPELLINGS = {
    "llama": lambda m, x: m.weight * (x * torch.rsqrt(mean_square(x) + 1e-3)),
    "weight first": lambda m, x: torch.rsqrt(mean_square(x) + 1e-3) * x * m.weight,
    "gemma": lambda m, x: x * torch.rsqrt(mean_square(x) + 1e-3) * (1 + m.weight),
    "x times x": lambda m, x: m.weight * (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-3)),
    "square": lambda m, x: m.weight * (x * torch.rsqrt(torch.square(x).mean(-1, True) + 1e-3)),
    "over a root": lambda m, x: x / torch.sqrt(1e-3 + mean_square(x)) * m.weight,
    "times one over a root": lambda m, x: x * (1 / torch.sqrt(mean_square(x) + 1e-3)) * m.weight,
    "power": lambda m, x: x * (mean_square(x) + 1e-3) ** -0.5 * m.weight,
    "over a power": lambda m, x: x / (mean_square(x) + 1e-3) ** 0.5 * m.weight,
    "sum over width": lambda m, x: m.weight * (x * torch.rsqrt((x * x).sum(-1, keepdim=True) / 8 + 1e-3)),
    "share of sum": lambda m, x: m.weight * (x * torch.rsqrt((x * x).sum(-1, keepdim=True) * 0.125 + 1e-3)),
    "torch": lambda m, x: m.torchs(x),
    "torch, with statistics": lambda m, x: torch.ops.aten._fused_rms_norm(x, [8], m.weight, 1e-3)[0],
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_becomes_one_op(name):
    graph = captured(SPELLINGS[name])
    torch.manual_seed(0)
    inputs = [{"x": torch.randn(n, 5, 6) * 10**p} for n in (1, 4) for p in (-2, 0, 2)]
    before = [graph.run(one) for one in inputs]
    (record,) = run_passes(graph, [FuseRmsNorm()])
    assert record.rewrites == (name != "torch")
    assert op_names(graph) == ("linear add rms_norm linear" if name == "gemma" else "linear rms_norm linear")
    (node,) = [n for n in graph.nodes if n.target is OP]
    assert arguments(node)["eps"] == 1e-3 and arguments(node)["weight"] is not None
    assert max(largest_error(b, graph.run(one)) for b, one in zip(before, inputs)) < 1e-6
    assert run_passes(graph, [FuseRmsNorm()])[0].rewrites == 0 and not graph.refusals


@pytest.mark.parametrize(
    ("body", "after"),
    [
        # Without a weight, without eps.
        (lambda m, x: x * torch.rsqrt(mean_square(x) + 1e-3), "linear rms_norm linear"),
        (lambda m, x: x * torch.rsqrt(mean_square(x)), "linear rms_norm linear"),
        # The weight is none of the last dimension's, or more than one reads the normalised x.
        (lambda m, x: m.by_place * (x * torch.rsqrt(mean_square(x) + 1e-3)), "linear rms_norm mul linear"),
        (lambda m, x: (m.weight * (y := x * torch.rsqrt(mean_square(x) + 1e-3)), y), "linear rms_norm mul linear"),
        (lambda m, x: 3 * (x * torch.rsqrt(mean_square(x) + 1e-3)), "linear rms_norm mul linear"),
        # A layer norm is one of what is left of the mean.
        (lambda m, x: (y := x - x.mean(-1, True)) * torch.rsqrt(mean_square(y) + 1e-3), "linear mean sub rms_norm linear"),
    ],
)
def test_what_stands_beside_the_norm_stays(body, after):
    graph = captured(body)
    run_passes(graph, [FuseRmsNorm()], check={"x": torch.randn(3, 5, 6)}, limit=1e-6)
    assert op_names(graph) == after and not graph.refusals


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (lambda m, x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-3), "mean is over dimensions [1] of 3"),
        (lambda m, x: x * torch.rsqrt(x.pow(2).mean((1, 2), keepdim=True) + 1e-3), "mean is over dimensions [1, 2] of 3"),
        (lambda m, x: (x * (r := torch.rsqrt(mean_square(x) + 1e-3)), r), "read by something else"),
        (lambda m, x: (x * torch.rsqrt((v := mean_square(x)) + 1e-3), v), "read by something else"),
        (lambda m, x: torch.ops.aten._fused_rms_norm(x, [8], m.weight, 1e-3), "read by something else"),
        (lambda m, x: torch.ops.aten._fused_rms_norm(x, [5, 8], m.by_place, 1e-3)[0], "the last 2 dimensions"),
    ],
)
def test_what_is_refused_says_why(body, why):
    graph = captured(body)
    before = op_names(graph)
    assert run_passes(graph, [FuseRmsNorm()])[0].rewrites == 0
    assert op_names(graph) == before
    (refusal,) = graph.refusals
    assert why in refusal.why and refusal.by == "FuseRmsNorm"


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-3),
        lambda m, x: x * torch.rsqrt((x * torch.tanh(x)).mean(-1, keepdim=True) + 1e-3),
        lambda m, x: torch.tanh(x) * torch.rsqrt(mean_square(x) + 1e-3),
        lambda m, x: x * torch.sqrt(mean_square(x) + 1e-3),
        lambda m, x: x / (mean_square(x) + 1e-3),
        lambda m, x: x * torch.rsqrt((x * x).sum(-1, keepdim=True) / 7 + 1e-3),
        lambda m, x: x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-3),
        lambda m, x: x * torch.rsqrt(mean_square(x) + m.by_place[0, 0]),
    ],
)
def test_what_is_no_norm_is_left_alone(body):
    graph = captured(body)
    before = op_names(graph)
    assert run_passes(graph, [FuseRmsNorm()])[0].rewrites == 0
    assert op_names(graph) == before and not graph.refusals


@settings(deadline=None, max_examples=15)
@given(width=st.integers(1, 40), batch=st.integers(1, 4), size=st.floats(-3, 3), eps=st.sampled_from([0.0, 1e-6, 1e-5, 1.0]))
def test_numbers_of_any_width(width, batch, size, eps):
    graph = captured(lambda m, x: m.weight * (x * torch.rsqrt(mean_square(x) + eps)), width)
    inputs = {"x": torch.randn(batch, 5, 6, generator=torch.Generator().manual_seed(width)) * 10**size}
    assert run_passes(graph, [FuseRmsNorm()], check=inputs, limit=1e-5)[0].rewrites == 1


LATE = lambda m, x: m.weight * ((w := x.float()) * torch.rsqrt(mean_square(w) + 1e-3)).to(HALF)
BARE = lambda m, x: ((w := x.float()) * torch.rsqrt(mean_square(w) + 1e-3)).to(HALF)
EARLY = lambda m, x: ((w := x.float()) * torch.rsqrt(mean_square(w) + 1e-3) * (1 + m.weight.float())).to(HALF)
OLMO = lambda m, x: (m.weight * ((w := x.float()) * torch.rsqrt(mean_square(w) + 1e-3))).to(HALF)
T5 = lambda m, x: m.weight * (x * torch.rsqrt(mean_square(x.float()) + 1e-3)).to(HALF)
WIDE = lambda m, x: (m.wide * ((w := x.float()) * torch.rsqrt(mean_square(w) + 1e-3)).to(HALF)).to(HALF)


@pytest.mark.parametrize(
    ("body", "after", "dtype"),
    [
        (LATE, "linear rms_norm linear", HALF),
        (BARE, "linear rms_norm linear", HALF),
        (T5, "linear rms_norm linear", HALF),
        (EARLY, "linear to to add rms_norm to linear", torch.float32),
        (OLMO, "linear to to rms_norm to linear", torch.float32),
        # A wider weight makes a wider product, which the op would not.
        (WIDE, "linear rms_norm mul to linear", HALF),
    ],
)
def test_in_16_bits_types_stay_and_numbers_to_a_rounding(body, after, dtype):
    graph = captured(body, dtype=HALF)
    inputs = {"x": torch.randn(3, 5, 6, dtype=HALF)}
    assert run_passes(graph, [FuseRmsNorm()], check=inputs, limit=2**-7)[0].rewrites == 1
    assert op_names(graph) == after
    (node,) = [n for n in graph.nodes if n.target is OP]
    assert node.meta["val"].dtype == dtype and graph.results[0].meta["val"].dtype == HALF


@pytest.mark.parametrize("name", MODELS)
def test_models_have_the_norms_that_their_layers_have(name):
    model, norms, _, _ = MODELS[name]
    graph = capture(model())
    for check in (make_inputs(graph, 2, 9, seed=1, ragged=False), make_inputs(graph, 1, 23, seed=2, ragged=False)):
        fused = graph.copy()
        records = run_passes(fused, [FuseRmsNorm(), FuseRmsNorm()], check=check, limit=1e-5)
        assert [r.rewrites for r in records] == [norms, 0]
        assert sum(n.target is OP for n in fused.nodes) == norms and not fused.refusals
