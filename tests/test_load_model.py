"""A model from its folder: mapped, tied, float32 where asked, buffers computed; and what is wrong with a folder."""

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from checks import randomise
from tilecut.load_model import load_model
from tilecut_passes.disk_tensor import LEAST_BYTES, is_file
from tilecut_runtime.errors import CaptureError

CONFIG = {
    "vocab_size": 3000, "hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 2200,
    "max_position_embeddings": 64,
}  # fmt: skip


def saved(folder, dtype=torch.float32, **options):
    """Write a model of that type; returns it in float32."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter).to(dtype) * 0.3)
    copy.deepcopy(model).to(dtype).save_pretrained(folder, max_shard_size="2MB")
    return model


def large(model):
    return [p for p in model.parameters() if p.numel() * 4 >= LEAST_BYTES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_it_is_the_model_that_was_saved(dtype, tied, tmp_path):
    original = saved(tmp_path / "model", dtype, tie_word_embeddings=tied)
    model = load_model(tmp_path / "model", tmp_path / "offload")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(original.parameters(), model.parameters(), strict=True))
    assert len(large(model)) == (4 if tied else 5) and all(is_file(p) for p in large(model))
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        # Buffers that are in no file, such as rotary frequencies, are computed.
        assert torch.allclose(model.eval()(ids).logits, original.eval()(ids).logits, atol=1e-4)
    assert not list((tmp_path / "offload").iterdir())


def test_without_a_folder_types_stay_and_weights_are_mapped(tmp_path):
    saved(tmp_path, torch.bfloat16)
    model = load_model(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(is_file(p) for p in large(model))


def test_changing_a_weight_does_not_change_the_file(tmp_path):
    saved(tmp_path)
    model = load_model(tmp_path, tmp_path / "offload")
    before = {f.name: f.read_bytes() for f in tmp_path.glob("*.safetensors")}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(3)
    assert before == {f.name: f.read_bytes() for f in tmp_path.glob("*.safetensors")}


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(CaptureError, match=r"it holds no config\.json"):
        load_model(tmp_path)


def test_a_class_that_transformers_lacks_is_named(tmp_path):
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["NoSuchModel"]}))
    with pytest.raises(CaptureError, match=r"no such model class; got NoSuchModel"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda held: {k: v for k, v in held.items() if "q_proj" not in k}, r"missing from the model's files; got .*q_proj"),
        (lambda held: {**held, "model.norm.weight": torch.ones(7)}, r"another shape than the config says; got .*norm"),
    ],
)
def test_weights_that_do_not_fit_are_named(change, problem, tmp_path):
    randomise(transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG))).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    with pytest.raises(CaptureError, match=problem):
        load_model(tmp_path, tmp_path / "offload")


def test_a_damaged_file_is_named(tmp_path):
    randomise(transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG))).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not one")
    with pytest.raises(CaptureError, match="transformers cannot load it"):
        load_model(tmp_path)
