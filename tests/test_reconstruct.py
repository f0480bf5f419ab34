"""The refit against least squares in float64, and what it repairs."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, fx, nn

from checks import bert_graph, mlp_graph, random_plan, randomise, text_batch
from refit_models import PLAIN, cut_by, distance, half, llama_graph, mixtral_graph, plain_graph, plain_inputs
from simulate_processes import simulate_processes
from tilecut_passes import reconstruct as subject
from tilecut_passes.calibration import check_batches
from tilecut_passes.capture import capture
from tilecut_passes.graph import Graph
from tilecut_passes.plan import PrunePlan
from tilecut_passes.reconstruct import Reconstruct
from tilecut_passes.run_passes import largest_error, run_passes
from tilecut_passes.solve_layer import BIAS_PENALTY
from tilecut_runtime.errors import CalibrationError

RIDGE = 1e-2


def refitted(dense, plan, batches, of=None, **options):
    """A cut and refitted copy, and how many layers were solved; `of`: the plan that the pass is not told."""
    cut = cut_by(dense, of or plan)
    count = run_passes(cut, [Reconstruct(dense, check_batches(dense, batches), plan, **options)])[0].rewrites
    return cut, count


class Values(fx.Interpreter):
    """Every node's value, by name."""

    def __init__(self, graph: Graph, inputs: dict[str, Tensor]):
        super().__init__(graph.module, garbage_collect_values=False)
        with torch.no_grad():
            self.run(*(inputs[name] for name in graph.inputs))

    def __getitem__(self, name: str) -> Any:
        return next(v for n, v in self.env.items() if n.name == name)


def lstsq(x, target, weight, bias):
    """The minimum of || x W^T + b - T ||^2 + lambda || W - W0 ||^2 from stacked rows, in float64."""
    x, target, weight = x.double(), target.double(), weight.double()
    penalty = (RIDGE * x.square().sum(0).mean()).sqrt()
    rows = [x, penalty * torch.eye(x.shape[1], dtype=torch.float64)]
    wanted = [target, penalty * weight.T]
    if bias is not None:
        one = (BIAS_PENALTY * len(x)) ** 0.5
        rows = [F.pad(rows[0], (0, 1), value=1.0), F.pad(rows[1], (0, 1)), F.pad(x.new_tensor([[one]]), (x.shape[1], 0))]
        wanted.append(one * bias.double()[None])
    found = torch.linalg.lstsq(torch.cat(rows), torch.cat(wanted), driver="gelsd").solution
    return (found.T, None) if bias is None else (found[:-1].T, found[-1])


