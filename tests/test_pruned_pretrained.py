"""Pruned models as models of transformers: forward, losses, pipelines, generation, the Trainer, and folders of them."""

import copy
import inspect
import json
import os
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.modeling_outputs import SequenceClassifierOutput

import tilecut
from checks import ROOT, TinyMlp, compiled, randomise, text_batch, tiny_bert
from generation_models import pair
from tilecut import PruneConfig, from_pretrained
from tilecut_passes.example_inputs import inputs_with_cache
from tilecut_runtime.errors import ArtifactError, InputError
from tiny_tokenizer import SIZE, byte_tokenizer, saved_with_tokenizer

LENGTH = 96
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
BERT = transformers.BertConfig(vocab_size=SIZE, max_position_embeddings=LENGTH, num_labels=3, **SIZES)
LLAMA = transformers.LlamaConfig(
    vocab_size=SIZE, num_key_value_heads=2, max_position_embeddings=LENGTH, pad_token_id=0, bos_token_id=1,
    eos_token_id=2, tie_word_embeddings=True, **SIZES,
)  # fmt: skip
GPT2 = transformers.GPT2Config(
    vocab_size=SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=LENGTH, bos_token_id=1, eos_token_id=2, pad_token_id=0
)
T5 = transformers.T5Config(
    vocab_size=SIZE, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0
)
HALF = PruneConfig(sparsity=0.5, block=8, method="magnitude", at={"sequence": 16})


def artifact_of(model, folder, config=HALF, **options):
    return compiled("edge", folder, model=randomise(model), calibration=None, config=config, **options)


def language_tokenizer():
    """The tokenizer of bytes for models without token types; it writes no [SEP], after which generation would stop."""
    made = byte_tokenizer()
    made.model_input_names = ["input_ids", "attention_mask"]
    made.padding_side = "left"
    return made


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return artifact_of(transformers.BertForSequenceClassification(BERT), tmp_path_factory.mktemp("a") / "bert")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return artifact_of(transformers.LlamaForCausalLM(LLAMA), tmp_path_factory.mktemp("a") / "llama")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return artifact_of(transformers.GPT2LMHeadModel(GPT2), tmp_path_factory.mktemp("a") / "gpt2")


@pytest.fixture(scope="module")
def with_cache(tmp_path_factory):
    model = randomise(transformers.LlamaForCausalLM(LLAMA))
    return artifact_of(model, tmp_path_factory.mktemp("a") / "cache", example_inputs=inputs_with_cache(model))


def test_it_is_a_model_of_its_original_class(classifier):
    model = classifier.hf_model()
    assert isinstance(model, transformers.BertForSequenceClassification)
    assert type(model).__name__ == "BertForSequenceClassification"
    assert inspect.signature(model.forward) == inspect.signature(
        transformers.BertForSequenceClassification(BERT).forward
    )
    assert model.config.num_labels == 3 and not model.training
    assert model.num_parameters() < transformers.BertForSequenceClassification(BERT).num_parameters()


def test_layers_of_different_sizes_give_what_the_pruned_module_gives(classifier):
    model, batch = classifier.hf_model(), text_batch(3, 9, vocab=SIZE)
    assert any(len(g.kept) < g.size for g in classifier.plan.groups)
    out = model(**batch)
    assert isinstance(out, SequenceClassifierOutput)
    assert torch.equal(out.logits, classifier.module()(**batch)["logits"])
    assert torch.equal(model(*[batch[k] for k in ("input_ids", "attention_mask", "token_type_ids")]).logits, out.logits)
    assert torch.equal(model(**batch, return_dict=False)[0], out.logits)


def test_a_mask_and_types_that_are_left_out_are_what_the_original_makes_of_it(classifier):
    model, batch = classifier.hf_model(), text_batch(1, 9, vocab=SIZE)
    plain = {"input_ids": batch["input_ids"]}
    full = {**plain, "attention_mask": torch.ones(1, 9), "token_type_ids": torch.zeros(1, 9)}
    full = {k: v.long() for k, v in full.items()}
    assert torch.equal(model(**plain).logits, model(**full).logits)
    assert torch.equal(model(**plain, attention_mask=torch.ones(1, 9, dtype=torch.bool)).logits, model(**full).logits)


KINDS = [("hidden",), ("layers", "neurons")]


