"""Graphs exported again: names, dynamic sizes, numbers, and refusals in one line."""

import pytest
import torch
from torch import nn

from checks import encoder_graph, mlp_graph, randomise
from tilecut_passes.capture import capture
from tilecut_passes.run_passes import largest_error
from tilecut_runtime.errors import LoweringError
from tilecut_runtime.manifest import DimRange
from tilecut_targets.export_program import example_inputs, export_program, first_line, named_module


def texts(batch, length):
    ids = torch.randint(0, 50, (batch, length))
    return {"input_ids": ids, "attention_mask": (torch.arange(length) < length // 2 + 1).long().expand(batch, -1)}


@pytest.fixture(scope="module")
def by_name():
    return export_program(encoder_graph())


@pytest.fixture(scope="module")
def by_position():
    return export_program(encoder_graph(), positional=True)


SHAPES = [(1, 1), (1, 9), (2, 7), (5, 40)]


@pytest.mark.parametrize("shape", SHAPES)
def test_by_name_inputs_are_keywords_and_outputs_a_dict(by_name, shape):
    inputs = texts(*shape)
    want = encoder_graph().run(inputs)
    got = by_name.module()(**dict(reversed(inputs.items())))
    assert list(got) == ["hidden", "first"]
    assert largest_error(want, got) < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_by_position_inputs_are_in_order_and_outputs_a_tuple(by_position, shape):
    inputs = texts(*shape)
    want = encoder_graph().run(inputs)
    got = by_position.module()(*inputs.values())
    assert isinstance(got, tuple)
    assert largest_error(want, dict(zip(want, got, strict=True))) < 1e-6


def test_both_keep_dynamic_sizes(by_name, by_position):
    for program in (by_name, by_position):
        ids, mask = (n.meta["val"] for n in program.graph.nodes if n.op == "placeholder" and "p_" not in n.name[:2])
        assert ids.shape == mask.shape and not any(isinstance(s, int) for s in ids.shape)


def test_tensors_keep_their_names_and_are_shared(by_name, by_position):
    graph = encoder_graph()
    assert sorted(by_name.state_dict) == sorted(by_position.state_dict) == sorted(graph.tensors)
    assert by_name.state_dict["q.1.weight"].data_ptr() == graph.tensor("q.1.weight").data_ptr()


def test_the_graph_is_not_changed():
    graph = mlp_graph()
    before = [str(n) for n in graph.nodes], graph.input_specs(), sorted(graph.tensors)
    export_program(graph)
    export_program(graph, positional=True)
    assert before == ([str(n) for n in graph.nodes], graph.input_specs(), sorted(graph.tensors))


class Awkward(nn.Module):
    """Inputs named like Python's own words, which fx renames, and an output that is an input."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, input: torch.Tensor, max: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sum": self.layer(input) + max, "same": max * 1}


def test_inputs_keep_the_callers_names():
    graph = capture(randomise(Awkward()), {"input": torch.randn(3, 4), "max": torch.randn(3, 4)})
    inputs = {"input": torch.randn(2, 4), "max": torch.randn(2, 4)}
    want = graph.run(inputs)
    module = named_module(graph)
    assert largest_error(want, module(**inputs)) == 0
    assert largest_error(want, module(*inputs.values())) == 0
    assert largest_error(want, export_program(graph).module()(**inputs)) < 1e-6
    with pytest.raises(TypeError):
        module(inputs["input"], maximum=inputs["max"])


def test_example_inputs_have_the_graphs_shapes_and_dtypes():
    graph = encoder_graph()
    made = example_inputs(graph)
    assert {k: (tuple(v.shape), v.dtype) for k, v in made.items()} == {
        "input_ids": ((2, 7), torch.int64),
        "attention_mask": ((2, 7), torch.int64),
    }
    assert made["attention_mask"].all()
    assert set(made["input_ids"].unique().tolist()) == {0, 1}
    assert graph.run(made)["hidden"].isfinite().all()


def test_example_inputs_follow_sizes_and_seed():
    graph = encoder_graph()
    made = example_inputs(graph, {"sequence": 31})
    assert made["input_ids"].shape == (2, 31)
    assert torch.equal(made["input_ids"], example_inputs(graph, {"sequence": 31})["input_ids"])
    assert not torch.equal(made["input_ids"], example_inputs(graph, {"sequence": 31}, seed=1)["input_ids"])
    assert example_inputs(mlp_graph())["x"].dtype == torch.float32


class Short(nn.Module):
    """A table of positions that ends before the sizes that examples have by default."""

    def __init__(self, most):
        super().__init__()
        self.places, self.layer = nn.Parameter(torch.zeros(most, 4)), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x + self.places[: x.shape[1]])


@pytest.mark.parametrize("most", [4, 6])
def test_a_short_sequence_limit_is_kept(most):
    graph = capture(randomise(Short(most)), torch.randn(2, 3, 4))
    assert graph.ranges["sequence"] == DimRange(1, most)
    program = export_program(graph)
    assert most in [r.upper for r in program.range_constraints.values()]
    for length in (1, most):
        x = {"x": torch.randn(3, length, 4)}
        assert largest_error(graph.run(x), program.module()(**x)) < 1e-6


def with_op(op):
    """An MLP whose relu is replaced by a function that raises under export."""
    graph = mlp_graph()
    for node in graph.nodes:
        if node.target is torch.ops.aten.relu.default:
            node.target = op
    graph.module.recompile()
    return graph


def silent(x):
    raise AssertionError


def loud(x):
    raise RuntimeError("\nthe first line\nand a page more")


@pytest.mark.parametrize("positional", [False, True])
@pytest.mark.parametrize(("op", "message"), [(silent, "AssertionError: "), (loud, "RuntimeError: the first line")])
def test_a_refusal_is_one_line(op, message, positional):
    with pytest.raises(LoweringError) as caught:
        export_program(with_op(op), positional)
    assert str(caught.value).startswith(f"export_program: torch.export refused the graph: {message}")
    assert "\n" not in str(caught.value)


def test_an_error_in_one_line():
    assert first_line(ValueError()) == "ValueError: no message"
    assert first_line(ValueError("\n a \n b")) == "ValueError: a"
