"""Running node by node is running; what waits on disk is what was held; choices can be another run's."""

import pytest
import torch
from torch import nn

from checks import bert_graph, randomise, text_batch
from refit_models import mixtral_graph
from tilecut_passes.calibration import Batch
from tilecut_passes.capture import capture
from tilecut_passes.disk_tensor import DiskTensors, WaitingTensors, is_mapped
from tilecut_passes.graph import is_call
from tilecut_passes.step_graph import Schedule, Stepper, find_choices

aten = torch.ops.aten


def stops(graph):
    return [n.name for n in graph.nodes if is_call(n, aten.linear.default)]


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_it_computes_is_what_the_graph_computes(on_disk, tmp_path):
    graph = bert_graph()
    inputs = text_batch(3, 7)
    run = Stepper(Schedule(graph), Batch(inputs))
    waiting = WaitingTensors(DiskTensors(tmp_path), limit=0)
    for name in stops(graph):
        run.run_to(name, inclusive=False)
        assert run.node(name) not in run.values
        if on_disk:
            run.wait(waiting, {t.untyped_storage().data_ptr() for t in inputs.values()})
            floating = [v for v in run.values.values() if isinstance(v, torch.Tensor) and v.is_floating_point()]
            assert floating and all(is_mapped(v) for v in floating)
    (last,) = [r for r, name in zip(graph.results, graph.outputs, strict=True) if name == "pooler_output"]
    run.run_to(last.name, inclusive=True)
    assert torch.equal(run.read(last), graph.run(inputs)["pooler_output"])


def test_only_what_is_still_read_is_kept():
    graph = bert_graph()
    run = Stepper(Schedule(graph), Batch(text_batch(2, 5)))
    most = 0
    for name in stops(graph):
        run.run_to(name, inclusive=True)
        run._forget(run.at)
        most = max(most, len(run.values))
        later = {x for n in run.schedule.nodes[run.at :] for x in n.all_input_nodes}
        assert set(run.values) <= later
    assert most < 12


def test_a_changed_weight_is_seen_through_its_transpose():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.empty(5, 4)), nn.Parameter(torch.empty(3, 5))

        def forward(self, x):
            transposed = self.b.T
            return torch.relu(x @ self.a.t()) @ transposed

    graph = capture(randomise(Model()), torch.randn(6, 4)).copy()
    x = {"x": torch.randn(6, 4)}
    run = Stepper(Schedule(graph), Batch(x))
    products = [n for n in graph.nodes if is_call(n, aten.matmul.default)]
    run.run_to(products[1].name, inclusive=False)
    graph.set_tensor("b", nn.Parameter(torch.ones(3, 5)))
    run.run_to(products[1].name, inclusive=True)
    assert torch.equal(run.read(products[1]), graph.run(x)["output"])


def test_choices_are_found_among_what_changed():
    graph = mixtral_graph()
    nodes = list(graph.nodes)
    found = find_choices(graph, nodes)
    names = {str(n.target) for n in nodes if n.name in found}
    assert {"aten.topk.default", "aten.sort.default", "aten.floor_divide.default", "aten.cumsum.default"} <= names
    assert not names & {"aten.linear.default", "aten.softmax.int", "tilecut.grouped_matmul.default"}
    assert find_choices(graph, []) == frozenset()


def test_a_run_that_follows_sends_rows_where_the_other_does():
    """With another router the experts' rows are others, unless the choices are taken over."""
    dense = mixtral_graph()
    other = dense.copy()
    router = next(n for n in dense.tensors if n.endswith("mlp.gate.weight"))
    other.set_tensor(router, nn.Parameter(-dense.tensor(router).detach()))
    follow = find_choices(other, list(other.nodes))
    (first, *_) = [n for n in dense.nodes if is_call(n, torch.ops.tilecut.grouped_matmul.default)]
    batch = Batch(
        {"input_ids": torch.randint(0, 99, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    )
    leader, follower, loner = (
        Stepper(Schedule(graph, follow), batch) for graph in (dense, other, other)
    )
    leader.run_to(first.name, inclusive=True)
    follower.run_to(first.name, inclusive=True, choices=leader.choices)
    loner.run_to(first.name, inclusive=True)
    x = [run.read(run.node(first.name).args[0]) for run in (leader, follower, loner)]
    assert torch.equal(x[0], x[1]) and not torch.equal(x[0], x[2])


def test_padding_is_known_behind_a_choice_of_rows():
    class Picks(nn.Module):
        def forward(self, x, order, attention_mask):
            rows = x.reshape(-1, 3)[order]
            return torch.relu(rows) + 1, x[x[..., 0] > 0] * 2, attention_mask

    x = torch.arange(1.0, 25).reshape(2, 4, 3)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 1]])
    order = torch.tensor([7, 6, 0, 5, 4])
    inputs = {"x": x, "order": order, "attention_mask": mask}
    graph = capture(Picks(), inputs)
    run = Stepper(Schedule(graph), Batch(inputs))
    run.run_to([n for n in graph.nodes if n.op == "call_function"][-1].name, inclusive=True)
    rows, picked, _ = graph.results
    assert run.valid(rows).tolist() == [True, False, True, False, True]
    assert run.valid(picked).tolist() == [True] * 5 + [False, False, True]
