import json

import pytest

from checks import TEXTS
from tilecut.read_texts import read_texts, text_columns
from tilecut_runtime.errors import CalibrationError


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


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        (("idx", "sentence1", "sentence2", "label"), ("sentence1", "sentence2")),
        (("premise", "hypothesis", "label"), ("premise", "hypothesis")),
        (("id", "title", "context", "question", "answers"), ("question", "context")),
        (("text", "text_pair"), ("text", "text_pair")),
        (("question", "text", "context"), ("text",)),
        (("title", "content"), ("content",)),
        (("a", "b"), ()),
    ],
)
def test_text_columns_by_name(names, columns):
    assert text_columns(names) == columns


def test_pairs_in_files(tmp_path):
    (tmp_path / "a.tsv").write_text("idx\tsentence1\tsentence2\tlabel\n0\ta \tb\t1\n1\tc\t\t0\n", encoding="utf-8")
    assert read_texts(tmp_path / "a.tsv") == ([("a", "b")], [1])
    rows = [{"premise": "x", "hypothesis": "y", "label": 2}, {"premise": "z", "hypothesis": " w", "label": 0}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert read_texts(tmp_path / "a.jsonl") == ([("x", "y"), ("z", "w")], [2, 0])
    (tmp_path / "b.jsonl").write_text('{"premise": "x", "hypothesis": 3}\n', encoding="utf-8")
    with pytest.raises(CalibrationError, match="b.jsonl:1: not a JSON object"):
        read_texts(tmp_path / "b.jsonl")
