"""onnxruntime-genai's folder, seen by plain onnxruntime: names, counts by the mask, config, companions, refusals.

tests/test_ecosystem_genai.py opens it with the package itself.
"""

import json
import shutil

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import transformers
from torch import nn
from typer.testing import CliRunner

from generation_models import GROUPED, POSITIONS, VOCAB, decoder, talkative, written
from tilecut import Artifact, cli, compile_pruned, load
from tilecut_runtime.errors import ArtifactError
from tilecut_targets import write_onnx
from tiny_tokenizer import SIZE, saved_with_tokenizer

PROMPTS = [[5, 6, 7, 8], [9]]


def compiled(model, folder, inputs=None):
    dims = {name: {0: "batch", 1: "sequence"} for name in inputs} if inputs else None
    return compile_pruned(
        model, "edge", inputs, config=None, output=folder, dynamic_shapes=dims, generate=True, measure=False
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return compiled(decoder("llama"), tmp_path_factory.mktemp("genai") / "llama")


@pytest.fixture
def mine(llama, tmp_path):
    """A copy that may be damaged."""
    return shutil.copytree(llama.path, tmp_path / "artifact")


def continued(folder, prompts, steps):
    """What genai does with unshared caches: right-padded rows, a mask that grows by a column of ones, presents as pasts."""
    session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    tokens = np.zeros((len(prompts), max(map(len, prompts))), np.int64)
    mask = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)], mask[row, : len(prompt)] = prompt, 1
    caches = {i.name: np.zeros((len(prompts), i.shape[1], 0, i.shape[3]), np.float32) for i in session.get_inputs()[2:]}
    found = []
    for _ in range(steps):
        logits, *presents = map(np.asarray, session.run(None, {"input_ids": tokens, "attention_mask": mask, **caches}))
        assert logits.shape[1] == 1 and all(p.shape[2] == mask.shape[1] for p in presents)
        caches = dict(zip(caches, presents))
        tokens = logits[:, 0].argmax(-1)[:, None]
        mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
        found.append(tokens[:, 0])
    return np.stack(found, 1).tolist()


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_the_graph_counts_by_the_mask(name, llama, tmp_path):
    artifact = llama if name == "llama" else compiled(decoder(name), tmp_path / "made")
    want = load(artifact.path).generate(PROMPTS, max_new_tokens=24, eos=()).tokens
    folder = artifact.write_genai(tmp_path / "genai")
    assert continued(folder, PROMPTS, 24) == want
    graph = onnx.load(str(folder / "model.onnx")).graph
    assert [i.name for i in graph.input] == [
        "input_ids",
        "attention_mask",
        *(f"past_key_values.{i}.{part}" for i in (0, 1) for part in ("key", "value")),
    ]
    assert [o.name for o in graph.output] == [
        "logits",
        *(f"present.{i}.{part}" for i in (0, 1) for part in ("key", "value")),
    ]
    # The largest length of a row is no one's any more.
    assert not [n for n in graph.node if n.op_type == "ReduceMax"]


def test_config_and_files(llama, tmp_path):
    folder = llama.write_genai(str(tmp_path / "some" / "genai"))
    assert {p.name for p in folder.iterdir()} == {"model.onnx", "genai_config.json"}
    held = json.loads((folder / "genai_config.json").read_text())
    model, layers = held["model"], held["model"]["decoder"]
    assert (model["type"], model["vocab_size"], model["context_length"]) == ("decoder", VOCAB, POSITIONS)
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (1, [2], 0)
    assert [layers[name] for name in ("num_attention_heads", "num_key_value_heads", "num_hidden_layers")] == [4, 2, 2]
    assert layers["head_size"] == 16 and layers["inputs"]["past_key_names"] == "past_key_values.%d.key"
    assert held["search"] == {"do_sample": False, "max_length": POSITIONS, "past_present_share_buffer": True}


def test_a_model_written_by_hand_gets_genais_names(tmp_path):
    model, inputs = written("learned")
    artifact = compiled(model, tmp_path / "made", inputs)
    assert artifact.manifest.inputs[0].name == "ids"
    want = load(artifact.path).generate(PROMPTS, max_new_tokens=20).tokens
    folder = artifact.write_genai(tmp_path / "genai")
    assert continued(folder, PROMPTS, 20) == want
    special = json.loads((folder / "genai_config.json").read_text())["model"]
    assert (special["eos_token_id"], special["pad_token_id"]) == ([], 0)


def test_tokenizer_and_ends_that_the_model_never_says(tmp_path):
    sizes = {**GROUPED, "vocab_size": SIZE, "eos_token_id": [7, SIZE], "pad_token_id": None}
    model = talkative(
        saved_with_tokenizer(tmp_path / "hf", transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)))
    )
    folder = compiled(model, tmp_path / "made").write_genai(tmp_path / "genai")
    assert {"tokenizer.json", "tokenizer_config.json"} <= {p.name for p in folder.iterdir()}
    special = json.loads((folder / "genai_config.json").read_text())["model"]
    assert (special["eos_token_id"], special["pad_token_id"]) == ([7], 7)


def test_weights_beside_the_model_stay_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(write_onnx, "EXTERNAL_DATA_BYTES", 1000)
    artifact = compiled(decoder("llama"), tmp_path / "made")
    assert "model.onnx.data" in artifact.manifest.files
    want = load(artifact.path).generate(PROMPTS, max_new_tokens=5, eos=()).tokens
    folder = artifact.write_genai(tmp_path / "genai")
    shutil.rmtree(artifact.path)
    assert (folder / "model.onnx.data").stat().st_size > 100_000 > (folder / "model.onnx").stat().st_size
    assert continued(folder, PROMPTS, 5) == want


def test_the_command(llama, tmp_path):
    done = CliRunner().invoke(cli.app, ["export-genai", str(llama.path), str(tmp_path / "genai"), "--json"])
    assert done.exit_code == 0, done.output
    assert (
        json.loads(done.stdout) == {"path": str(tmp_path / "genai")} and (tmp_path / "genai" / "model.onnx").is_file()
    )


def test_an_artifact_without_a_cache(tmp_path):
    made = compile_pruned(
        nn.Linear(4, 2), "edge", torch.ones(2, 4), config=None, output=tmp_path / "made", measure=False
    )
    with pytest.raises(
        ArtifactError, match="without a cache, which onnxruntime-genai needs; compile it with generate=True"
    ):
        made.write_genai(tmp_path / "genai")


def test_a_folder_that_holds_something_is_left_alone(llama, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="the output folder exists and is not empty; name another folder"):
        llama.write_genai(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(ArtifactError, match="the output path is a file"):
        llama.write_genai(tmp_path / "mine.txt")
    (tmp_path / "empty").mkdir()
    assert (llama.write_genai(tmp_path / "empty") / "genai_config.json").is_file()


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ('"past_key_values.1.key"', '"cache.key"', r"numbers caches by one pattern; got cache\.key among 4 caches"),
        (
            '"past_key_values.1.value",\n   "dtype": "float32"',
            '"past_key_values.1.value",\n   "dtype": "float16"',
            "layer 1",
        ),
    ],
)
def test_caches_that_the_format_has_no_words_for(old, new, why, mine, tmp_path):
    path = mine / "manifest.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ArtifactError, match=why):
        Artifact(mine).write_genai(tmp_path / "genai")
    assert not (tmp_path / "genai").exists()


def test_an_altered_model_is_named(mine, tmp_path):
    content = bytearray((mine / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (mine / "model.onnx").write_bytes(content)
    with pytest.raises(ArtifactError, match="model.onnx: file was altered"):
        Artifact(mine).write_genai(tmp_path / "genai")
