"""Mask tuning against least squares in float64 that is built column by column, and what it leaves alone."""

import functools

import pytest
import torch
import transformers
from torch import fx, nn

from checks import bert_graph, groups_of, in_double, mlp_graph, randomise, text_batch
from simulate_processes import simulate_processes
from tilecut_passes.calibration import Batch, check_batches
from tilecut_passes.capture import capture
from tilecut_passes.dense_layer import DenseLayer
from tilecut_passes.graph import is_call, source
from tilecut_passes.mask import gate
from tilecut_passes.plan import PrunePlan
from tilecut_passes.prune import Prune
from tilecut_passes.run_passes import largest_error, run_passes
from tilecut_passes.tune_masks import TuneMasks, fold_scales
from tilecut_runtime.errors import CalibrationError
from zoo import GQA

KINDS = ("heads", "kv_groups", "queries", "neurons")


@functools.cache
def graph_of(name):
    if name == "bert":
        return in_double(bert_graph())
    if name == "gpt2":
        config = transformers.GPT2Config(n_layer=2, n_head=4, n_embd=16, vocab_size=99, n_positions=64)
        return in_double(capture(randomise(transformers.GPT2Model(config))))
    return in_double(capture(randomise(transformers.LlamaForCausalLM(transformers.LlamaConfig(**GQA)))))


def plan_of(graph, *kinds, share=2):
    groups = groups_of(graph, *(kinds or KINDS))
    return PrunePlan.keep_all(graph, groups).keeping({g.name: range(0, g.size - g.size % share, share) for g in groups})


def cut_by(graph, plan):
    cut = graph.copy()
    run_passes(cut, [Prune(plan)])
    return cut


def batches_of(graph, count=4, rows=8, length=9, first=0):
    made = [text_batch(rows, length, seed=i) for i in range(first, first + count)]
    names = set(graph.inputs)
    return check_batches(graph, [{k: v for k, v in b.items() if k in names} for b in made])


class Values(fx.Interpreter):
    """Every node's value by name."""

    def __init__(self, graph, batch):
        super().__init__(graph.module, garbage_collect_values=False)
        self.seen = {}
        with torch.no_grad():
            self.run(*(batch.inputs[n] for n in graph.inputs))

    def run_node(self, n):
        self.seen[n.name] = result = super().run_node(n)
        return result


def sum_after(node):
    """Where the layer's output meets the residual stream."""
    user = next(iter(node.users))
    return user if is_call(user, torch.ops.aten.add.Tensor) else sum_after(user)