@pytest.mark.parametrize("kinds", KINDS, ids=["hidden width", "missing branches"])
def test_other_widths_and_missing_branches_come_along(kinds, tmp_path):
    config = PruneConfig(sparsity=0.4, block=8, method="magnitude", kinds=kinds, at={"sequence": 16})
    artifact = artifact_of(transformers.BertForSequenceClassification(BERT), tmp_path / "a", config)
    cut = [g.kind for g in artifact.plan.groups if len(g.kept) < g.size]
    assert ("hidden" if "hidden" in kinds else "layers") in cut
    batch = text_batch(3, 9, vocab=SIZE)
    want = artifact.module()(**batch)["logits"]
    artifact.hf_model().save_pretrained(tmp_path / "saved")
    assert torch.equal(from_pretrained(tmp_path / "saved")(**batch).logits, want)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"inputs_embeds": torch.ones(1, 4, 32)}, "captured without inputs_embeds; wanted input_ids, attention_mask"),
        ({"output_hidden_states": True}, "captured without output_hidden_states"),
        ({"input_ids": None}, "missing input; got nothing; wanted input_ids as well"),
        ({"position_ids": torch.tensor([[3, 2, 1, 0]])}, "captured without position_ids, and these are not those"),
        ({"start_positions": torch.ones(1).long()}, "its loss is not known here; got start_positions"),
    ],
)
def test_what_the_graph_was_captured_without_is_refused(classifier, given, message):
    with pytest.raises(InputError, match=f"BertForSequenceClassification: .*{message}"):
        classifier.hf_model()(**{"input_ids": torch.ones(1, 4, dtype=torch.long), **given})


def ids(*shape, most=SIZE):
    return torch.randint(3, most, shape)


CASES = {
    "classes": (transformers.BertForSequenceClassification, BERT, lambda: {"labels": torch.tensor([2, 0])}),
    "multiple": (transformers.BertForSequenceClassification, BERT, lambda: {"labels": torch.rand(2, 3).round()}),
    "regression": (
        transformers.BertForSequenceClassification, {"num_labels": 1}, lambda: {"labels": torch.rand(2)},
    ),
    "tokens": (transformers.BertForTokenClassification, BERT, lambda: {"labels": torch.randint(0, 3, (2, 7))}),
    "masked": (transformers.BertForMaskedLM, BERT, lambda: {"labels": ids(2, 7).masked_fill(ids(2, 7) % 2 == 0, -100)}),
    "spans": (
        transformers.BertForQuestionAnswering, {"num_labels": 2},
        lambda: {"start_positions": torch.tensor([1, 3]), "end_positions": torch.tensor([2, 6])},
    ),
    "causal": (transformers.LlamaForCausalLM, LLAMA, lambda: {"labels": ids(2, 7)}),
    "gpt2": (transformers.GPT2LMHeadModel, GPT2, lambda: {"labels": ids(2, 7)}),
    "decoder classes": (
        transformers.LlamaForSequenceClassification, LLAMA, lambda: {"labels": torch.tensor([1, 0])},
    ),
    "encoder-decoder": (transformers.T5ForConditionalGeneration, T5, lambda: {"labels": ids(2, 5)}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_losses_and_outputs_are_the_originals(case, tmp_path):
    cls, config, labels = CASES[case]
    config = copy.deepcopy(config) if not isinstance(config, dict) else transformers.BertConfig(
        vocab_size=SIZE, max_position_embeddings=LENGTH, **SIZES, **config
    )  # fmt: skip
    original = randomise(cls(config))
    model = artifact_of(original, tmp_path / "dense", config=None).hf_model()
    batch = {"input_ids": ids(2, 7), **labels()}
    want, got = original(**batch, use_cache=False) if config.model_type != "bert" else original(**batch), model(**batch)
    assert type(got) is type(want)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-4, atol=1e-5)
    logits = "start_logits" if case == "spans" else "logits"
    torch.testing.assert_close(got[logits], want[logits], rtol=1e-4, atol=1e-4)
    if case in ("causal", "gpt2", "encoder-decoder"):
        many = {"num_items_in_batch": torch.tensor(31)}
        if case != "encoder-decoder":
            torch.testing.assert_close(
                model(**batch, **many).loss, original(**batch, **many).loss, rtol=1e-4, atol=1e-5
            )


def greedy(module, given, steps):
    """The most likely next token, again and again, from the plain module."""
    given = given.clone()
    for _ in range(steps):
        with torch.no_grad():
            out = module(input_ids=given, attention_mask=torch.ones_like(given))
        given = torch.cat([given, out["logits"][:, -1].argmax(-1, keepdim=True)], 1)
    return given


@pytest.mark.parametrize("which", ["llama", "gpt2"])
def test_greedy_generation_is_the_pruned_modules(request, which):
    artifact = request.getfixturevalue(which)
    model, prompt = artifact.hf_model(), ids(2, 5)
    got = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert torch.equal(got, greedy(artifact.module(), prompt, 12))
    asked = model.generate(prompt, max_new_tokens=12, do_sample=False, use_cache=True, eos_token_id=None)
    assert torch.equal(asked, got)


def test_speech_is_written_down_as_by_the_original(tmp_path):
    original = pair("whisper")
    model = compiled("edge", tmp_path / "dense", model=original, calibration=None, config=None).hf_model()
    sound = torch.randn(2, 16, 80, generator=torch.Generator().manual_seed(0))
    begun = torch.tensor([[3, 8], [3, 9]])
    found = [
        one.generate(input_features=sound, max_new_tokens=12, do_sample=False, use_cache=False, decoder_input_ids=begun)
        for one in (original, model)
    ]
    assert torch.equal(*found) and len(set(found[0][0].tolist())) > 2


@pytest.mark.slow
@pytest.mark.parametrize("case", ["causal", "gpt2", "encoder-decoder"])
def test_beams_and_samples_are_the_originals(case, tmp_path):
    cls, config, _ = CASES[case]
    original = randomise(cls(copy.deepcopy(config)))
    model, prompt = artifact_of(original, tmp_path / "dense", config=None).hf_model(), ids(2, 6)
    for options in ({}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}):
        found = []
        for one in (original, model):
            torch.manual_seed(0)
            mask = torch.ones_like(prompt)
            found.append(one.generate(prompt, attention_mask=mask, max_new_tokens=8, eos_token_id=None, **options))
        assert torch.equal(*found), options


