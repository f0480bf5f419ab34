"""Words that a corpus does not have go from the table and the head; ids and logits keep their numbers."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import transformers

from checks import randomise
from test_models import made, outputs
from tilecut import PruneConfig, compile_pruned, load
from tilecut_passes.axes.groups import Group, find_groups
from tilecut_passes.axes.infer import infer
from tilecut_passes.capture import capture
from tilecut_passes.graph import Graph
from tilecut_passes.mask import Mask
from tilecut_passes.plan import PrunePlan
from tilecut_passes.prune import Prune
from tilecut_passes.run_passes import largest_error
from tilecut_runtime.errors import ConfigError
from tiny_tokenizer import SIZE, UNK, byte_tokenizer

TEXTS = ("a font for Tifinagh", "the quick brown fox", "tools for pruned transformers")


def bert_mlm():
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64,
    )  # fmt: skip
    return randomise(transformers.BertForMaskedLM(config)), None


MODELS = {name: lambda name=name: made(name) for name in ("gpt2", "llama_tied", "llama_gqa", "t5", "bert_eager", "hand_gpt")}
MODELS["bert_mlm"] = bert_mlm


def words_of(graph: Graph) -> list[Group]:
    return [g for g in find_groups(infer(graph)) if g.kind == "vocab"]


@pytest.mark.parametrize("name", MODELS)
def test_masked_is_cut(name):
    graph = capture(*MODELS[name]())
    (group,) = words_of(graph)
    kept = sorted(random.Random(1).sample(range(group.size), 60))
    plan = PrunePlan.keep_all(graph, [group]).keeping({group.name: kept})
    want = outputs(graph, Mask(plan))
    dense = outputs(graph, Mask(PrunePlan.keep_all(graph, [])))
    for a, b, whole in zip(want, outputs(graph, Prune(plan)), dense, strict=True):
        assert largest_error(a, b) <= 1e-5
        assert largest_error(a, whole) > 1e-3


@pytest.fixture
def tied_gpt(tmp_path):
    """The folder of a GPT-2 with tied embeddings and a tokenizer of bytes."""
    config = transformers.GPT2Config(vocab_size=SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    model = randomise(transformers.GPT2LMHeadModel(config))
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_corpus_keeps_its_words_and_text_goes_round(tied_gpt, tmp_path):
    tokenizer = byte_tokenizer()
    config = PruneConfig(kinds=("vocab",), vocabulary=TEXTS)
    artifact = compile_pruned(tied_gpt, config=config, output=tmp_path / "out", measure=False)
    (group,) = [g for g in artifact.plan.groups if g.kind == "vocab"]
    assert len(group.kept) < 0.7 * group.size and group.unknown == UNK
    assert {i for text in TEXTS for i in tokenizer(text)["input_ids"]} <= set(group.kept)
    report = artifact.report
    assert report["parameters"]["dense"] - report["parameters"]["pruned"] == 32 * (group.size - len(group.kept))
    session = load(tmp_path / "out")
    dense = transformers.GPT2LMHeadModel.from_pretrained(str(tied_gpt)).eval()
    gone = sorted(set(range(SIZE)) - set(group.kept))
    for text in TEXTS:
        ids = np.array([tokenizer(text)["input_ids"]])
        logits = session.run({"input_ids": ids, "attention_mask": np.ones_like(ids)})["logits"]
        with torch.no_grad():
            want = dense(input_ids=torch.from_numpy(ids)).logits.numpy()
        # Nothing that the text needs is another number; the others are never predicted.
        assert logits.shape == want.shape
        assert np.abs(logits - want)[..., group.kept].max() <= 1e-4 * np.abs(want).max()
        assert (logits[..., gone] < -1e37).all()
        # A tokenizer of bytes without a decoder: blanks are a letter of their own.
        assert tokenizer.decode(ids[0], skip_special_tokens=True).replace(" ", "").replace("Ġ", " ") == text
        assert set(logits.argmax(-1).flatten()) <= set(group.kept)


def test_a_word_that_went_is_read_as_the_unknown_one(tied_gpt, tmp_path):
    config = PruneConfig(kinds=("vocab", "neurons"), vocabulary=(10, 11, 12, 13), sparsity=0.2, method="magnitude")
    artifact = compile_pruned(tied_gpt, config=config, output=tmp_path / "out", measure=False)
    (group,) = [g for g in artifact.plan.groups if g.kind == "vocab"]
    session = load(tmp_path / "out")
    runs = [
        session.run({"input_ids": np.array([[10, odd, 12]]), "attention_mask": np.ones((1, 3), dtype=np.int64)})["logits"]
        for odd in (200, group.unknown)
    ]
    assert np.array_equal(*runs)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"kinds": ("vocab",)}, "go together"),
        ({"vocabulary": (1, 2)}, "go together"),
        ({"kinds": ("vocab",), "vocabulary": ()}, "vocabulary is empty"),
        ({"kinds": ("vocab",), "vocabulary": (1, 99)}, "an id that there is not; got 99"),
        ({"kinds": ("vocab",), "vocabulary": "texts.txt"}, "no tokenizer"),
    ],
)
def test_impossible_wishes(config, match):
    with pytest.raises(ConfigError, match=match):
        compile_pruned(bert_mlm()[0], config=PruneConfig(method="magnitude", **config), output="never", measure=False)
