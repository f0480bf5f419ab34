import pytest
import torch

from checks import bert_graph, encoder_graph, mlp_graph, text_batch
from tilecut_passes.align_labels import align_labels, check_labels
from tilecut_passes.calibration import check_batches
from tilecut_runtime.errors import CalibrationError

IDS = torch.tensor([[5, 6, 7, 0], [8, 9, 3, 4]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])


@pytest.mark.parametrize("labels", [IDS, IDS.masked_fill(MASK == 0, -100), IDS.int()])
def test_labels_that_repeat_the_ids_move_to_what_predicts_them(labels):
    got = align_labels(labels, {"input_ids": IDS, "attention_mask": MASK})
    assert got.tolist() == [[6, 7, -100, -100], [9, 3, 4, -100]]


def test_other_labels_stay():
    masked = torch.full_like(IDS, -100)
    masked[0, 1], masked[1, 2] = 6, 3
    corrupted = IDS.clone()
    corrupted[0, 1] = 1
    for labels, ids in ((masked, corrupted), (torch.tensor([1, 0]), IDS), (torch.ones(2, 4), IDS), (IDS, None)):
        inputs = {} if ids is None else {"input_ids": ids}
        assert align_labels(labels, inputs) is labels


@pytest.mark.parametrize(
    ("labels", "shape"),
    [
        (torch.tensor([0, 2]), (2, 3)),
        (torch.tensor([[0, -100], [1, 2]]), (2, 2, 3)),
        (torch.tensor([0.5, 1]), (2, 1)),
        (torch.ones(2, 3), (2, 3)),
    ],
)
def test_labels_that_fit(labels, shape):
    check_labels(labels, "logits", shape)


@pytest.mark.parametrize(
    ("labels", "shape", "message"),
    [
        (torch.tensor([0, 3]), (2, 3), "a label is outside the classes; got 0..3; wanted 0..2, or -100 to ignore"),
        (torch.tensor([-1, 1]), (2, 3), "a label is outside the classes; got -1..1"),
        (torch.tensor([0, 1]), (2, 5, 3), r"got \[2\]; wanted \[2, 5\], one for each row of logits"),
        (torch.tensor([[0], [1]]), (2, 3), r"got \[2, 1\]; wanted \[2\]"),
        (torch.ones(3, 2), (2, 3), "they do not fit the output"),
        (torch.tensor([float("nan"), 1]), (2, 1), "they hold NaN or infinity"),
    ],
)
def test_labels_that_do_not_fit(labels, shape, message):
    with pytest.raises(CalibrationError, match=message):
        check_labels(labels, "logits", shape)


@pytest.mark.parametrize(
    ("graph", "inputs", "labels", "message"),
    [
        (mlp_graph, {"x": torch.randn(4, 12)}, torch.tensor([0, 1, 2, 3]), "batch 0: labels: a label is outside"),
        (mlp_graph, {"x": torch.randn(4, 12)}, torch.tensor([0, 1]), r"labels do not match the batch; got \[2\]"),
        (mlp_graph, {"x": torch.randn(4, 12)}, torch.tensor(1), "labels do not match the batch"),
        (mlp_graph, {"x": torch.randn(4, 12)}, torch.zeros(4, 2).long(), "batch 0: labels: they do not fit the output"),
        (bert_graph, text_batch(3, 5), torch.zeros(3).long(), "they do not fit the output"),
        (bert_graph, {**text_batch(3, 5), "input_ids": torch.full((3, 5), 99)}, None,
         "input input_ids holds an id that the model has no embedding for; got 99..99; wanted 0..98; use the model's own"),
        (bert_graph, {**text_batch(3, 5), "input_ids": torch.full((3, 5), -1)}, None, "got -1..-1"),
        (bert_graph, {**text_batch(3, 5), "attention_mask": torch.zeros(3, 5)}, None, "another dtype"),
        (bert_graph, {**text_batch(3, 5), "attention_mask": torch.zeros(3, 5).int()}, None, "every position is padding"),
    ],
)  # fmt: skip
def test_batches_are_checked_before_any_work(graph, inputs, labels, message):
    batch = inputs if labels is None else {**inputs, "labels": labels}
    with pytest.raises(CalibrationError, match=message):
        check_batches(graph(), [batch])


def test_labels_of_batches():
    x = torch.randn(3, 12)
    whole, none, other = check_batches(
        mlp_graph(),
        [{"x": x, "label": [0, 1, -100]}, {"x": x, "labels": [-100] * 3}, {"x": x, "labels": torch.randn(3, 3)}],
    )
    assert whole.labels.tolist() == [0, 1, -100]
    assert none.labels is None
    assert other.labels.shape == (3, 3)
    (tokens,) = check_batches(encoder_graph(), [{"input_ids": IDS, "attention_mask": MASK, "labels": IDS}])
    assert tokens.labels.tolist() == [[6, 7, -100, -100], [9, 3, 4, -100]]
