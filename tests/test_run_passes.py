"""The pass runner: counts, cleaning, propagation, and numbers that must not change."""

from dataclasses import dataclass

import pytest
import torch

from checks import mlp_graph
from tilecut_passes.graph import is_call
from tilecut_passes.run_passes import Pass, largest_error, run_passes
from tilecut_runtime.errors import VerificationError

aten = torch.ops.aten


@dataclass(frozen=True)
class Swap:
    """relu becomes another op; what is left over is dead code."""

    op: object

    def __call__(self, graph):
        count = 0
        for node in list(graph.nodes):
            if is_call(node, aten.relu.default):
                with graph.fx.inserting_before(node):
                    new = graph.fx.call_function(self.op, node.args)
                node.replace_all_uses_with(new)
                count += 1
        return count


def test_rewrites_are_counted_and_cleaned_up_after():
    graph = mlp_graph()
    (record,) = run_passes(graph, [Swap(aten.gelu.default)])
    assert (record.name, record.rewrites) == ("Swap", 1)
    assert not any(is_call(n, aten.relu.default) for n in graph.nodes)
    assert all("val" in n.meta for n in graph.nodes if n.op != "output")
    assert isinstance(Swap(None), Pass)


def test_a_pass_that_changes_numbers_is_caught():
    x = {"x": torch.randn(3, 12)}
    with pytest.raises(VerificationError, match="Swap: the pass changed the model's outputs; got relative error"):
        run_passes(mlp_graph(), [Swap(aten.gelu.default)], check=x)
    run_passes(mlp_graph(), [Swap(aten.relu.default)], check=x)


def test_a_size_that_does_not_fit_raises_where_it_is_propagated():
    graph = mlp_graph()
    graph.set_tensor("up.bias", torch.nn.Parameter(torch.zeros(7)))
    with pytest.raises(RuntimeError):
        run_passes(graph, [Swap(aten.gelu.default)])


def test_errors_are_relative_and_nan_is_infinite():
    a = {"y": torch.tensor([100.0, 1.0])}
    assert largest_error(a, {"y": torch.tensor([101.0, 1.0])}) == pytest.approx(0.01)
    assert largest_error(a, {"y": torch.tensor([float("nan"), 1.0])}) == float("inf")
    assert largest_error(a, {"y": torch.ones(3)}) == float("inf")
    assert largest_error({"i": torch.tensor([1])}, {"i": torch.tensor([2])}) == float("inf")
