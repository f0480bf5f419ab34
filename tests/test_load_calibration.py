import json
import shutil

import pytest
import torch
import transformers

from checks import TEXTS, TinyMlp, bert_graph, minilm_folder, mlp_graph, tiny_bert
from tilecut.load_calibration import Calibration, load_calibration, read_texts, tokenizer_folder
from tilecut_passes.capture import capture
from tilecut_runtime.errors import CalibrationError


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory):
    """A tiny BERT loaded from a folder that holds the real tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tiny_bert(vocab=30522).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        shutil.copyfile(minilm_folder() / name, folder / name)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    return model, capture(model)


def some(given, graph, model, sequence=8, seed=0) -> Calibration:
    got = load_calibration(given, graph, model, sequence, seed)
    assert got is not None
    return got


def load(given, with_tokenizer, sequence=32, seed=0) -> Calibration:
    model, graph = with_tokenizer
    return some(given, graph, model, sequence, seed)


def test_batches_pass_through_and_a_tenth_is_held_out():
    batches = [{"x": torch.full((2, 12), float(i))} for i in range(20)]
    got = some(batches, mlp_graph(), TinyMlp())
    assert len(got.fit) == 18
    assert [int(b.inputs["x"][0, 0]) for b in got.held_out] == [5, 15]
    assert got.source == "20 batches" and got.tokens == 36
    few = some(batches[:3], mlp_graph(), TinyMlp())
    assert few.fit == few.held_out and "too few" in few.source


def test_texts_become_padded_batches_sorted_by_length(with_tokenizer):
    got = load([f"{'word ' * (i % 50)}end" for i in range(200)], with_tokenizer, sequence=16)
    batches = got.fit
    assert sum(b.inputs["input_ids"].shape[0] for b in batches) == 200
    assert max(b.inputs["input_ids"].shape[1] for b in batches) == 16
    assert all(set(b.inputs) == {"input_ids", "attention_mask", "token_type_ids"} for b in batches)
    assert any((b.inputs["attention_mask"] == 0).any() for b in batches)


def test_the_order_follows_the_seed(with_tokenizer):
    texts = [f"text number {i}" for i in range(300)]
    first, same, other = (load(texts, with_tokenizer, seed=s).fit[0].inputs["input_ids"] for s in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_nothing_given_means_general_text_only_beside_a_tokenizer(with_tokenizer):
    got = load(None, with_tokenizer)
    assert "WordNet" in got.source and "1024 texts" in got.source
    assert load_calibration(None, bert_graph(), tiny_bert(), 8) is None
    assert load_calibration(None, mlp_graph(), TinyMlp(), 8) is None


def test_files_of_every_kind(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n two \n", encoding="utf-8")
    assert read_texts(tmp_path / "a.txt") == (["one", "two"], None)
    (tmp_path / "a.tsv").write_text('split\ttext\tlabel\ntrain\ta "quote\t1\ntest\tb\t0\n', encoding="utf-8")
    assert read_texts(tmp_path / "a.tsv") == (['a "quote'], [1])
    (tmp_path / "b.tsv").write_text("id\tdescription\n1\tfirst\n", encoding="utf-8")
    assert read_texts(tmp_path / "b.tsv") == (["first"], None)
    rows = [{"text": "x", "label": 2}, {"text": "y", "label": 0}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert read_texts(tmp_path / "a.jsonl") == (["x", "y"], [2, 0])
    (tmp_path / "b.jsonl").write_text('{"text": "x", "label": 2}\n{"text": "y"}\n', encoding="utf-8")
    assert read_texts(tmp_path / "b.jsonl") == (["x", "y"], None)


def test_the_real_text_reads_its_train_split_alone():
    texts, labels = read_texts(TEXTS)
    with TEXTS.open(encoding="utf-8") as file:
        assert len(texts) == sum(line.startswith("train\t") for line in file)
    assert labels is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"x", "unknown kind of calibration file; got .csv; wanted .txt, .tsv or .jsonl"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8 text"),
        ("a.txt", b" \n\n", "the file holds no text"),
        ("a.tsv", b"", "the file holds no text"),
        ("a.tsv", b"text\tlabel\nx\tgood\n", "row 1: a label is no integer; got 'good'"),
        ("a.jsonl", b'{"text": "x"}\nnot json\n', "a.jsonl:2: not a JSON object"),
        ("a.jsonl", b'{"body": "x"}\n', 'not a JSON object with a "text"'),
        ("a.jsonl", b'{"text": null}\n', 'not a JSON object with a "text"; got {"text": null}'),
        ("a.jsonl", b'\n\n["text"]\n', "a.jsonl:3: not a JSON object"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl:1: not a JSON object"),
        ("a.jsonl", b'{"text": "x", "label": ' + b"1" * 5000 + b"}", "a.jsonl:1: not a JSON object"),
        ("a.jsonl", b'{"text": "x", "label": 1e400}\n', "row 1: a label is no integer; got inf"),
        ("a.jsonl", b'{"text": "x", "label": 1.7}\n', "row 1: a label is no integer; got 1.7"),
        ("a.jsonl", b'{"text": "x", "label": 9223372036854775808}\n', "row 1: a label is no integer"),
        ("a.jsonl", b'{"text": "x", "label": [1]}\n', "row 1: a label is no integer; got [1]"),
        ("a.tsv", b"text\tlabel\nx\t1\ny\t2\tz\n", "row 2: more fields than the header has; got 3; wanted 2"),
        ("a.tsv", b"label\tsplit\n1\ttrain\n", "no column holds text; got label, split"),
    ],
)
def test_bad_files(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError) as caught:
        read_texts(tmp_path / name)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["text", 3], "batch 0: not a dict of tensors; got str"),
        ({"x": torch.ones(2, 12)}, "a single dict, not an iterable of batches; put it into a list"),
        ([], "no batches"),
        (4.5, "neither batches, texts nor a file; got float"),
        (["text"], "the model has no tokenizer beside it"),
        ("absent.txt", "no such calibration file"),
    ],
)
def test_bad_calibration(given, message):
    with pytest.raises(CalibrationError, match=message):
        load_calibration(given, mlp_graph(), TinyMlp(), 8)


def test_a_tokenizer_is_looked_for_where_the_model_came_from(with_tokenizer):
    assert tokenizer_folder(with_tokenizer[0]) is not None
    assert tokenizer_folder(tiny_bert()) is None
    assert tokenizer_folder(TinyMlp()) is None


def test_a_byte_order_mark_blank_lines_and_separators_within_a_text(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '\ufeff{"text": "a\u2028b"}\n\n \n{"text": "c\x85d"}\r\n{"text": "e\\u2028f"}', encoding="utf-8"
    )
    assert read_texts(tmp_path / "a.jsonl") == (["a\u2028b", "c\x85d", "e\u2028f"], None)
    (tmp_path / "a.tsv").write_text("\ufefftext\tlabel\r\na\u2028b\t1\r\n\r\nc\t2\r\n", encoding="utf-8")
    assert read_texts(tmp_path / "a.tsv") == (["a\u2028b", "c"], [1, 2])
    (tmp_path / "a.txt").write_text("\ufeffa\u2028b\n\nc", encoding="utf-8")
    assert read_texts(tmp_path / "a.txt") == (["a\u2028b", "c"], None)


def test_the_text_column_is_never_the_label_or_the_split(tmp_path):
    (tmp_path / "a.tsv").write_text("sentence\tlabel\nfine\t1\nbad\t0\n", encoding="utf-8")
    assert read_texts(tmp_path / "a.tsv") == (["fine", "bad"], [1, 0])
    (tmp_path / "b.tsv").write_text(
        "id\tsentence\tlabel\tsplit\n7\tfine\t1\ttrain\n8\tbad\t0\ttest\n", encoding="utf-8"
    )
    assert read_texts(tmp_path / "b.tsv") == (["fine"], [1])


def test_a_long_field_and_short_rows(tmp_path):
    text = "word " * 50_000
    (tmp_path / "a.tsv").write_text(f"text\tlabel\n{text}\t1\nshort\n", encoding="utf-8")
    assert read_texts(tmp_path / "a.tsv") == ([text.strip(), "short"], None)


@pytest.mark.parametrize("value", [None, "text", object(), [[1.0], [1.0, 2.0]], [2**70]])
def test_what_is_no_tensor_is_one_error(value):
    with pytest.raises(CalibrationError, match="calibration batch 0: x: no tensor can be made of it") as caught:
        load_calibration([{"x": value}], mlp_graph(), TinyMlp(), 8)
    assert "\n" not in str(caught.value)