@pytest.mark.parametrize("which", ["llama", "gpt2"])
def test_prompts_padded_on_the_left_go_on_as_alone(request, which):
    model = request.getfixturevalue(which).hf_model()
    prompts = [ids(1, n) for n in (3, 6, 5)]
    wide = torch.cat([torch.nn.functional.pad(p, (6 - p.shape[1], 0)) for p in prompts])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(p), (6 - p.shape[1], 0)) for p in prompts])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    got = model.generate(wide, attention_mask=mask, **options)
    for prompt, row in zip(prompts, got, strict=True):
        assert torch.equal(
            row[6:], model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, prompt.shape[1] :]
        )


def test_with_a_cache_in_the_graph_generation_uses_it(with_cache, monkeypatch):
    model, prompt = with_cache.hf_model(), ids(2, 5)
    lengths = []
    forward = model._run
    monkeypatch.setattr(
        model, "_run", lambda given, *rest: lengths.append(given["input_ids"].shape[1]) or forward(given, *rest)
    )
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(prompt)}
    got = model.generate(prompt, **options)
    assert lengths == [5, 1, 1, 1, 1, 1]
    assert torch.equal(got, model.generate(prompt, use_cache=False, **options))
    assert lengths[6:] == [5, 6, 7, 8, 9, 10]


def test_without_a_cache_in_the_graph_one_that_is_given_is_refused(llama):
    cache = transformers.DynamicCache(ddp_cache_data=[(torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 8))])
    with pytest.raises(
        InputError, match="captured without a key-value cache; got past_key_values; generate with use_cache"
    ):
        llama.hf_model()(ids(1, 2), past_key_values=cache)


