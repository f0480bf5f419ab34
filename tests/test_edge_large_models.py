"""Models whose weights lie beside the file, as those of gigabytes do: written, verified without copies, loaded, damaged."""

import onnx
import onnxruntime as ort
import pytest
import torch

from checks import compiled, run_onnx, text_batch
from tilecut import PruneConfig, load
from tilecut.measure_memory import peak_bytes
from tilecut_passes.run_passes import largest_error
from tilecut_runtime.errors import ArtifactError
from tilecut_runtime.torch_program import WEIGHTS
from tilecut_targets import write_onnx as module

PREPACKING = "session.disable_prepacking"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "EXTERNAL_DATA_BYTES", 1000)
        config = PruneConfig(sparsity=0.5, method="magnitude", at={"sequence": 16})
        return compiled("edge", tmp_path_factory.mktemp("large") / "a", config=config)


def test_weights_lie_beside_the_file_once(artifact):
    beside = artifact.path / "model.onnx.data"
    weights = (artifact.path / WEIGHTS).stat().st_size
    assert 0.5 * weights < beside.stat().st_size < 1.2 * weights, (weights, beside.stat().st_size)
    assert (artifact.path / "model.onnx").stat().st_size < beside.stat().st_size
    held = onnx.load(str(artifact.path / "model.onnx"), load_external_data=False).graph.initializer
    assert {e.value for t in held for e in t.external_data if e.key == "location"} == {"model.onnx.data"}


def test_they_are_mapped_when_the_artifact_is_verified(artifact, monkeypatch):
    opened = []
    plain = ort.InferenceSession

    def session(path, options, **more):
        opened.append(options)
        return plain(path, options, **more)

    monkeypatch.setattr(ort, "InferenceSession", session)
    rungs = {r.name: r for r in artifact.verify()}
    equal = rungs["artifact equals pruned model"]
    assert equal.status == "passed" and equal.detail.startswith("onnxruntime, weights mapped from their file, against torch")
    load(artifact.path)
    assert opened[0].get_session_config_entry(PREPACKING) == "1"
    with pytest.raises(RuntimeError, match=PREPACKING):
        opened[1].get_session_config_entry(PREPACKING)


def test_any_session_opens_them(artifact):
    x = text_batch(3, 9)
    rows = x["attention_mask"] != 0
    want = artifact.module()(**x).last_hidden_state.detach()[rows]
    plain = run_onnx(artifact.path / "model.onnx", x)
    ours = load(artifact.path).run(x)
    for got in (plain["last_hidden_state"], ours["last_hidden_state"]):
        assert largest_error({"out": want}, {"out": torch.as_tensor(got)[rows]}) < 1e-4


def test_the_report_counts_them_and_says_how_much_memory_the_compile_took(artifact):
    report = artifact.report
    assert report["bytes"]["deployed"] > (artifact.path / "model.onnx.data").stat().st_size
    assert 0 < report["peak_memory_bytes"] <= peak_bytes()


def test_a_damaged_file_beside_is_one_error(artifact):
    beside = artifact.path / "model.onnx.data"
    whole = beside.read_bytes()
    try:
        beside.write_bytes(whole[:-100])
        with pytest.raises(ArtifactError, match=r"model.onnx.data"):
            load(artifact.path)
    finally:
        beside.write_bytes(whole)
