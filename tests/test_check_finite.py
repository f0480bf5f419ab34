"""What is not finite is named: a weight, the layer that overflows, or the statistic."""

import pytest
import torch
from torch import nn

from checks import bert_graph, mlp_graph, text_batch
from tilecut_passes.calibration import Batch
from tilecut_passes.capture import capture
from tilecut_passes.check_finite import check_finite, check_values, check_weights, first_fault
from tilecut_runtime.errors import CalibrationError


def with_value(graph, name, value):
    changed = graph.copy()
    tensor = graph.tensor(name).detach().clone()
    tensor.flatten()[3] = value
    changed.set_tensor(name, nn.Parameter(tensor))
    return changed


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_faulty_weight_is_named(value):
    graph = with_value(bert_graph(), "encoder.layer.1.attention.self.key.weight", value)
    message = r"encoder\.layer\.1\.attention\.self\.key\.weight are not finite; got 1 of 1024"
    with pytest.raises(CalibrationError, match=message):
        check_weights(graph)


class Masked(nn.Module):
    """-inf in a buffer is a mask."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("mask", torch.tensor([0.0, float("-inf"), 0.0, 0.0]))

    def forward(self, x):
        return (self.layer(x) + self.mask).softmax(-1)


def test_minus_infinity_in_a_mask_is_no_fault():
    graph = capture(Masked(), torch.randn(2, 4))
    check_weights(graph)
    inputs = {"x": torch.randn(2, 4)}
    assert first_fault(graph, inputs) is None
    check_values(graph, inputs, {"anything": torch.ones(3)})


def test_the_layer_that_makes_nan_is_named_by_its_weight():
    graph = with_value(mlp_graph(), "down.weight", float("nan"))
    inputs = {"x": torch.randn(4, 12)}
    assert first_fault(graph, inputs) == "down.weight"
    with pytest.raises(CalibrationError, match=r"activations at down\.weight are not finite"):
        check_values(graph, inputs, {"x": torch.tensor([float("nan")])})


def test_a_statistic_that_overflows_by_itself_is_named():
    graph = bert_graph()
    with pytest.raises(CalibrationError, match="what was measured at gates is not finite"):
        check_values(graph, text_batch(2, 5), {"fine": torch.zeros(2), "gates": torch.tensor([float("inf")])})


class Roots(nn.Module):
    """The square root of what the first layer gives: NaN of what is negative. Padding may be negative."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix = nn.Embedding(9, 4), nn.Linear(4, 4)

    def forward(self, input_ids, attention_mask):
        return self.mix(self.embed(input_ids).sqrt()) * attention_mask[..., None]


def test_the_first_batch_is_run_before_any_work():
    model = Roots().eval()
    with torch.no_grad():
        model.embed.weight.copy_(torch.arange(36).reshape(9, 4) - 4)
    ids = torch.tensor([[1, 2, 3], [4, 5, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    graph = capture(model, {"input_ids": ids, "attention_mask": mask})
    padded = Batch({"input_ids": ids, "attention_mask": mask})
    assert graph.run(padded.inputs)[graph.outputs[0]].isnan().any()
    check_finite(graph, [padded])
    check_finite(graph, [])
    with pytest.raises(CalibrationError, match="calibration: activations at sqrt are not finite; got NaN in "):
        check_finite(graph, [Batch({"input_ids": ids, "attention_mask": torch.ones_like(mask)})])
    with pytest.raises(CalibrationError, match=r"calibration: the values of mix\.weight are not finite"):
        check_finite(with_value(graph, "mix.weight", float("nan")), [])