def test_pipelines_take_it(classifier, llama, tmp_path):
    tokenizer, texts = byte_tokenizer(), ["a short text", "and another one that is longer"]
    judge = transformers.pipeline("text-classification", model=classifier.hf_model(), tokenizer=tokenizer)
    found = judge(texts, batch_size=2)
    with torch.no_grad():
        logits = [classifier.module()(**tokenizer(t, return_tensors="pt"))["logits"] for t in texts]
    assert [row["label"] for row in found] == [f"LABEL_{one.argmax().item()}" for one in logits]
    assert [row["score"] for row in found] == pytest.approx([one.softmax(-1).max().item() for one in logits], abs=1e-5)

    encoder = artifact_of(tiny_bert(vocab=SIZE), tmp_path / "encoder")
    features = transformers.pipeline("feature-extraction", model=encoder.hf_model(), tokenizer=tokenizer)(texts[0])
    with torch.no_grad():
        want = encoder.module()(**tokenizer(texts[0], return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(torch.tensor(features), want)

    writer = transformers.pipeline("text-generation", model=llama.hf_model(), tokenizer=language_tokenizer())
    options = {"max_new_tokens": 5, "do_sample": False, "return_tensors": True}
    ids_of = lambda text: torch.tensor([language_tokenizer()(text)["input_ids"]])
    for text, [row] in zip(texts, writer(texts, batch_size=2, **options), strict=True):
        new = row["generated_token_ids"][-5:]
        assert list(new) == greedy(llama.module(), ids_of(text), 5)[0, -5:].tolist()


def trained(model, examples, folder, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, report_to=[],
        use_cpu=True, disable_tqdm=True, save_strategy="no", lr_scheduler_type="constant", **options,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=examples)
    trainer.train()
    return trainer, [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("which", ["classifier", "llama"])
def test_the_trainer_lowers_the_loss_and_saves_what_it_learned(request, which, tmp_path):
    model = request.getfixturevalue(which).hf_model()
    labels = lambda i, row: torch.tensor(i % 3) if which == "classifier" else row
    rows = [ids(8) for _ in range(8)]
    examples = [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": labels(i, row)}
        for i, row in enumerate(rows)
    ]
    trainer, losses = trained(model, examples, tmp_path / "run", max_steps=12)
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    trainer.save_model(str(tmp_path / "saved"))
    batch = {"input_ids": torch.stack(rows)}
    assert torch.equal(from_pretrained(tmp_path / "saved")(**batch).logits, model.eval()(**batch).logits)


def test_the_trainer_resumes_from_its_checkpoint(classifier, tmp_path):
    examples = [{"input_ids": ids(8), "labels": torch.tensor(i % 3)} for i in range(8)]

    def run(model, resume, steps):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=steps, save_steps=2, report_to=[],
            use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant",
        )  # fmt: skip
        transformers.Trainer(model, arguments, train_dataset=examples).train(resume_from_checkpoint=resume)
        return model

    first = run(classifier.hf_model(), None, 4)
    again = run(classifier.hf_model(), str(tmp_path / "checkpoint-2"), 4)
    for name, value in first.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, msg=name)


SCRIPT = """
import sys, torch, tilecut
model = tilecut.from_pretrained(sys.argv[1])
given = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    torch.save(model(**given).logits, sys.argv[3])
print(type(model).__name__)
"""


@pytest.mark.parametrize("which", ["classifier", "llama"])
def test_a_saved_model_is_the_same_in_a_fresh_process(request, which, tmp_path):
    artifact = request.getfixturevalue(which)
    model, folder = artifact.hf_model(), tmp_path / "saved"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01
    model.save_pretrained(folder)
    given = {"input_ids": ids(3, 9)}
    torch.save(given, tmp_path / "given.pt")
    for source in (folder, artifact.path):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(source), str(tmp_path / "given.pt"), str(tmp_path / "out.pt")],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == type(model).__name__
        want = model if source == folder else artifact.hf_model()
        with torch.no_grad():
            assert torch.equal(torch.load(tmp_path / "out.pt", weights_only=True), want(**given).logits)


def test_a_saved_folder_is_plain_files_that_save_again_alike(classifier, tmp_path):
    classifier.hf_model().save_pretrained(tmp_path / "one")
    files = {p.name for p in (tmp_path / "one").iterdir()}
    assert files == {"config.json", "model.safetensors", "plan.json", "module.pt2"}
    assert (tmp_path / "one" / "plan.json").read_bytes() == (classifier.path / "plan.json").read_bytes()
    held = load_file(tmp_path / "one" / "model.safetensors")
    names = set(transformers.BertForSequenceClassification(BERT).state_dict())
    assert {n for n in held if n.startswith(("bert.encoder", "classifier"))} <= names
    model = from_pretrained(tmp_path / "one")
    assert not hasattr(model.config, "tilecut")
    assert type(model).from_pretrained(tmp_path / "one").config.to_dict() == model.config.to_dict()
    model.save_pretrained(tmp_path / "two")
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    model.save_pretrained(tmp_path / "one")
    assert torch.equal(load_file(tmp_path / "one" / "model.safetensors")["classifier.bias"], held["classifier.bias"])


