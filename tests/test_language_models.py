"""The small language models of the benchmarks: their text, training, cache and judge; tiny ones, a few steps."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import transformers

import language_models as lm

TINY = lm.Recipe(
    vocabulary=300, width=16, layers=1, heads=4, kv_groups=2, neurons=32, gated_neurons=16, length=16, batch=2, steps=6
)


@pytest.fixture(scope="module")
def text() -> lm.Text:
    return lm.Text(
        {f"{i}.py": f"def add_{i}(x):\n    return x + {i}\n" * 8 for i in range(6)}, {"t.py": "x = 1\n" * 40}
    )


def perplexity_of(folder, text: lm.Text) -> float:
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder)).eval()
    return lm.perplexity(lambda ids: model(ids).logits, lm.windows(list(text.train.values()), tokenizer, 16))


@pytest.mark.parametrize("name", lm.MODELS)
def test_a_model_is_trained_once_and_found_again(name, text, tmp_path):
    losses = []
    folder = lm.model_folder(name, TINY, text, tmp_path, lambda done, of, loss: losses.append(loss))
    assert len(losses) == TINY.steps
    written = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    again = lm.model_folder(name, TINY, text, tmp_path, lambda *_: pytest.fail("trained again"))
    assert again == folder and {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == written
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]
    # Six steps are enough to know more than nothing.
    assert perplexity_of(folder, text) < TINY.vocabulary
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder))
    assert model.dtype == torch.float32
    if name == "llama":
        assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (4, 2)


def test_other_recipes_and_texts_are_other_models(text, tmp_path):
    recipe = replace(TINY, steps=1)
    changed = lm.Text({**text.train, "6.py": "pass\n"}, text.test)
    folders = {
        lm.model_folder("gpt", recipe, text, tmp_path),
        lm.model_folder("llama", recipe, text, tmp_path),
        lm.model_folder("gpt", replace(recipe, seed=1), text, tmp_path),
        lm.model_folder("gpt", recipe, changed, tmp_path),
    }
    assert len(folders) == 4


def test_an_interrupted_training_goes_on_to_the_same_weights(text, tmp_path, monkeypatch):
    monkeypatch.setattr(lm, "CHECKPOINT_STEPS", 2)
    whole = lm.model_folder("llama", TINY, text, tmp_path / "whole")

    def interrupt(done, of, loss):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lm.model_folder("llama", TINY, text, tmp_path / "cut", interrupt)
    seen = []
    resumed = lm.model_folder("llama", TINY, text, tmp_path / "cut", lambda done, of, loss: seen.append(done))
    assert seen == [5, 6]
    a, b = (transformers.AutoModelForCausalLM.from_pretrained(str(f)).state_dict() for f in (whole, resumed))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_split_is_by_whole_files_and_the_same_every_time(tmp_path):
    for i in range(64):
        folder = tmp_path / "package" / ("tests" if i % 8 == 0 else f"part{i % 3}")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"module_{i}.py").write_text(f"# file {i}\n")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text("installed\n")
    text = lm.read_text(tmp_path)
    assert lm.read_text(tmp_path) == text and lm.read_text(tmp_path).fingerprint == text.fingerprint
    names = [*text.train, *text.test]
    assert len(names) == len(set(names)) == 56
    assert not any("tests" in name or "site-packages" in name for name in names)
    assert list(text.train) == sorted(text.train) and 0 < len(text.test) < len(text.train)
    # A file's side depends on its own path only.
    (tmp_path / "package" / "part0" / "new.py").write_text("new\n")
    assert set(lm.read_text(tmp_path).test) - {"package/part0/new.py"} == set(text.test)


def test_the_standard_library_is_there():
    text = lm.read_text()
    assert "argparse.py" in {**text.train, **text.test} and len(text.test) > 5
    assert sum(map(len, text.train.values())) > 20 * sum(map(len, text.test.values())) / 4


def test_the_tokenizer_gives_back_what_it_was_given(text):
    tokenizer = lm.train_tokenizer(list(text.train.values()), TINY.vocabulary)
    odd = "def naïve(x):\n\treturn '→ 漢字' * 3\n"
    assert tokenizer.decode(tokenizer(odd)["input_ids"]) == odd
    rows = lm.windows(["ab", "cd"], tokenizer, 1)[:, 0].tolist()
    ab, cd = tokenizer("ab")["input_ids"], tokenizer("cd")["input_ids"]
    assert rows == [tokenizer.eos_token_id, *ab, tokenizer.eos_token_id, *cd]


@pytest.mark.parametrize("shape", [(1, 2), (3, 7), (10, 16)])
def test_perplexity_of_a_uniform_model_is_the_size_of_its_vocabulary(shape):
    ids = torch.randint(0, 50, shape)
    assert lm.perplexity(lambda x: torch.zeros(*x.shape, 50), ids) == pytest.approx(50)


def test_perplexity_is_that_of_the_next_token():
    ids = torch.randint(0, 20, (5, 9))
    logits = torch.randn(20, 20, dtype=torch.float64)
    right = [-float(logits[a].log_softmax(-1)[b]) for row in ids.tolist() for a, b in itertools.pairwise(row)]
    assert lm.perplexity(lambda x: logits[x], ids, batch=2) == pytest.approx(
        math.exp(sum(right) / len(right)), rel=1e-5
    )


def test_unigram_perplexity_counts_tokens():
    train = torch.tensor([[0, 0, 0, 1, 1]])
    # Counts with one added: 4, 3 and 1 of 8; the first token of a row is not predicted.
    expected = math.exp(-(math.log(4 / 8) + math.log(1 / 8)) / 2)
    assert lm.unigram_perplexity(train, torch.tensor([[1, 0, 2]]), 3) == pytest.approx(expected)


def test_a_sample_is_the_same_every_time_and_has_no_row_twice():
    rows = torch.arange(40).reshape(20, 2)
    assert torch.equal(lm.sample(rows, 5), lm.sample(rows, 5)) and len(lm.sample(rows, 99)) == 20
    assert len(set(lm.sample(rows, 12)[:, 0].tolist())) == 12
    assert not torch.equal(lm.sample(rows, 5, 1), lm.sample(rows, 5, 2))
