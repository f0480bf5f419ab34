import itertools

import datasets
import numpy as np
import pytest
import torch
import transformers

from checks import bert_graph, mlp_graph, text_batch
from tilecut.read_rows import MAX_ROWS, read_rows
from tilecut_passes.calibration import check_batches
from tilecut_runtime.errors import CalibrationError

datasets.disable_progress_bars()

SENTENCES = {"idx": [0, 1, 2], "sentence": ["one", "two ", "three"], "label": [0, 1, 1]}
PAIRS = {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [0.5, 1.0]}
IDS = {"input_ids": [[1, 2], [3, 4, 5]], "attention_mask": [[1, 1], [1, 1, 1]], "label": [1, 0]}


def read(given, graph=None, seed=0):
    return read_rows(given, graph or bert_graph(), seed)


@pytest.mark.parametrize(
    ("given", "texts", "labels"),
    [
        (["one", " two", "", "three"], ["one", "two", "three"], None),
        ((text for text in ("one", "two")), ["one", "two"], None),
        ([("one", 1), ("two", 0)], ["one", "two"], [1, 0]),
        ([("one", "two"), ("three", "four")], [("one", "two"), ("three", "four")], None),
        ([("one", "two", 3), ("three", "four", 4)], [("one", "two"), ("three", "four")], [3, 4]),
        ([["one", "two"], ["three"]], ["one", "two", "three"], None),
        ([{"text": "one", "label": 1}, {"text": "two", "label": torch.tensor(0)}], ["one", "two"], [1, 0]),
        ([{"text": "one", "label": 1}, {"text": "two", "label": None}], ["one", "two"], None),
        ([{"body": "one"}, {"body": None}, {"body": "two"}], ["one", "two"], None),
        ([{"text": ["one", "two"], "label": torch.tensor([1, 2])}, {"text": ["three"], "label": torch.tensor([3])}],
         ["one", "two", "three"], [1, 2, 3]),
        (np.array(["one", "two"]), ["one", "two"], None),
        (datasets.Dataset.from_dict(SENTENCES), ["one", "two", "three"], [0, 1, 1]),
        (datasets.Dataset.from_dict(SENTENCES).with_format("torch"), ["one", "two", "three"], [0, 1, 1]),
        (datasets.Dataset.from_dict(SENTENCES).to_iterable_dataset(), ["one", "two", "three"], [0, 1, 1]),
        (datasets.Dataset.from_dict(SENTENCES).to_pandas(), ["one", "two", "three"], [0, 1, 1]),
        (datasets.Dataset.from_dict(PAIRS), [("a", "c"), ("b", "d")], [0.5, 1.0]),
        (datasets.DatasetDict(test=datasets.Dataset.from_dict({"text": ["no"]}),
                              train=datasets.Dataset.from_dict(SENTENCES)), ["one", "two", "three"], [0, 1, 1]),
        (datasets.DatasetDict(validation=datasets.Dataset.from_dict(PAIRS)), [("a", "c"), ("b", "d")], [0.5, 1.0]),
        (torch.utils.data.DataLoader(datasets.Dataset.from_dict(SENTENCES), batch_size=2),
         ["one", "two", "three"], [0, 1, 1]),
        (torch.utils.data.DataLoader(["one", "two", "three"], batch_size=2), ["one", "two", "three"], None),
    ],
)  # fmt: skip
def test_texts_of_every_kind(given, texts, labels):
    got = read(given)
    assert (got.texts, got.labels) == (texts, labels)
    assert not got.rows and not got.batches


@pytest.mark.parametrize(
    "given",
    [
        datasets.Dataset.from_dict(IDS),
        datasets.Dataset.from_dict({**IDS, "text": ["a", "b"]}),
        datasets.Dataset.from_dict(IDS).with_format("numpy"),
        datasets.Dataset.from_dict(IDS).to_iterable_dataset(),
        [IDS],
        [{**IDS, "input_ids": [torch.tensor(r) for r in IDS["input_ids"]], "name": "unread"}],
    ],
)
def test_rows_of_ids(given):
    got = read(given)
    assert not got.texts and not got.batches
    assert [list(map(int, row["input_ids"])) for row in got.rows] == IDS["input_ids"]
    assert [int(row["labels"]) for row in got.rows] == IDS["label"]


def test_lists_of_one_length_are_batches():
    got = read([{k: v[:1] for k, v in IDS.items()}, {k: v[1:] for k, v in IDS.items()}])
    assert [b["input_ids"] for b in got.batches] == [[[1, 2]], [[3, 4, 5]]]


def test_a_batch_of_lists_of_one_length_among_ragged_ones_is_taken_apart():
    got = read([IDS, {k: [v[0], v[0]] for k, v in IDS.items()}])
    assert [len(row["input_ids"]) for row in got.rows] == [2, 3, 2, 2]


