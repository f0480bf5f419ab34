import itertools

import datasets
import pytest
import torch
import transformers

from checks import TEXTS, TinyMlp, bert_graph, mlp_graph, text_batch, tiny_bert
from tilecut.config import PruneConfig
from tilecut.load_calibration import Calibration, hold_out, load_calibration
from tilecut.mix_texts import GENERAL, general_passages
from tilecut.read_rows import MAX_ROWS
from tilecut.tokenize_texts import load_tokenizer
from tilecut_passes.calibration import Batch
from tilecut_passes.capture import capture
from tilecut_runtime.errors import CalibrationError
from tiny_tokenizer import CLS, SEP, SIZE, ids_of, saved_with_tokenizer

PLAIN = {"attention_mask": torch.ones(8, 9).long(), "token_type_ids": torch.zeros(8, 9).long()}
WORDS = [f"some words of text number {i}" for i in range(200)]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A tiny BERT with a tokenizer beside it, and its graph."""
    model = saved_with_tokenizer(tmp_path_factory.mktemp("model") / "bert")
    return model, capture(model)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    config = transformers.BertConfig(
        vocab_size=SIZE, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_labels=4
    )
    model = saved_with_tokenizer(
        tmp_path_factory.mktemp("model") / "classifier", transformers.BertForSequenceClassification(config)
    )
    return model, capture(model)


def some(given, graph, model, sequence=8, **options) -> Calibration:
    got = load_calibration(given, graph, model, sequence, **options)
    assert got is not None
    return got


def load(given, of, sequence=32, **options) -> Calibration:
    model, graph = of
    return some(given, graph, model, sequence, **options)


def rows(batches: list[Batch]) -> list[tuple[int, ...]]:
    """The real ids of every row."""
    out = []
    for batch in batches:
        for ids, mask in zip(batch.inputs["input_ids"], batch.inputs["attention_mask"], strict=True):
            out.append(tuple(ids[mask != 0].tolist()))
    return out


def ids(text: str, sequence=32) -> tuple[int, ...]:
    return (CLS, *ids_of(text)[: sequence - 2], SEP)


def test_batches_pass_through_and_a_tenth_is_held_out():
    batches = [{"x": torch.full((2, 12), float(i))} for i in range(20)]
    got = some(batches, mlp_graph(), TinyMlp())
    assert len(got.fit) == 18
    assert [int(b.inputs["x"][0, 0]) for b in got.held_out] == [5, 15]
    assert got.source == "20 batches" and got.tokens == 36 and got.general == []
    few = some(batches[:3], mlp_graph(), TinyMlp())
    assert few.fit == few.held_out and "too few" in few.source


def test_texts_become_batches_of_the_models_own_ids(bert):
    got = load(WORDS, bert, mixture=0)
    assert len(rows(got.fit)) == 180 and len(rows(got.held_out)) == 20
    assert sorted(rows(got.fit) + rows(got.held_out)) == sorted(map(ids, WORDS))
    assert all(set(b.inputs) == {"input_ids", "attention_mask", "token_type_ids"} for b in got.fit)
    assert got.source == "200 texts" and got.tokens == sum(map(len, rows(got.fit)))
    assert max(map(len, rows(load(WORDS, bert, sequence=9, mixture=0).fit))) == 9


def test_the_mixture_is_that_fraction_of_the_fitted_tokens(bert):
    own = set(map(ids, WORDS))
    for mixture in (0.25, 0.5, 0.0):
        got = load(WORDS, bert, mixture=mixture)
        fitted = rows(got.fit)
        general = [row for row in fitted if row not in own]
        assert len(fitted) - len(general) == 180
        assert sum(map(len, general)) / got.tokens == pytest.approx(mixture, abs=0.005)
        assert got.source == (f"200 texts, and {len(general)} {GENERAL}" if general else "200 texts")
        # In-domain is what the caller gave, and general text is reported whatever is mixed.
        assert set(rows(got.held_out)) <= own
        assert len(rows(got.general)) == len(general_passages()[1])
    assert load(WORDS, bert).source == load(WORDS, bert, mixture=PruneConfig().mixture).source


@pytest.mark.parametrize("given", [WORDS, [{"input_ids": torch.randint(4, SIZE, (8, 9)), **PLAIN} for _ in range(20)]])
def test_what_is_held_out_is_never_fitted(bert, given):
    for seed in range(3):
        got = load(given, bert, sequence=64, seed=seed)
        fitted = set(rows(got.fit))
        assert got.held_out and not fitted & set(rows(got.held_out))
        assert not fitted & set(rows(got.general))


def test_texts_that_repeat_are_not_held_out(bert):
    got = load([*["the same text"] * 150, *WORDS[:50]], bert, mixture=0)
    assert not set(rows(got.fit)) & set(rows(got.held_out))
    same = load(["the same text"] * 150, bert, mixture=0)
    assert rows(same.fit) == rows(same.held_out) and "too few to hold any out" in same.source


def test_few_rows_hold_none_out():
    many = [{"x": torch.full((12,), float(i))} for i in range(20)]
    fit, held = hold_out(many, mlp_graph(), 0)
    assert (len(fit), len(held)) == (18, 2)
    assert hold_out(many[:19], mlp_graph(), 0) == (many[:19], [])


def test_one_seed_one_calibration(bert):
    first, same, other = (load(WORDS, bert, seed=seed) for seed in (0, 0, 1))
    for part in ("fit", "held_out", "general"):
        assert rows(getattr(first, part)) == rows(getattr(same, part))
    assert sorted(rows(first.fit)) != sorted(rows(other.fit))
    assert rows(first.general) == rows(other.general)


def test_nothing_given_means_general_text_only_beside_a_tokenizer(bert):
    got = load(None, bert)
    fit, held = general_passages()
    assert got.source == f"{len(fit)} general texts (WordNet glosses, shipped with tilecut)"
    assert len(rows(got.fit)) == len(fit) and len(rows(got.held_out)) == len(held) and got.general is got.held_out
    assert not set(rows(load(None, bert, sequence=512).fit)) & set(rows(load(None, bert, sequence=512).held_out))
    assert load_calibration(None, bert_graph(), tiny_bert(), 8) is None
    assert load_calibration(None, mlp_graph(), TinyMlp(), 8) is None


def test_files_and_their_train_split(bert, tmp_path):
    got = load(TEXTS, bert, sequence=16, mixture=0)
    assert got.source == f"debian_sections.tsv, {MAX_ROWS} texts"
    path = tmp_path / "a.txt"
    path.write_text("\n".join(WORDS), encoding="utf-8")
    for given in (path, str(path)):
        assert sorted(rows(load(given, bert).fit)) == sorted(rows(load(WORDS, bert).fit))


def test_pairs_are_tokenized_as_pairs(bert):
    pairs = datasets.Dataset.from_dict({"sentence1": ["one"] * 3, "sentence2": ["two", "three", "four"]})
    got = load(pairs, bert, mixture=0)
    assert sorted(rows(got.fit)) == sorted(
        (CLS, *ids_of("one"), SEP, *ids_of(b), SEP) for b in ("two", "three", "four")
    )
    types = torch.cat([b.inputs["token_type_ids"] * b.inputs["attention_mask"] for b in got.fit])
    assert types.sum(1).tolist() == [len(b) + 1 for b in ("two", "four", "three")]


def test_labels_stay_with_their_texts_and_general_text_has_none(classifier):
    labelled = datasets.Dataset.from_dict({"text": WORDS, "label": [i % 4 for i in range(200)]})
    got = load(labelled, classifier)
    wanted = {ids(text): i % 4 for i, text in enumerate(WORDS)}
    assert got.scoring != got.fit
    for batch in got.scoring + got.held_out:
        assert [wanted[row] for row in rows([batch])] == batch.labels.tolist()
    assert len(rows(got.scoring)) == 180
    general = [b for b in got.fit if b.labels is None]
    assert general and all(b.labels is None for b in got.general)
    unlabelled = load(WORDS, classifier)
    assert unlabelled.scoring == unlabelled.fit


def test_labels_of_texts_that_no_output_fits_are_said(bert):
    got = load([{"text": text, "label": 1} for text in WORDS], bert)
    assert all(b.labels is None for b in got.fit)
    assert got.notes[0].startswith("labels were not used: the output last_hidden_state: float32 [batch, sequence, 32]")


def test_labels_out_of_range_are_one_error(classifier):
    with pytest.raises(CalibrationError, match="a label is outside the classes; got 0..4; wanted 0..3"):
        load([(text, i % 5) for i, text in enumerate(WORDS)], classifier)


def test_rows_of_ids_are_padded_with_the_tokenizers_pad(bert):
    given = datasets.Dataset.from_dict({"input_ids": [[7] * (1 + i % 5) + [10 + i] for i in range(40)]})
    got = load(given, bert, mixture=0)
    assert sorted(rows(got.fit) + rows(got.held_out)) == sorted(map(tuple, given["input_ids"]))
    assert got.source == "40 rows"
    padded = torch.cat([b.inputs["input_ids"][b.inputs["attention_mask"] == 0] for b in got.fit])
    assert len(padded) and set(padded.tolist()) == {bert[0].config.pad_token_id}


def test_batches_beside_a_tokenizer_are_mixed_too(bert):
    batches = [text_batch(16, 9, seed=i, vocab=SIZE) for i in range(20)]
    got = load(torch.utils.data.DataLoader(batches, batch_size=None), bert, mixture=0.2)
    given = sum(int(b["attention_mask"].sum()) for i, b in enumerate(batches) if i % 10 != 5)
    assert given / got.tokens == pytest.approx(0.8, abs=0.01)
    assert got.source.startswith("20 batches, and ") and "general texts" in got.source


def test_without_a_tokenizer_batches_are_not_mixed_and_that_is_said():
    batches = [text_batch(16, 9, seed=i) for i in range(20)]
    got = some(batches, bert_graph(), tiny_bert())
    assert got.source == "20 batches; no general text: the model has no tokenizer beside it"
    assert len(got.fit) == 18 and got.general == []


def test_a_tokenizer_that_knows_no_word_of_it_adds_no_general_text(tmp_path):
    model = saved_with_tokenizer(tmp_path, known=False)
    got = load([text_batch(16, 9, seed=i) for i in range(20)], (model, capture(model)))
    assert got.source == "20 batches; no general text: its words are unknown" and not got.general


def test_a_damaged_tokenizer_matters_to_texts_alone(tmp_path):
    model = saved_with_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    graph = capture(model)
    for given in (None, WORDS):
        with pytest.raises(CalibrationError, match="transformers cannot load the tokenizer"):
            load(given, (model, graph))
    got = load([text_batch(16, 9, seed=i) for i in range(20)], (model, graph))
    assert "no general text" in got.source and "cannot load the tokenizer" in got.source


def test_a_stream_without_end(bert):
    got = load(({"text": f"text {i}"} for i in itertools.count()), bert, sequence=16, mixture=0)
    assert len(rows(got.fit)) + len(rows(got.held_out)) == MAX_ROWS
    assert got.notes == [f"the first {MAX_ROWS} rows of a stream were taken"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["text", 3], "calibration row 1: not a text; got int"),
        ({"x": torch.ones(2, 12)}, "a single dict, not an iterable of batches; put it into a list"),
        ([], "no batches"),
        (4.5, "neither batches, texts nor a file; got float"),
        (["text"], "texts: the model takes no input_ids"),
        ("absent.txt", "no such calibration file"),
        ([{"x": None}], "calibration batch 0: x: no tensor can be made of it"),
        ([{"x": "text"}], "x: no tensor can be made of it"),
        ([{"x": object()}], "x: no tensor can be made of it"),
        ([{"x": [[1.0], [1.0, 2.0]]}], "x: no tensor can be made of it"),
        ([{"x": [2**70]}], "x: no tensor can be made of it"),
    ],
)
def test_bad_calibration(given, message):
    with pytest.raises(CalibrationError, match=message) as caught:
        load_calibration(given, mlp_graph(), TinyMlp(), 8)
    assert "\n" not in str(caught.value)


def test_texts_need_a_tokenizer():
    with pytest.raises(CalibrationError, match="texts: the model has no tokenizer beside it; load the model from"):
        load_calibration(["text"], bert_graph(), tiny_bert(), 8)


def test_the_length_is_what_the_model_allows(bert):
    model, graph = bert
    assert load_tokenizer(graph, model, 32).length == 32
    assert load_tokenizer(graph, model, 100_000).length == graph.ranges["sequence"].max == 512
