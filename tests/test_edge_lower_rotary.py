"""Rotary embeddings as onnxruntime's op: graphs as text, one refusal for each reason, tables of every make, whole models."""

import pytest
import torch
from torch import nn

from checks import emit, op_names, randomise, run_onnx
from norm_models import MODELS
from tilecut_passes.capture import capture
from tilecut_passes.graph import is_call
from tilecut_passes.run_passes import largest_error, run_passes
from tilecut_runtime.rotary import rotary
from tilecut_targets.edge import ort_ops
from tilecut_targets.edge.forms import Forms, write_forms
from tilecut_targets.edge.lower_rotary import LowerRotary, pair_chain
from tilecut_targets.edge.target import EdgeTarget

OP = torch.ops.tilecut.rotary.default


class Turns(nn.Module):
    """x [B, S, 3*8] turned, its heads set apart as models do, by tables that `tables` makes of angles [.., S, 4]."""

    def __init__(self, tables, interleaved=False, heads_last=False, rows=False):
        super().__init__()
        self.tables, self.interleaved, self.heads_last, self.rows = tables, interleaved, heads_last, rows
        self.layer = nn.Linear(24, 24)

    def forward(self, x, places):
        angles = (places if self.rows else places[:1])[:, :, None].float() * torch.tensor([1.0, 0.3, 0.1, 0.03])
        heads = self.layer(x).view(x.shape[0], x.shape[1], 3, 8)
        if not self.heads_last:
            heads = heads.transpose(1, 2)
        cos, sin = (self.tables(f(angles)) for f in (torch.cos, torch.sin))
        cos, sin = (one.unsqueeze(2 if self.heads_last else 1) for one in (cos, sin))
        return {"out": rotary(heads, cos, sin, interleaved=self.interleaved)}


def twice(half):
    return torch.cat((half, half), -1)


def scaled(half):
    return twice(half) * 1.5


def scaled_by_length(half):
    return twice(half) * (half.shape[1] * 0.5)


def by_turns(half):
    return torch.repeat_interleave(half, 2, -1)


def stacked(half):
    return torch.stack((half, half), -1).flatten(-2)


def example(batch=2, length=5):
    places = torch.stack([torch.arange(length) + 3 * i for i in range(batch)])
    return {"x": torch.randn(batch, length, 24), "places": places}


def captured(*options, **more):
    dims = {"x": {0: "batch", 1: "sequence"}, "places": {0: "batch", 1: "sequence"}}
    return capture(randomise(Turns(*options, **more)), example(), dims)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("heads_last", [False, True])
@pytest.mark.parametrize(
    ("tables", "interleaved"),
    [(twice, False), (scaled, False), (scaled_by_length, False), (by_turns, True), (stacked, True)],
)
def test_tables_of_every_make(tables, interleaved, heads_last, rows, tmp_path):
    graph = captured(tables, interleaved, heads_last, rows)
    lowered = graph.copy()
    (record,) = run_passes(lowered, [LowerRotary()])
    assert record.rewrites == 1 and not lowered.refusals
    assert sum(n.target is ort_ops.rotary for n in lowered.nodes) == 1 and not any(is_call(n, OP) for n in lowered.nodes)
    write_forms(lowered, tmp_path / "m.onnx", Forms())
    for batch, length in ((1, 1), (1, 6), (3, 5)):
        x = example(batch, length)
        assert largest_error(run_onnx(tmp_path / "m.onnx", x), graph.run(x)) < 1e-5


def test_heads_are_set_apart_behind_the_op():
    lowered = captured(twice).copy()
    run_passes(lowered, [LowerRotary()])
    names = op_names(lowered)
    assert names.split().count("cut_table") == 2 and names.split().count("positions") == 1
    assert names.endswith("flatten rotary unflatten transpose")


def test_tables_are_cut_once_for_all_that_share_them():
    class Two(Turns):
        def forward(self, x, places):
            cos, sin = (self.tables(f(places[:1, :, None].float() * torch.ones(4))).unsqueeze(1) for f in (torch.cos, torch.sin))
            heads = self.layer(x).view(x.shape[0], x.shape[1], 3, 8).transpose(1, 2)
            return {"a": rotary(heads, cos, sin), "b": rotary(heads * 2, cos, sin)}

    graph = capture(randomise(Two(twice)), example())
    made = graph.copy()
    (record,) = run_passes(made, [LowerRotary()])
    assert record.rewrites == 2
    assert op_names(made).split().count("cut_table") == 2 and op_names(made).split().count("positions") == 1


@pytest.mark.parametrize(
    ("tables", "interleaved"),
    [
        (lambda half: torch.cat((half, half * 2), -1), False),
        (twice, True),
        (by_turns, False),
        (lambda half: twice(half).flip(-1), False),
        (lambda half: twice(half) * torch.arange(8.0), False),
        (lambda half: twice(half)[..., [0, 2, 1, 3, 4, 5, 6, 7]], False),
    ],
)
def test_pairs_that_are_not_seen_to_share_a_number_are_left_alone_with_the_reason(tables, interleaved):
    graph = captured(tables, interleaved)
    made = graph.copy()
    assert LowerRotary()(made) == 0
    assert [r.why for r in made.refusals] == ["the two channels of a pair are not seen to share one cosine and sine"]
    assert op_names(made) == op_names(graph)


def test_tables_of_every_head_are_left_alone_with_the_reason():
    class Apart(nn.Module):
        def forward(self, x, angles):
            return rotary(x, twice(angles.cos()), twice(angles.sin()))

    graph = capture(Apart(), {"x": torch.randn(2, 3, 5, 8), "angles": torch.randn(1, 3, 5, 4)})
    assert LowerRotary()(graph) == 0
    assert [r.why for r in graph.refusals] == ["its tables are not [B|1, 1, S, D] to [B, H, S, D], or with S and H exchanged"]


def test_an_input_as_table_shows_nothing():
    class Given(nn.Module):
        def forward(self, x, cos, sin):
            return rotary(x, cos, sin)

    table = torch.randn(1, 1, 5, 8)
    graph = capture(Given(), {"x": torch.randn(2, 3, 5, 8), "cos": table, "sin": table})
    (node,) = (n for n in graph.nodes if is_call(n, OP))
    assert pair_chain(node.args[1], False) is None
    assert LowerRotary()(graph) == 0 and len(graph.refusals) == 1


@pytest.mark.parametrize("name", [name for name, (_, _, turns, _) in MODELS.items() if turns])
def test_models_have_as_many_ops_as_embeddings_and_the_same_numbers(name, tmp_path):
    make, norms, turns, _ = MODELS[name]
    made = emit(EdgeTarget(), capture(make()), tmp_path)
    ops = made.written.facts["onnx_ops"]
    assert isinstance(ops, dict)
    assert ops["RotaryEmbedding"] == turns, made.lowered.refusals
    rungs = EdgeTarget().verify(tmp_path, made.manifest, made.cases)
    assert [r.status for r in rungs] == ["passed", "passed"]
    assert norms == 0 or ops.get("Reciprocal", 0) == 0