def test_the_tokenizers_files_and_the_generation_config_come_along(tmp_path):
    tokenizer = language_tokenizer()
    saved_with_tokenizer(tmp_path / "dense", transformers.LlamaForCausalLM(LLAMA))
    artifact = compiled("edge", tmp_path / "out", model=tmp_path / "dense", calibration=None, config=None)
    model = from_pretrained(artifact.path)
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again = from_pretrained(tmp_path / "saved")
    assert again.generation_config.max_new_tokens == 3 and again.generation_config.use_cache is False
    pipe = transformers.pipeline(
        "text-generation", again, tokenizer=transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    )
    assert pipe("abc", do_sample=False)[0]["generated_text"].startswith("abc")


def test_a_copy_has_weights_of_its_own(classifier):
    model, batch = classifier.hf_model(), text_batch(2, 5, vocab=SIZE)
    twin = copy.deepcopy(model)
    before = model(**batch).logits
    with torch.no_grad():
        twin.classifier.bias += 1
    assert torch.equal(model(**batch).logits, before) and not torch.equal(twin(**batch).logits, before)


def test_what_the_graph_makes_moves_with_the_weights(llama):
    model = llama.hf_model().to("meta")
    out = model(torch.ones(2, 5, dtype=torch.long, device="meta"))
    assert out.logits.device.type == "meta" and out.logits.shape == (2, 5, SIZE)


@pytest.fixture
def folder(classifier, tmp_path):
    classifier.hf_model().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_folder_that_is_no_such_model_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="not the folder of a pruned Hugging Face model: it holds no config.json"):
        from_pretrained(tmp_path / "missing")
    tiny_bert().save_pretrained(tmp_path / "dense")
    with pytest.raises(ArtifactError, match="not the config of a pruned model.*load the model with transformers"):
        from_pretrained(tmp_path / "dense")


def test_an_artifact_of_another_model_is_refused(tmp_path):
    artifact = compiled(
        "edge",
        tmp_path / "a",
        model=randomise(TinyMlp()),
        example_inputs=torch.randn(4, 12),
        calibration=None,
        config=None,
    )
    with pytest.raises(ArtifactError, match="TinyMlp is no model of transformers: .*artifact.module()"):
        artifact.hf_model()


def test_weights_that_do_not_fit_the_plan_are_refused(folder):
    held = load_file(folder / "model.safetensors")
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    save_file({**held, name: held[name][:-8].clone()}, folder / "model.safetensors")
    message = (
        rf"model.safetensors: tensor {name} does not fit plan.json and module.pt2; got .*; wanted .*; keep the files"
    )
    with pytest.raises(ArtifactError, match=message):
        from_pretrained(folder)
    save_file({k: v for k, v in held.items() if k != name}, folder / "model.safetensors")
    with pytest.raises(ArtifactError, match=f"tensor {name} is missing"):
        from_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ArtifactError, match="safetensors cannot read it"):
        from_pretrained(folder)


@pytest.mark.parametrize("name", ["module.pt2", "plan.json"])
def test_files_that_do_not_belong_together_are_refused(folder, llama, name):
    shutil.copyfile(llama.path / name, folder / name)
    with pytest.raises(ArtifactError, match=f"{name}: not the file that config.json was written with"):
        from_pretrained(folder)
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name}: file of the pruned model is missing"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "unknown format of a pruned model; got 2; wanted 1"),
        ({"inputs": 3}, "'tilecut' entry is damaged"),
        ({"sha256": {}}, "'tilecut' entry is damaged"),
        ({"model": "NoSuchModel"}, "transformers has no such model class; got NoSuchModel"),
    ],
)
def test_a_damaged_config_is_refused(folder, change, message):
    held = json.loads((folder / "config.json").read_text())
    held["tilecut"] |= change
    (folder / "config.json").write_text(json.dumps(held))
    with pytest.raises(ArtifactError, match=message):
        from_pretrained(folder)


def test_without_transformers_it_says_what_to_install(classifier, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for call in (classifier.hf_model, lambda: tilecut.from_pretrained(folder)):
        with pytest.raises(ArtifactError, match=r"transformers is not installed; pip install 'tilecut\[compile\]'"):
            call()


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="not in a checkout")
def test_the_code_in_the_docs_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "hugging_face.md").read_text(encoding="utf-8")
    held: dict[str, Any] = {}
    for block in text.split("```python\n")[1:]:
        exec(block.split("```")[0], held)
    assert type(held["again"]) is not type(held["model"]) and (tmp_path / "small-hf" / "plan.json").is_file()
