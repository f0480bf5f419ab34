"""Vocabulary: masked equals cut, what the kept words still give, the words of a corpus, and wishes that cannot be had."""

from __future__ import annotations

import functools
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers as hf

from checks import groups_of, randomise, run_onnx
from moe_models import WORDS
from tilecut import PruneConfig, compile_pruned, load
from tilecut.make_cases import make_inputs
from tilecut_passes.capture import capture
from tilecut_passes.mask import Mask
from tilecut_passes.plan import PrunePlan
from tilecut_passes.prune import Prune
from tilecut_passes.remap_ids import LEAST
from tilecut_passes.run_passes import largest_error, run_passes
from tilecut_runtime.errors import ConfigError, InputError, PlanError
from tiny_tokenizer import CLS, SIZE, UNK, byte_tokenizer, ids_of, saved_with_tokenizer
from zoo import GQA

SHAPES = ((2, 9), (3, 13))


@functools.lru_cache(maxsize=2)
def made(name):
    model = randomise(WORDS[name]())
    return model, capture(model)


def plan_of(graph, kept, unknown=None):
    groups = groups_of(graph, "vocab")
    plan = PrunePlan.keep_all(graph, groups).keeping({g.name: kept for g in groups})
    return replace(plan, groups=tuple(replace(g, unknown=unknown) for g in plan.groups))


def after(graph, one):
    changed = graph.copy()
    run_passes(changed, [one])
    return changed


@pytest.mark.parametrize("name", WORDS)
def test_masked_equals_cut(name):
    _, graph = made(name)
    (group,) = groups_of(graph, "vocab")
    assert group.size == 99
    for seed in range(3):
        rng = random.Random(seed)
        kept = sorted(rng.sample(range(99), rng.randint(2, 98)))
        plan = plan_of(graph, kept, rng.choice([None, rng.choice(kept)]))
        masked, cut = after(graph, Mask(plan)), after(graph, Prune(plan))
        assert all(cut.tensor(m.parameter).shape[m.dim] == len(kept) for m in group.members)
        for shape in SHAPES:
            inputs = make_inputs(graph, *shape, seed=seed)
            assert largest_error(masked.run(inputs), cut.run(inputs)) <= 1e-5


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert_mlm"])
def test_text_of_words_that_stay_gives_the_dense_logits_of_those(name):
    _, graph = made(name)
    kept = list(range(5, 74))
    cut = after(graph, Prune(plan_of(graph, kept)))
    inputs = make_inputs(graph, 3, 11, seed=1)
    inputs["input_ids"] = torch.randint(5, 74, (3, 11), generator=torch.Generator().manual_seed(0))
    want, got = graph.run(inputs)["logits"], cut.run(inputs)["logits"]
    assert got.shape == want.shape
    assert torch.allclose(got[..., kept], want[..., kept], atol=1e-5, rtol=1e-5)
    gone = [i for i in range(99) if i not in set(kept)]
    assert (got[..., gone] == LEAST).all()
    assert torch.isin(got.argmax(-1), torch.tensor(kept)).all()


def test_a_word_that_went_is_read_as_the_unknown_one():
    _, graph = made("gpt2")
    cut = after(graph, Prune(plan_of(graph, list(range(50)), unknown=7)))
    inputs = make_inputs(graph, 2, 6, seed=0, ragged=False)
    gone, known = (inputs["input_ids"].clamp_max(49).clone() for _ in range(2))
    gone[:, 2], known[:, 2] = 90, 7
    assert largest_error(cut.run({**inputs, "input_ids": known}), cut.run({**inputs, "input_ids": gone})) == 0


def test_the_plan_keeps_the_unknown_word_in_json():
    _, graph = made("gpt2")
    plan = plan_of(graph, [1, 4, 9], unknown=4)
    assert PrunePlan.from_json(plan.as_json()) == plan
    with pytest.raises(PlanError, match="does not keep the unit that stands for those that go"):
        after(graph, Prune(plan_of(graph, [1, 4], unknown=5)))