def test_batches_pass_as_they_are():
    batches = [text_batch(3, 7, seed=i) for i in range(2)]
    encoded = [transformers.BatchEncoding(b) for b in batches]
    tuples = [tuple(b.values()) for b in batches]
    for given in (batches, encoded, tuples, iter(batches), torch.utils.data.DataLoader(batches, batch_size=None)):
        got = read(given).batches
        assert len(got) == 2
        for a, b in zip(got, batches, strict=True):
            assert all(torch.equal(a[name], b[name]) for name in b)


def test_tuples_in_forwards_order_with_labels_last():
    graph = mlp_graph()
    x, y = torch.randn(6, 12), torch.arange(6) % 3
    whole = torch.utils.data.TensorDataset(x, y)
    batches = read(torch.utils.data.DataLoader(whole, batch_size=4), graph).batches
    assert [set(b) for b in batches] == [{"x", "labels"}] * 2
    assert torch.equal(torch.cat([b["x"] for b in batches]), x)
    assert torch.equal(torch.cat([b["labels"] for b in batches]), y)
    assert read([x], graph).batches == [{"x": x}]
    # One example each: by its rank.
    for given in (whole, list(whole), [{"x": a, "label": b} for a, b in whole]):
        rows = read(given, graph).rows
        assert torch.equal(torch.stack([row["x"] for row in rows]), x)
        assert [int(row["labels"]) for row in rows] == y.tolist()
    assert len(read(x, graph).rows) == 6


def test_streams_without_end_are_cut_off():
    texts = read(f"text {i}" for i in itertools.count())
    assert len(texts.texts) == MAX_ROWS and "stream" in texts.notes[0]
    batches = read(text_batch(64, 5, seed=i) for i in itertools.count())
    assert sum(len(b["input_ids"]) for b in batches.batches) == MAX_ROWS
    endless = datasets.IterableDataset.from_generator(lambda: ({"text": f"text {i}"} for i in itertools.count()))
    assert read(endless).texts[:2] == ["text 0", "text 1"]


def test_a_list_is_taken_whole_and_a_large_data_set_is_sampled():
    assert len(read([f"text {i}" for i in range(MAX_ROWS + 9)]).texts) == MAX_ROWS + 9
    # Sorted by label, as many are: the first rows would be of one class.
    large = datasets.Dataset.from_dict(
        {"text": [f"text {i}" for i in range(9000)], "label": [i // 4500 for i in range(9000)]}
    )
    first, same, other = (read(large, seed=seed) for seed in (0, 0, 1))
    assert len(first.texts) == len(set(first.texts)) == MAX_ROWS
    assert first.notes == [f"{MAX_ROWS} of 9000 rows were drawn at random"]
    assert first.texts == same.texts != other.texts
    assert 0.45 < sum(first.labels) / MAX_ROWS < 0.55


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "calibration: no batches; got 0"),
        (iter(()), "no batches"),
        (datasets.Dataset.from_dict({"text": []}), "no batches"),
        (["", " "], "the data hold no text"),
        (4.5, "neither batches, texts nor a file; got float; wanted an iterable of dicts, tensors or strings, or a path"),
        ({"x": torch.ones(2, 12)}, "a single dict, not an iterable of batches; put it into a list"),
        ({}, "a single dict"),
        (["text", 3], "calibration row 1: not a text; got int"),
        ([{"text": "a"}, {"text": 7}], "calibration row 1: not a text; got int"),
        ([{"text": "a", "label": "good"}], "calibration row 0: a label is no number; got 'good'"),
        ([{"text": "a", "label": [1, 0]}], "a label is no number"),
        ([{"text": ["a", "b"], "label": [1]}], "columns of different lengths"),
        ([{"one": "a", "two": "b"}], "calibration row 0: several columns hold text; got one, two"),
        ([3, 4], "calibration batch 0: not a dict of tensors; got int"),
        ([(torch.ones(2, 3),) * 5], "more tensors than the model takes; got 5"),
        ([{**IDS, "label": [1]}], "its parts have different numbers of rows"),
        (datasets.DatasetDict(a=datasets.Dataset.from_dict(PAIRS), b=datasets.Dataset.from_dict(PAIRS)),
         "several splits, and none is train; got a, b; pass one of them"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_clear_error(given, message):
    with pytest.raises(CalibrationError) as caught:
        read(given)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_columns_that_the_model_does_not_read_are_named_by_the_check():
    got = read([{"image": torch.ones(3, 4, 4), "caption": torch.ones(1)}])
    with pytest.raises(CalibrationError, match="input input_ids is missing; got image, caption"):
        check_batches(bert_graph(), got.batches)
