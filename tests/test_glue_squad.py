"""The benchmark for who has GLUE or SQuAD: on made-up data in their form, with tiny random models."""

import json
import sys

import numpy as np
import pytest
import torch
import transformers

import bench_glue_squad
from bench_glue_squad import best_answer, judge, score_answer
from tiny_tokenizer import SIZE, saved_with_tokenizer

WORDS = ["font", "game", "library", "kernel", "tool", "music"]


def write_rows(folder, rows):
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_answers_are_scored_as_squad_does():
    assert score_answer("The cat.", "cat") == (True, 1.0)
    assert score_answer("a black cat", "cat") == (False, pytest.approx(2 / 3))
    assert score_answer("dog", "cat") == (False, 0.0)
    examples = [{"context": "", "answers": {"text": ["cat", "black cat"]}}]
    assert judge(examples, ["black cat"]) == {"exact match": 1.0, "F1": 1.0}


def test_the_best_span_begins_before_it_ends_and_lies_in_the_context():
    begin, end = np.array([9.0, 1, 5, 0]), np.array([9.0, 7, 2, 1])
    offsets = np.array([[0, 0], [0, 3], [4, 7], [8, 11]])
    # 5 at its beginning and 7 at its end would run backwards; token 0 is the question.
    assert best_answer(begin, end, [1, 2, 3], offsets, "one two six") == "one"


def test_classes_are_judged():
    examples = [{"sentence": "x", "label": i % 2} for i in range(4)]
    assert judge(examples, [np.eye(2)[i % 2] for i in range(4)]) == {"accuracy": 1.0, "Matthews": 1.0}


@pytest.mark.parametrize("task", ["pairs", "squad"])
def test_a_model_goes_through(task, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=SIZE, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    kind = transformers.BertForQuestionAnswering if task == "squad" else transformers.BertForSequenceClassification
    saved_with_tokenizer(tmp_path / "model", kind(config).eval())
    rows = []
    for i in range(40):
        a, b = WORDS[i % 6], WORDS[(i + 1) % 6]
        answers = {"text": [b], "answer_start": [len(a) + 1]}
        squad = {"question": f"which {a}", "context": f"{a} {b} {a}", "answers": answers}
        rows.append(squad if task == "squad" else {"sentence1": f"{a} {b}", "sentence2": f"{b} {a}", "label": i % 2})
    write_rows(tmp_path, rows)
    monkeypatch.setattr(sys, "argv", ["bench", str(tmp_path / "model"), str(tmp_path), "--methods", "table"])
    bench_glue_squad.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in lines] == ["method", "dense", "table"]
    assert all(0 <= float(cell) <= 1 for line in lines[1:] for cell in line.split("|")[4:-1] if cell.strip())