def columns_of(x, conv, groups):
    """Rows [N, g, I * k] that a convolution of one or two dimensions multiplies."""
    if x.ndim == 3:
        x, kernel, stride, padding = x[:, :, None], (1, conv[0]), (1, conv[1]), (0, conv[2])
    else:
        kernel, stride, padding = conv
    columns = F.unfold(x, kernel, padding=padding, stride=stride).transpose(1, 2)
    return columns.reshape(-1, groups, columns.shape[-1] // groups)


# Model, parameter, node, its input, the dense outputs that stay; for convolutions kernel, stride, padding and groups.
LAYERS = (
    ("gated", "down", "linear_2", "mul", range(12), None, 1),
    ("transposed", "c", "matmul", "relu", range(8), None, 1),
    ("transposed", "d", "matmul_1", "relu_1", range(12), None, 1),
    # What is cut is a channel of each of the groups that read it.
    ("conv1d", "second", "conv1d_1", "relu", (0, 1, 4, 5, 8, 9), (4, 2, 1), 1),
    ("conv1d", "third", "conv1d_2", "relu_1", (0, 1, 2, 6, 7, 8, 12, 13, 14), (3, 1, 0), 3),
    ("conv1d", "fourth", "conv1d_3", "relu_2", range(6), (3, 1, 1), 3),
    ("conv2d", "second", "conv2d_1", "relu", range(5), ((3, 2), (2, 1), 0), 1),
)


@pytest.mark.parametrize(("model", "name", "node", "x", "stay", "window", "groups"), LAYERS)
def test_it_is_the_least_squares_solution(model, name, node, x, stay, window, groups):
    dense = plain_graph(model)
    plan = half(dense)
    batches = [plain_inputs(seed) for seed in (1, 2, 3)]
    before = cut_by(dense, plan)
    after, _ = refitted(dense, plan, batches, ridge=RIDGE)
    held = [n for n in (name, f"{name}.weight", f"{name}.bias") if n in after.tensors]
    start, got = ([g.tensor(n).detach() for n in held] for g in (before, after))
    runs = [(Values(dense, b), Values(after, b)) for b in batches]
    wanted, seen = torch.cat([d[node] for d, _ in runs]), torch.cat([p[x] for _, p in runs])
    if window is None:
        rows, wanted = seen.reshape(-1, 1, seen.shape[-1]), wanted[..., list(stay)]
        start[0], got[0] = ((t.T if name == "c" else t) for t in (start[0], got[0]))
    else:
        rows, wanted = columns_of(seen, window, groups), wanted.movedim(1, -1)[..., list(stay)]
    outputs = len(stay) // groups
    wanted = wanted.reshape(-1, groups, outputs)
    for g in range(groups):
        here = slice(g * outputs, (g + 1) * outputs)
        bias = start[1][here] if len(start) > 1 else None
        matrix, offset = lstsq(rows[:, g], wanted[:, g], start[0][here].flatten(1), bias)
        assert torch.allclose(got[0][here].flatten(1).double(), matrix, atol=2e-4)
        assert offset is None or torch.allclose(got[1][here].double(), offset, atol=2e-4)
        assert not torch.allclose(got[0][here], start[0][here], atol=1e-2), "it has moved"


def test_the_target_is_the_dense_output_less_what_the_residual_has_moved_by():
    dense = bert_graph()
    plan = half(dense)
    batches = [text_batch(16, 30, seed=i) for i in range(4)]
    before, (after, _) = cut_by(dense, plan), refitted(dense, plan, batches, ridge=RIDGE)
    name = "encoder.layer.1.output.dense"
    node = next(n for n in after.nodes if f"{name}.weight" in [str(x.target) for x in n.all_input_nodes])
    (added,) = node.users
    (residual,) = (n for n in added.all_input_nodes if n is not node)
    (read,) = (n for n in node.all_input_nodes if n.op == "call_function")
    seen, wanted = [], []
    for batch in batches:
        d, p, real = Values(dense, batch), Values(after, batch), batch["attention_mask"] != 0
        seen.append(p[read.name][real])
        wanted.append((d[node.name] - (p[residual.name] - d[residual.name]))[real])
    start, bias = (before.tensor(f"{name}.{part}").detach() for part in ("weight", "bias"))
    matrix, offset = lstsq(torch.cat(seen), torch.cat(wanted), start, bias)
    assert torch.allclose(after.tensor(f"{name}.weight").detach().double(), matrix, atol=2e-4)
    assert torch.allclose(after.tensor(f"{name}.bias").detach().double(), offset, atol=2e-3)


@pytest.mark.parametrize("model", ["experts", "dense experts"])
def test_every_expert_is_solved_over_its_rows(model):
    dense = plain_graph(model)
    plan = half(dense)
    batches = [plain_inputs(seed) for seed in (1, 2, 3)]
    before = cut_by(dense, plan)
    after, count = refitted(dense, plan, batches, ridge=RIDGE)
    assert count == 1 and not after.refusals
    x = torch.cat([b["x"] for b in batches]).reshape(-1, 12)
    if model == "experts":
        expert = F.linear(x, dense.tensor("router.weight"), dense.tensor("router.bias")).argmax(-1)
        rows = [x[expert == e] for e in range(3)]
        matrix_of = lambda graph, e: graph.tensor("down")[e]
    else:
        rows = [x] * 3
        matrix_of = lambda graph, e: graph.tensor("down")[e].T
    for e in range(3):
        seen = torch.relu(rows[e] @ after.tensor("up")[e])
        target = torch.relu(rows[e] @ dense.tensor("up")[e]) @ matrix_of(dense, e).T
        matrix, _ = lstsq(seen.detach(), target.detach(), matrix_of(before, e).detach(), None)
        assert torch.allclose(matrix_of(after, e).detach().double(), matrix, atol=2e-4)


def texts(seed):
    generator = torch.Generator().manual_seed(seed)
    # Few different tokens: what calibration has seen comes again.
    ids = torch.randint(0, 20, (16, 24), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize(
    ("graph", "kinds", "inputs"),
    [
        *((lambda name=name: plain_graph(name), ("neurons",), plain_inputs) for name in PLAIN),
        (bert_graph, ("heads",), lambda seed: text_batch(16, 24, seed)),
        (bert_graph, ("neurons",), lambda seed: text_batch(16, 24, seed)),
        (llama_graph, ("kv_groups",), texts),
        (llama_graph, ("queries",), texts),
        (llama_graph, ("neurons",), texts),
        (mixtral_graph, ("neurons",), texts),
        (mixtral_graph, ("kv_groups", "neurons"), texts),
    ],
    ids=(
        *PLAIN, "heads", "neurons", "kv_groups", "queries", "gated neurons", "experts of a router",
        "kv_groups and experts",
    ),
)  # fmt: skip
def test_held_out_outputs_are_nearer_for_every_kind_of_group(graph, kinds, inputs):
    dense = graph()
    plan = half(dense, *kinds)
    held_out = inputs(99)
    before = distance(dense, cut_by(dense, plan), held_out)
    after, count = refitted(dense, plan, [inputs(seed) for seed in range(6)])
    assert count > 0
    assert distance(dense, after, held_out) < 0.85 * before


def test_later_layers_repair_what_earlier_ones_lost():
    """Layers that lost nothing follow too: without a plan, those that lost outputs do not, and the rest is worse."""
    dense = bert_graph()
    plan = half(dense)
    batches, held_out = [text_batch(16, 30, seed=i) for i in range(12)], text_batch(16, 30, seed=99)
    every, count = refitted(dense, plan, batches)
    some, fewer = refitted(dense, None, batches, of=plan)
    # q, k, v and the up-projection of the second layer, and of the first one.
    assert (count, fewer) == (10, 5)
    assert {r.why for r in some.refusals} == {"it lost outputs, and which is not known without the plan"}
    nothing = distance(dense, cut_by(dense, plan), held_out)
    assert distance(dense, every, held_out) < distance(dense, some, held_out) < 0.8 * nothing


def test_units_that_the_rest_can_express_are_repaired_exactly():
    graph = mlp_graph(neurons=10).copy()
    for name in ("up.weight", "up.bias"):
        tensor = graph.tensor(name).detach().clone()
        tensor[8], tensor[9] = tensor[0], tensor[1]
        graph.set_tensor(name, nn.Parameter(tensor))
    plan = half(graph)
    plan = plan.keeping({plan.groups[0].name: range(8)})
    x = {"x": torch.randn(200, 12)}
    assert largest_error(graph.run(x), cut_by(graph, plan).run(x)) > 1e-2
    after, _ = refitted(graph, plan, [x], ridge=1e-7)
    assert largest_error(graph.run(x), after.run(x)) < 1e-3


def test_padded_units_stay_zero():
    """A sigmoid makes 0.5 of a padded neuron: a fit that saw it would use it as a bias."""

    class Sigmoid(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 3)
            self.top, self.last = nn.Linear(3, 20), nn.Linear(20, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.sigmoid(self.top(self.down(torch.sigmoid(self.up(x))))))

    dense = capture(randomise(Sigmoid()), torch.randn(4, 12))
    plan = half(dense)
    plan = PrunePlan(plan.model, tuple(g for g in plan.groups if g.size == 20), tensors=plan.tensors)
    padded = PrunePlan(plan.model, tuple(_padded(g) for g in plan.groups), tensors=plan.tensors)
    batches = [{"x": torch.randn(200, 12)}]
    (plain, _), (after, count) = refitted(dense, plan, batches), refitted(dense, padded, batches)
    assert count == 3
    for name, shape in (("up.weight", (12, 12)), ("down.weight", (3, 12)), ("top.weight", (12, 3))):
        got, want = after.tensor(name), plain.tensor(name)
        assert got.shape == shape
        kept = got[: want.shape[0], : want.shape[1]]
        assert torch.allclose(kept, want, atol=1e-3)
        assert got.detach().count_nonzero() == kept.detach().count_nonzero()
    assert after.tensor("top.bias").detach()[10:].count_nonzero() == 0


def _padded(group):
    return type(group)(group.name, group.kind, group.size, group.kept, group.members, len(group.kept) + 2)


def test_padding_does_not_count():
    graph = bert_graph()
    plan = half(graph)
    short = [text_batch(8, 12, seed=i) for i in range(4)]
    padded = [{k: F.pad(v, (0, 7), value=int(k == "input_ids")) for k, v in b.items()} for b in short]
    a, b = (refitted(graph, plan, batches)[0] for batches in (short, padded))
    assert largest_error(a.run(short[0]), b.run(short[0])) < 1e-3


def test_a_dense_graph_has_nothing_to_refit():
    graph = mlp_graph()
    assert Reconstruct(graph, check_batches(graph, [{"x": torch.randn(4, 12)}]))(graph.copy()) == 0


def test_layers_before_the_first_cut_stay():
    dense = bert_graph()
    groups = [g for g in half(dense).groups if "layer.1" in g.name]
    plan = PrunePlan(half(dense).model, tuple(groups), tensors=half(dense).tensors)
    before, (after, _) = cut_by(dense, plan), refitted(dense, plan, [text_batch(8, 12)])
    changed = {n for n, t in after.tensors.items() if not torch.equal(t, before.tensor(n))}
    parts = ("attention.output.dense", "intermediate.dense", "output.dense")
    layers = [*(f"encoder.layer.1.{part}" for part in parts), "pooler.dense"]
    assert changed == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


def test_a_second_run_moves_the_weights_less_and_does_no_harm():
    dense = bert_graph()
    plan = half(dense)
    batches, held_out = [text_batch(16, 24, seed=i) for i in range(6)], text_batch(16, 24, seed=99)
    start, (once, _) = cut_by(dense, plan), refitted(dense, plan, batches)
    twice = once.copy()
    run_passes(twice, [Reconstruct(dense, check_batches(dense, batches), plan)])

    def moved(a, b):
        return sum(float((a.tensor(n) - b.tensor(n)).detach().square().sum()) for n in a.tensors)

    assert moved(once, twice) < 0.5 * moved(start, once)
    assert distance(dense, twice, held_out) < 1.02 * distance(dense, once, held_out)


@pytest.mark.parametrize("graph", [bert_graph, mixtral_graph], ids=("bert", "mixtral"))
def test_one_batch_of_all_rows_gives_what_many_small_ones_give(graph, monkeypatch):
    dense = graph()
    plan = half(dense)
    many = [text_batch(4, 24, seed=i) for i in range(6)]
    many = [{k: v for k, v in b.items() if k in dense.inputs} for b in many]
    one = {k: torch.cat([b[k] for b in many]) for k in many[0]}
    whole, _ = refitted(dense, plan, [one])
    monkeypatch.setattr(subject, "EQUATIONS_BYTES", 1)
    parts, _ = refitted(dense, plan, many)
    assert largest_error(whole.run(many[0]), parts.run(many[0])) < 1e-3


def test_on_disk_it_is_the_same(tmp_path):
    dense = llama_graph()
    plan = half(dense)
    batches = [texts(seed) for seed in range(3)]
    (here, _), (there, _) = refitted(dense, plan, batches), refitted(dense, plan, batches, offload=tmp_path)
    assert all(torch.equal(t, there.tensor(n)) for n, t in here.tensors.items())
    assert not list(tmp_path.iterdir())


def test_two_processes_give_what_one_gives(monkeypatch):
    dense = bert_graph()
    plan = half(dense)
    batches = [text_batch(8, 12, seed=i) for i in range(5)]
    alone, _ = refitted(dense, plan, batches)
    for shared, count in simulate_processes(monkeypatch, 2, lambda: refitted(dense, plan, batches)):
        assert count == 10
        assert all(torch.allclose(t, shared.tensor(n), atol=1e-4) for n, t in alone.tensors.items())


def test_weights_that_are_not_finite_are_named():
    dense = mlp_graph().copy()
    weight = dense.tensor("up.weight").detach().clone()
    weight[0, 0] = float("inf")
    dense.set_tensor("up.weight", nn.Parameter(weight))
    with pytest.raises(CalibrationError, match=r"reconstruct: the values of up\.weight are not finite"):
        refitted(dense, half(dense), [{"x": torch.randn(4, 12)}])


def test_activations_that_are_not_finite_are_named():
    dense = mlp_graph().copy()
    dense.set_tensor("up.weight", nn.Parameter(dense.tensor("up.weight").detach() * 1e25))
    with pytest.raises(CalibrationError, match=r"reconstruct: activations at down\.weight are not finite"):
        refitted(dense, half(dense), [{"x": torch.randn(4, 12)}])


class Shared(nn.Module):
    """The same two layers twice."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 20), nn.Linear(20, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(torch.relu(self.up(x)))
        return self.down(torch.relu(self.up(x)))


def test_what_is_not_refitted_is_said():
    dense = capture(randomise(Shared()), torch.randn(8, 6))
    after, count = refitted(dense, random_plan(dense, 1, "neurons"), [{"x": torch.randn(8, 6)}])
    assert count == 0
    assert {(r.by, r.why) for r in after.refusals} == {("Reconstruct", "its weight or bias is shared")}


def test_experts_that_see_too_few_rows_stay():
    dense = plain_graph("experts").copy()
    # One expert that nothing is sent to.
    bias = dense.tensor("router.bias").detach().clone()
    bias[1] = -1e4
    dense.set_tensor("router.bias", nn.Parameter(bias))
    plan = half(dense)
    before, (after, _) = cut_by(dense, plan), refitted(dense, plan, [plain_inputs(1)])
    same = [torch.equal(before.tensor("down")[e], after.tensor("down")[e]) for e in range(3)]
    assert same == [False, True, False]
    (refusal,) = after.refusals
    assert refusal.why == "experts 1 of 3 saw fewer rows than they have inputs (5): left as they are"


def test_transposed_weights_are_refitted_too():
    """GPT-2 keeps its weights as [I, O] and calls addmm on flattened rows; its head is tied to the embedding."""
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=64)
    dense = capture(randomise(transformers.GPT2LMHeadModel(config)))
    ids = [torch.randint(0, 50, (8, 20), generator=torch.Generator().manual_seed(i)) for i in range(5)]
    batches = [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids]
    plan = half(dense)
    after, count = refitted(dense, plan, batches[:-1])
    assert count == 7
    assert [r.why for r in after.refusals] == ["its weight or bias is shared"]
    before = distance(dense, cut_by(dense, plan), batches[-1])
    assert distance(dense, after, batches[-1]) < 0.7 * before