def brute_force(dense, cut, batches, widths, damp):
    """Tune by building A: one column a unit, its rows all positions and outputs. Returns the scales by weight."""
    scales = {}
    whole = [Values(dense, batch).seen for batch in batches]
    nodes = {str(x.target): n for n in cut.nodes for x in n.all_input_nodes if x.op == "get_attr"}
    for weight, width in widths.items():
        node = nodes[weight]
        transposed = not is_call(node, torch.ops.aten.linear.default)
        seen = source(node, 1 if is_call(node, torch.ops.aten.addmm.default) else 0)
        held = cut.tensor(weight).detach()
        matrix = held.T if transposed else held
        columns, missing = [], []
        for batch, theirs in zip(batches, whole, strict=True):
            mine = Values(cut, batch).seen
            real = batch.mask.flatten() != 0
            rows = lambda v, real=real: v.reshape(-1, v.shape[-1])[real]
            total = sum_after(node).name
            missing.append(rows(theirs[total] - mine[total]).flatten())
            x = rows(mine[seen.name])
            units = range(matrix.shape[1] // width)
            parts = [slice(u * width, (u + 1) * width) for u in units]
            columns.append(torch.stack([(x[:, p] @ matrix[:, p].T).flatten() for p in parts], 1))
        a, b = torch.cat(columns), torch.cat(missing)
        count = a.shape[1]
        a = torch.cat([a, damp * torch.eye(count, dtype=a.dtype)])
        b = torch.cat([b, b.new_zeros(count)])
        scales[weight] = 1 + torch.linalg.lstsq(a, b[:, None]).solution[:, 0]
        new = matrix * scales[weight].repeat_interleave(width)
        cut.set_tensor(weight, nn.Parameter((new.T if transposed else new).contiguous()))
    return scales


WIDTHS = {
    "bert": {
        f"encoder.layer.{i}.{name}.weight": n
        for i in range(2) for name, n in (("attention.output.dense", 8), ("output.dense", 1))
    },
    "gpt2": {f"h.{i}.{name}.c_proj.weight": n for i in range(2) for name, n in (("attn", 4), ("mlp", 1))},
    "llama": {
        f"model.layers.{i}.{name}.weight": n for i in range(2) for name, n in (("self_attn.o_proj", 8), ("mlp.down_proj", 1))
    },
}  # fmt: skip


@pytest.mark.parametrize(("name", "damp"), [("bert", 1.0), ("bert", 30.0), ("gpt2", 1.0), ("llama", 1.0)])
def test_it_is_the_damped_least_squares_solution(name, damp):
    """Heads of several columns, query heads of KV groups, gated neurons, transposed weights; layer after layer."""
    graph = graph_of(name)
    plan, batches = plan_of(graph), batches_of(graph)
    want, got = cut_by(graph, plan), cut_by(graph, plan)
    scales = brute_force(graph, want, batches, WIDTHS[name], damp)
    tune = TuneMasks(graph, batches, plan, damp=damp, largest=1e9)
    assert run_passes(got, [tune])[0].rewrites == len(scales) == 4
    assert all((s - 1).abs().max() > 1e-3 for s in scales.values())
    for weight in scales:
        assert torch.allclose(got.tensor(weight), want.tensor(weight), rtol=1e-6, atol=1e-8), weight
    assert largest_error(want.run(batches[0].inputs), got.run(batches[0].inputs)) < 1e-7
    assert not got.refusals


@pytest.mark.parametrize(("kinds", "count"), [(("kv_groups", "queries"), 4), (("kv_groups",), 2)])
def test_units_are_those_of_the_plan(kinds, count):
    """Two KV groups of two query heads: a scale for each query head, or where queries are not planned for each group."""
    graph = graph_of("llama")
    groups = groups_of(graph, *kinds)
    cut_groups = {g.name: range(2) for g in groups if g.kind == "kv_groups"}
    plan = PrunePlan.keep_all(graph, groups).keeping(cut_groups)
    got = cut_by(graph, plan)
    name = "model.layers.1.self_attn.o_proj.weight"
    before = got.tensor(name).detach()
    run_passes(got, [TuneMasks(graph, batches_of(graph, 3), plan, largest=1e9)])
    scales = (got.tensor(name).detach() / before).unflatten(1, (4, 8))
    assert scales.std((0, 2)).max() < 1e-9
    assert len(scales[0, :, 0].unique()) == count


def test_the_layers_outputs_come_closer_and_so_do_the_models():
    graph = graph_of("bert")
    plan = plan_of(graph)
    hard, soft = cut_by(graph, plan), cut_by(graph, plan)
    run_passes(soft, [TuneMasks(graph, batches_of(graph, 12), plan, largest=1e9)])
    (held_out,) = batches_of(graph, 1, 16, first=99)
    want = graph.run(held_out.inputs)["last_hidden_state"]
    distance = lambda g: (g.run(held_out.inputs)["last_hidden_state"] - want)[held_out.mask != 0].norm()
    assert distance(soft) < 0.9 * distance(hard)


def test_a_soft_mask_in_the_weights_is_one_at_the_gate():
    """`fold_scales` against the same numbers multiplied at the gates of the dense graph."""
    graph = graph_of("bert")
    generator = torch.Generator().manual_seed(0)
    gated = gate(graph, [g.name for g in groups_of(graph)])
    scales = {g.name: torch.rand(g.size, generator=generator, dtype=torch.float64) * 3 - 1 for g in gated.groups}
    folded = graph.copy()
    for group, weight, width in zip(gated.groups, WIDTHS["bert"], (8, 1) * 2, strict=True):
        fold_scales(folded, DenseLayer(weight, None, 0, False), scales[group.name].repeat_interleave(width)[None])
    inputs = batches_of(graph, 1)[0].inputs
    assert largest_error(gated.run(inputs, scales), folded.run(inputs)) < 1e-12
    assert largest_error(graph.run(inputs), folded.run(inputs)) > 1e-2


def test_single_precision_agrees():
    graph, wide = bert_graph(), graph_of("bert")
    got, want = cut_by(graph, plan_of(graph)), cut_by(wide, plan_of(wide))
    run_passes(got, [TuneMasks(graph, batches_of(graph), plan_of(graph), largest=1e9)])
    run_passes(want, [TuneMasks(wide, batches_of(wide), plan_of(wide), largest=1e9)])
    for weight in WIDTHS["bert"]:
        assert got.tensor(weight).dtype == torch.float32
        assert torch.allclose(got.tensor(weight).double(), want.tensor(weight), rtol=1e-2, atol=1e-3)


def test_an_extreme_scale_ends_the_tuning_and_says_so():
    graph = graph_of("bert")
    plan, batches = plan_of(graph), batches_of(graph)
    free = cut_by(graph, plan)
    worst = [float(s.abs().max()) for s in brute_force(graph, free, batches, WIDTHS["bert"], 1.0).values()]
    # The first layer that has a larger scale than all before it ends the tuning.
    last = next(i for i in range(1, 4) if worst[i] > max(worst[:i]))
    limit = max(worst[:last]) + 1e-6
    cut, hard = cut_by(graph, plan), cut_by(graph, plan)
    assert run_passes(cut, [TuneMasks(graph, batches, plan, largest=limit)])[0].rewrites == last
    names = list(WIDTHS["bert"])
    assert all(torch.allclose(cut.tensor(w), free.tensor(w)) for w in names[:last])
    assert all(torch.equal(cut.tensor(w), hard.tensor(w)) for w in names[last:])
    why = f"a scale of {worst[last]:.3g} at {names[last]} passes {limit:g}: tuning ends there"
    assert [(r.by, r.why) for r in cut.refusals] == [("TuneMasks", why)] * (4 - last)


def test_units_that_are_never_on_keep_a_mask_of_one():
    graph = mlp_graph(neurons=16)
    for name in ("up.weight", "up.bias"):
        tensor = graph.tensor(name).detach().clone()
        tensor[:2] = -5
        graph.set_tensor(name, nn.Parameter(tensor))
    (group,) = groups_of(graph)
    plan = PrunePlan.keep_all(graph, [group]).keeping({group.name: range(12)})
    cut = cut_by(graph, plan)
    before = cut.tensor("down.weight").detach()
    x = [Batch({"x": torch.rand(40, 12)}) for _ in range(3)]
    for damp in (0.0, 1.0):
        run_passes(cut, [TuneMasks(graph, x, plan, damp=damp, largest=1e9)])
        assert torch.equal(cut.tensor("down.weight")[:, :2], before[:, :2])
        assert not torch.equal(cut.tensor("down.weight")[:, 2:], before[:, 2:])


def test_padding_that_the_plan_adds_stays_zero():
    graph = graph_of("bert")
    plan = plan_of(graph, share=3)
    wide = PrunePlan(
        plan.model, tuple(g.__class__(g.name, g.kind, g.size, g.kept, g.members, len(g.kept) + 2) for g in plan.groups)
    )
    batches = batches_of(graph)
    narrow, padded = cut_by(graph, plan), cut_by(graph, wide)
    run_passes(narrow, [TuneMasks(graph, batches, plan, largest=1e9)])
    run_passes(padded, [TuneMasks(graph, batches, wide, largest=1e9)])
    assert padded.tensor("encoder.layer.0.output.dense.weight").shape[1] == 18
    assert largest_error(narrow.run(batches[0].inputs), padded.run(batches[0].inputs)) < 1e-9


def test_a_dense_graph_has_nothing_to_tune():
    graph = graph_of("bert")
    plan = PrunePlan.keep_all(graph, groups_of(graph))
    assert TuneMasks(graph, batches_of(graph, 1), plan)(graph.copy()) == 0


class Shared(nn.Module):
    """The same two layers twice."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 20), nn.Linear(20, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(torch.relu(self.up(x)))
        return self.down(torch.relu(self.up(x)))


def test_shared_weights_are_left_alone_and_named():
    graph = capture(randomise(Shared()), torch.randn(8, 6))
    plan = plan_of(graph, "neurons")
    cut = cut_by(graph, plan)
    assert run_passes(cut, [TuneMasks(graph, [Batch({"x": torch.randn(8, 6)})], plan)])[0].rewrites == 0
    assert {(r.by, r.why) for r in cut.refusals} == {("TuneMasks", "its weight or bias is shared")}


class Joined(nn.Module):
    """Neurons of two layers and the input itself, joined before one layer."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.down = nn.Linear(5, 8), nn.Linear(5, 6), nn.Linear(19, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.cat([torch.relu(self.left(x)), x, torch.tanh(self.right(x))], -1))


def test_columns_of_no_unit_keep_their_weights():
    graph = capture(randomise(Joined().double()), torch.randn(2, 5, dtype=torch.float64))
    plan = plan_of(graph, "neurons")
    cut = cut_by(graph, plan)
    before = cut.tensor("down.weight").detach()
    x = torch.randn(50, 5, dtype=torch.float64)
    assert run_passes(cut, [TuneMasks(graph, [Batch({"x": x})], plan, damp=2.0, largest=1e9)])[0].rewrites == 1
    left, right = (
        f(x @ graph.tensor(f"{n}.weight")[::2].T + graph.tensor(f"{n}.bias")[::2])
        for n, f in (("left", torch.relu), ("right", torch.tanh))
    )
    seen = torch.cat([left, x, right], 1).detach()
    mine = seen @ before.T + graph.tensor("down.bias")
    units = [*range(4), *range(9, 12)]
    a = torch.stack([torch.outer(seen[:, u], before[:, u]).flatten() for u in units], 1)
    a = torch.cat([a, 2 * torch.eye(7, dtype=a.dtype)])
    b = torch.cat([(graph.run({"x": x})["output"] - mine).detach().flatten(), torch.zeros(7, dtype=a.dtype)])
    want = before.clone()
    want[:, units] *= 1 + torch.linalg.lstsq(a, b[:, None]).solution[:, 0]
    assert torch.allclose(cut.tensor("down.weight"), want, rtol=1e-7)
    assert torch.equal(cut.tensor("down.weight")[:, 4:9], before[:, 4:9])


class Convolutional(nn.Module):
    """Channels between two convolutions in groups."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Conv1d(6, 12, 3, padding=1), nn.Conv1d(12, 6, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


def test_a_channel_of_a_convolution_has_one_scale_for_its_whole_window():
    graph = capture(randomise(Convolutional().double()), torch.randn(2, 6, 10, dtype=torch.float64))
    plan = plan_of(graph, "neurons")
    cut = cut_by(graph, plan)
    before = cut.tensor("down.weight").detach()
    x = torch.randn(8, 6, 10, dtype=torch.float64)
    assert run_passes(cut, [TuneMasks(graph, [Batch({"x": x})], plan, largest=1e9)])[0].rewrites == 1
    hidden = torch.relu(
        nn.functional.conv1d(x, graph.tensor("up.weight")[::2], graph.tensor("up.bias")[::2], padding=1)
    )
    alone = [nn.functional.conv1d(hidden[:, u : u + 1], before[:, u : u + 1], padding=1) for u in range(6)]
    a = torch.stack([y.flatten() for y in alone], 1).detach()
    target = graph.run({"x": x})["output"] - x - graph.tensor("down.bias")[:, None]
    a = torch.cat([a, torch.eye(6, dtype=a.dtype)])
    b = torch.cat([target.detach().flatten(), torch.ones(6, dtype=a.dtype)])
    want = torch.linalg.lstsq(a, b[:, None]).solution[:, 0]
    assert torch.allclose(cut.tensor("down.weight"), before * want[:, None], rtol=1e-6)


def test_processes_that_share_the_batches_agree(monkeypatch):
    graph = graph_of("bert")
    plan, batches = plan_of(graph), batches_of(graph, 5)

    def tuned():
        cut = cut_by(graph, plan)
        run_passes(cut, [TuneMasks(graph, batches, plan, largest=1e9)])
        return [cut.tensor(w) for w in WIDTHS["bert"]]

    alone = tuned()
    for shared in simulate_processes(monkeypatch, 2, tuned):
        assert all(torch.allclose(a, b, rtol=1e-8) for a, b in zip(alone, shared, strict=True))


def test_activations_that_are_not_finite_are_named():
    graph = mlp_graph()
    plan = plan_of(graph, "neurons")
    cut = cut_by(graph, plan)
    x = torch.randn(4, 12)
    x[0, 0] = float("inf")
    with pytest.raises(CalibrationError, match=r"activations at down\.weight are not finite"):
        TuneMasks(graph, [Batch({"x": x})], plan)(cut)
