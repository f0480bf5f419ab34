import pytest
import torch
from torch import nn

from checks import bert_graph, encoder_graph, mlp_graph, randomise
from tilecut import batch_rows as module
from tilecut.batch_rows import BATCH_SIZE, batch_rows, batch_size
from tilecut_passes.capture import capture
from tilecut_runtime.errors import CalibrationError


def test_rows_are_sorted_by_length_and_padded_on_the_right():
    lengths = [5, 2, 9, 2, 7]
    rows = [{"input_ids": list(range(1, n + 1)), "labels": [n] * n} for n in lengths]
    (batch,) = batch_rows(lm_graph(), rows, pad=3)
    mask = batch.inputs["attention_mask"]
    assert mask.sum(1).tolist() == sorted(lengths)
    for ids, real in zip(batch.inputs["input_ids"], mask, strict=True):
        n = int(real.sum())
        assert ids.tolist() == [*range(1, n + 1), *[3] * (9 - n)]
        assert real.tolist() == [1] * n + [0] * (9 - n)
    # Labels are of positions that count alone, and stand where they stood.
    assert [row[row != -100].tolist() for row in batch.labels] == [[n] * n for n in sorted(lengths)]


def lm_graph():
    """A causal model that takes a mask: the smallest one there is."""

    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)

        def forward(self, input_ids, attention_mask):
            return {"logits": self.head(self.embed(input_ids).cumsum(1) * attention_mask[..., None])}

    example = {name: torch.ones(2, 7, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    return capture(randomise(Tiny()), example)


def test_what_follows_from_the_ids_is_added():
    (batch,) = batch_rows(bert_graph(), [{"input_ids": [4, 5]}, {"input_ids": torch.tensor([6, 7, 8])}])
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.inputs["token_type_ids"].tolist() == [[0, 0, 0], [0, 0, 0]]
    assert {t.dtype for t in batch.inputs.values()} == {torch.int64}
    given = {"input_ids": [4, 5], "attention_mask": [1, 0], "token_type_ids": [0, 1]}
    (batch,) = batch_rows(bert_graph(), [given])
    assert {name: value[0].tolist() for name, value in batch.inputs.items()} == given


def test_the_decoder_reads_the_same_ids_after_the_start():
    class EncoderDecoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)

        def forward(self, input_ids, attention_mask, decoder_input_ids):
            memory = (self.embed(input_ids) * attention_mask[..., None]).sum(1, keepdim=True)
            return {"logits": self.head(self.embed(decoder_input_ids) + memory)}

    names = ("input_ids", "attention_mask", "decoder_input_ids")
    graph = capture(randomise(EncoderDecoder()), {name: torch.ones(2, 7, dtype=torch.long) for name in names})
    (batch,) = batch_rows(graph, [{"input_ids": [7, 8, 9]}, {"input_ids": [5, 6]}], pad=1, start=2)
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 1], [7, 8, 9]]
    assert batch.inputs["decoder_input_ids"].tolist() == [[2, 5, 1], [2, 7, 8]]
    assert graph.run(batch.inputs)["logits"].shape == (2, 3, 20)
    (batch,) = batch_rows(graph, [{"input_ids": [7, 8]}], pad=1)
    assert batch.inputs["decoder_input_ids"].tolist() == [[1, 7]]


def test_a_model_without_a_mask_gets_rows_of_one_length():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.up, self.down = nn.Embedding(20, 8), nn.Linear(8, 24), nn.Linear(24, 3)

        def forward(self, input_ids):
            return {"logits": self.down(torch.relu(self.up(self.embed(input_ids).mean(1))))}

    graph = capture(randomise(Bag()), {"input_ids": torch.ones(2, 7, dtype=torch.long)})
    batches = batch_rows(graph, [{"input_ids": [1 + i] * (2 + i % 3)} for i in range(9)])
    assert sorted(tuple(b.inputs["input_ids"].shape) for b in batches) == [(3, 2), (3, 3), (3, 4)]
    assert not any((b.inputs["input_ids"] == 0).any() for b in batches)


def test_rows_without_ids_are_stacked():
    x = torch.randn(150, 12)
    batches = batch_rows(mlp_graph(), [{"x": row, "labels": 1} for row in x])
    assert [len(b.inputs["x"]) for b in batches] == [64, 64, 22]
    assert torch.equal(torch.cat([b.inputs["x"] for b in batches]), x)


def test_large_outputs_make_small_batches(monkeypatch):
    assert batch_size(encoder_graph(), 128) == BATCH_SIZE
    # Of a row: 10 positions of 24 numbers, and 24 numbers of the first position.
    monkeypatch.setattr(module, "MAX_OUTPUTS", 5 * (10 * 24 + 24))
    assert batch_size(encoder_graph(), 10) == 5
    assert batch_size(encoder_graph(), 10_000) == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"x": torch.ones(12)}, {"x": torch.ones(11)}], "input x has another shape; got [1, 11]"),
        ([{"x": torch.ones(12)}, {"x": torch.ones(1, 12)}], "calibration batch 0: input x has another rank"),
        ([{"x": torch.ones(12), "labels": 1}, {"x": torch.ones(12)}], "some rows have labels, and some have not"),
        ([{"x": object()}], "calibration row 0: x: no tensor can be made of it"),
        ([{"x": torch.ones(13)}], "calibration batch 0: input x has another shape; got [1, 13]"),
        ([{"y": 1}], "calibration batch 0: input x is missing"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit(rows, message):
    with pytest.raises(CalibrationError) as caught:
        batch_rows(mlp_graph(), rows)
    assert message in str(caught.value)


def test_frames_are_padded_where_their_number_is_free_alone():
    class Frames(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 24), nn.Linear(24, 4)

        def forward(self, frames, attention_mask):
            return self.down(torch.relu(self.up(frames))) * attention_mask[..., None]

    example = {"frames": torch.ones(2, 7, 4), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    graph = capture(randomise(Frames()), example)
    row = lambda n, width=4: {"frames": torch.ones(n, width), "attention_mask": [1] * n}
    (batch,) = batch_rows(graph, [row(3), row(5)])
    assert batch.inputs["frames"].sum((1, 2)).tolist() == [12, 20]
    assert batch.inputs["attention_mask"].sum(1).tolist() == [3, 5]
    with pytest.raises(CalibrationError, match=r"rows of frames differ in a size that is fixed; got \[5, 3\]"):
        batch_rows(graph, [row(3), row(5, width=3)])
    with pytest.raises(CalibrationError, match="rows of frames differ in rank"):
        batch_rows(graph, [row(3), {**row(3), "frames": torch.ones(3)}])