def test_a_tied_model_loses_thirty_percent_of_its_words_and_reads_the_corpus_as_before(tmp_path):
    torch.manual_seed(0)
    config = hf.LlamaConfig(**{**GQA, "vocab_size": SIZE}, tie_word_embeddings=True)
    model = saved_with_tokenizer(tmp_path / "model", hf.LlamaForCausalLM(config))
    dense = capture(model)
    texts = ["".join(map(chr, range(32, 127))), "a b c" * 4]
    kept = {i for text in texts for i in ids_of(text)}
    more = tuple(sorted(kept | set(range(4, 182))))
    artifact = compile_pruned(
        model, "edge", None, None,
        PruneConfig(kinds=("vocab",), vocabulary=more, at={"sequence": 16}), tmp_path / "out", measure=False,
    )  # fmt: skip
    (group,) = artifact.plan.groups
    assert group.kind == "vocab" and len(group.kept) <= 0.75 * SIZE and group.unknown == UNK
    ids = torch.tensor([ids_of("the same text")])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    want = dense.run(inputs)["logits"][..., list(group.kept)]
    with torch.no_grad():
        module = artifact.module()(**inputs)["logits"]
    onnx = run_onnx(artifact.path / "model.onnx", inputs)["logits"]
    for got in (module, onnx):
        assert torch.allclose(got[..., list(group.kept)], want, atol=1e-4, rtol=1e-4)
        assert torch.isin(got.argmax(-1), torch.tensor(group.kept)).all()


def test_text_goes_round_through_the_artifact(tmp_path):
    """The ids of the uncut tokenizer go in, the words that it predicts come out and are text again."""
    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=CLS)
    model = saved_with_tokenizer(tmp_path / "model", hf.GPT2LMHeadModel(config))
    texts = ("a font for Tifinagh", "the quick brown fox", "tools for pruned transformers")
    asked = PruneConfig(kinds=("vocab",), vocabulary=texts)
    artifact = compile_pruned(model, "edge", config=asked, output=tmp_path / "out", measure=False)
    (group,) = artifact.plan.groups
    assert len(group.kept) < 0.7 * SIZE
    numbers = artifact.report["parameters"]
    assert numbers["dense"] - numbers["pruned"] == 32 * (SIZE - len(group.kept))
    session, tokenizer = load(tmp_path / "out"), byte_tokenizer()
    # Ids are those of the whole vocabulary still.
    assert session.manifest.table_rows["input_ids"] == SIZE
    with pytest.raises(InputError, match="input_ids: an id that the model has no embedding for; got -1"):
        session.run({spec.name: np.full((1, 4), -1 if spec.name == "input_ids" else 1) for spec in session.inputs})
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            want = model(**inputs).logits.numpy()[..., group.kept]
        got = session.run({name: x.numpy() for name, x in inputs.items()})["logits"]
        assert np.abs(got[..., group.kept] - want).max() <= 1e-4 * np.abs(want).max()
        best = got.argmax(-1)[0]
        assert (best == np.array(group.kept)[want[0].argmax(-1)]).all()
        letters = tokenizer.convert_ids_to_tokens(ids[0, 1:-1].tolist())
        assert "".join(letters).replace("Ġ", " ") == text
        assert all(token is not None for token in tokenizer.convert_ids_to_tokens(best.tolist()))


def test_the_words_of_a_corpus_stay_and_special_tokens(tmp_path):
    model = saved_with_tokenizer(tmp_path / "model")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("a bad cab\n", encoding="utf-8")
    config = PruneConfig(kinds=("vocab",), vocabulary=str(corpus), at={"sequence": 16})
    artifact = compile_pruned(model, "edge", None, None, config, tmp_path / "out", measure=False)
    (group,) = [g for g in artifact.plan.groups if g.kind == "vocab"]
    assert set(group.kept) == {0, 1, 2, 3, *ids_of("a bad cab")}
    assert PrunePlan.read(artifact.path / "plan.json").groups[-1].unknown == UNK


def test_impossible_wishes():
    model, _ = made("gpt2")
    for given, said in (
        ({"kinds": ("vocab",)}, "go together"),
        ({"vocabulary": (1, 2)}, "go together"),
        ({"kinds": ("vocab",), "vocabulary": ()}, "no word would stay"),
    ):
        with pytest.raises(ConfigError, match=said):
            PruneConfig(**given)
    for given, said in (((1, 200), r"an id that there is not; got 200; wanted 0\.\.98"), ("texts.txt", "no tokenizer beside it")):
        with pytest.raises(ConfigError, match=said):
            compile_pruned(model, "edge", config=PruneConfig(kinds=("vocab",), vocabulary=given), measure=False)
