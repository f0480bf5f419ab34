"""The folder is what the ecosystem's loaders open, unchanged: optimum, optimum-intel and sentence-transformers.

They want older versions of transformers than tilecut: they run in an environment of their own, the folder `ecosystem` in
tilecut's cache, which `make ecosystem` makes. Without it these tests are skipped.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from checks import minilm_folder
from tilecut import PruneConfig, compile_pruned

CACHE = Path(os.environ.get("TILECUT_ECOSYSTEM", Path.home() / ".cache" / "tilecut" / "ecosystem"))
PYTHON = CACHE / "bin" / "python"

pytestmark = pytest.mark.skipif(
    not PYTHON.is_file(), reason="no environment of the ecosystem's loaders: run `make ecosystem`"
)

OPTIMUM = """
import sys, json, numpy as np, torch
folder, module, name, out = sys.argv[1:5]
options = json.loads(sys.argv[5])
model = getattr(__import__(module, fromlist=[name]), name).from_pretrained(folder, **options)
case = np.load(folder + "/ref/case_2.npz")
feeds = {k.partition(":")[2]: torch.from_numpy(case[k]) for k in case.files if k.startswith("inputs:")}
np.save(out, model(**feeds).last_hidden_state.numpy())
"""
SENTENCES = """
import sys, numpy as np
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], backend=sys.argv[2], device="cpu")
np.save(sys.argv[3], model.encode(["a tiny compiler", "a font for Tifinagh"]))
"""


def run(code, *args):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run([PYTHON, "-c", code, *map(str, args)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    base = tmp_path_factory.mktemp("ecosystem")
    config = PruneConfig(sparsity=0.5, method="magnitude", reconstruct=False)
    return {
        target: compile_pruned(
            str(minilm_folder()), target, config=config, output=base / target.replace(":", "-"), measure=False
        ).path
        for target in ("edge", "edge:portable", "edge:openvino")
    }


FLOAT32 = {"ov_config": {"INFERENCE_PRECISION_HINT": "f32"}}


@pytest.mark.parametrize(
    ("target", "module", "name", "options", "limit"),
    [
        ("edge", "optimum.onnxruntime", "ORTModelForFeatureExtraction", {}, 1e-4),
        ("edge:portable", "optimum.onnxruntime", "ORTModelForFeatureExtraction", {}, 1e-4),
        ("edge:openvino", "optimum.intel", "OVModelForFeatureExtraction", FLOAT32, 1e-4),
        # As OpenVINO chooses by itself: bfloat16 where the processor has units for it.
        ("edge:openvino", "optimum.intel", "OVModelForFeatureExtraction", {}, 5e-2),
    ],
)
def test_optimum_opens_the_folder(artifacts, target, module, name, options, limit, tmp_path):
    folder = artifacts[target]
    run(OPTIMUM, folder, module, name, tmp_path / "out.npy", json.dumps(options))
    case = np.load(folder / "ref" / "case_2.npz")
    valid = case["valid:last_hidden_state"]
    assert np.abs(np.load(tmp_path / "out.npy") - case["outputs:last_hidden_state"])[valid].max() < limit


def test_sentence_transformers_gives_the_same_embeddings_by_both_backends(artifacts, tmp_path):
    found = {}
    for target, backend in (("edge", "onnx"), ("edge:portable", "onnx"), ("edge:openvino", "openvino")):
        run(SENTENCES, artifacts[target], backend, tmp_path / "out.npy")
        found[target] = np.load(tmp_path / "out.npy")
        assert found[target].shape == (2, 384) and np.allclose(np.linalg.norm(found[target], axis=1), 1, atol=1e-3)
    assert np.allclose(found["edge"], found["edge:portable"], atol=1e-4)
    assert ((found["edge"] * found["edge:openvino"]).sum(1) > 0.999).all()
