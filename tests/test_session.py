"""Sessions: every input that does not fit gives one InputError, every artifact that is not whole one ArtifactError."""

import json
import shutil
import subprocess
import sys
import warnings

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from checks import ROOT, emit, randomise
from tilecut import compile_pruned
from tilecut_passes.capture import capture
from tilecut_runtime.errors import ArtifactError, InputError
from tilecut_runtime.manifest import MANIFEST, Manifest, list_files
from tilecut_runtime.session import RUNTIMES, load
from tilecut_targets.ascend.target import AscendTarget
from tilecut_targets.cuda.target import CudaTarget
from tilecut_targets.edge.executorch_program import ExecuTorchTarget
from tilecut_targets.edge.openvino_ir import OpenVinoTarget
from tilecut_targets.edge.target import EdgeTarget

GPU = torch.cuda.is_available()


class Small(nn.Module):
    """Two inputs that share both dynamic sizes, a sequence of at most 6, and two outputs of one shape."""

    def __init__(self):
        super().__init__()
        self.places = nn.Parameter(torch.zeros(6, 4))
        self.up, self.down = nn.Linear(4, 80), nn.Linear(80, 4)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        x = (x + self.places[: x.shape[1]]) * mask[:, :, None]
        y = self.down(torch.relu(self.up(x)))
        return {"mixed": y, "gated": torch.sigmoid(y) * 3}


@pytest.fixture(scope="module")
def graph():
    example = {"x": torch.randn(2, 5, 4), "mask": torch.ones(2, 5, dtype=torch.int64)}
    return capture(randomise(Small()), example)


@pytest.fixture(scope="module")
def artifacts(graph, tmp_path_factory):
    base = tmp_path_factory.mktemp("artifacts")
    targets = {
        "onnxruntime": EdgeTarget(), "openvino": OpenVinoTarget(), "executorch": ExecuTorchTarget(), "torch": CudaTarget(),
        "ascend": AscendTarget(),
    }  # fmt: skip
    return {runtime: emit(target, graph, base / runtime).folder for runtime, target in targets.items()}


DEVICE = {"onnxruntime": None, "openvino": None, "executorch": None, "torch": "cpu", "ascend": "reference"}


@pytest.fixture(scope="module")
def sessions(artifacts):
    return {runtime: load(folder, DEVICE[runtime]) for runtime, folder in artifacts.items()}


@pytest.fixture
def session(sessions):
    return sessions["onnxruntime"]


def batch(b=2, s=3, seed=0):
    rng = np.random.default_rng(seed)
    return {"x": rng.normal(size=(b, s, 4)).astype(np.float32), "mask": rng.integers(0, 2, (b, s))}


def expected(graph, inputs):
    out = graph.run({k: torch.from_numpy(np.array(v)) for k, v in inputs.items()})
    return {k: v.numpy() for k, v in out.items()}


def assert_equal(got, want):
    assert list(got) == list(want)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], atol=1e-5)


def test_the_fixtures_cover_every_runtime(artifacts):
    assert list(artifacts) == list(RUNTIMES)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (5, 3)])
def test_every_runtime_gives_the_graphs_outputs_by_name(graph, sessions, runtime, shape):
    inputs = batch(*shape)
    assert_equal(sessions[runtime].run(inputs), expected(graph, inputs))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_inputs_go_by_name_not_by_order(graph, sessions, runtime):
    inputs = batch()
    assert_equal(sessions[runtime].run(dict(reversed(inputs.items()))), expected(graph, inputs))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_dlpack_tensors_are_taken(graph, sessions, runtime):
    inputs = batch()
    given = {k: torch.from_numpy(v) for k, v in inputs.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal(sessions[runtime].run(given), expected(graph, inputs))


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.astype(x.dtype.newbyteorder(">")),
        lambda x: x[::-1],
        lambda x: np.asfortranarray(x),
        lambda x: np.repeat(x, 2, 0)[::2],
        lambda x: np.broadcast_to(x, x.shape),
    ],
    ids=["big endian", "backwards", "fortran", "strided", "read-only"],
)
def test_the_layout_of_an_array_does_not_change_its_meaning(graph, sessions, runtime, change):
    inputs = {k: change(v) for k, v in batch().items()}
    want = expected(graph, {k: v.astype(v.dtype.newbyteorder("=")) for k, v in inputs.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal(sessions[runtime].run(inputs), want)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_run_leaves_its_inputs_alone(sessions, runtime):
    inputs = batch()
    before = {k: v.copy() for k, v in inputs.items()}
    sessions[runtime].run(inputs)
    assert all(np.array_equal(before[k], v) for k, v in inputs.items())


def test_a_session_describes_itself(session, artifacts):
    assert [str(s) for s in session.inputs] == [
        "x: float32 [batch, sequence, 4]",
        "mask: int64 [batch, sequence]",
    ]
    assert [s.name for s in session.outputs] == ["mixed", "gated"]
    assert (session.device, session.path) == ("cpu", artifacts["onnxruntime"])
    assert repr(session) == (
        "Session('onnxruntime', target='edge', device='cpu', "
        "inputs=[x: float32 [batch, sequence, 4]; mask: int64 [batch, sequence]])"
    )


class NoTensor:
    pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"X": np.zeros(1)}, "unknown input name; got X; wanted x, mask"),
        ({"x": None}, "input x: neither a numpy array nor a DLPack tensor; got NoneType"),
        ({"x": [[1.0]]}, r"neither a numpy array nor a DLPack tensor; got list; wanted x: float32 \[batch"),
        ({"x": NoTensor()}, "got NoTensor"),
        ({"x": np.zeros((2, 3, 4))}, r"x: wrong dtype; got float64; wanted float32; convert it with \.astype"),
        ({"mask": np.zeros((2, 3), np.int32)}, "mask: wrong dtype; got int32; wanted int64"),
        ({"mask": np.zeros((2, 3), bool)}, "mask: wrong dtype; got bool"),
        ({"x": np.zeros((2, 4), np.float32)}, r"x: wrong rank; got 2 \(shape \[2, 4\]\); wanted 3"),
        ({"x": np.float32(3)}, r"x: wrong rank; got 0 \(shape \[\]\)"),
        ({"x": np.zeros((2, 3, 5), np.float32)}, "wrong size of dimension 2; got 5; wanted 4"),
        ({"x": np.zeros((0, 3, 4), np.float32)}, r"batch \(dimension 0\) is out of range; got 0; wanted 1 to (any|8)"),
        ({"x": np.zeros((2, 7, 4), np.float32)}, r"sequence \(dimension 1\) is out of range; got 7; wanted 1 to 6"),
        ({"mask": np.zeros((3, 3), np.int64)}, r"mask: batch \(dimension 0\) differs from input x's; got 3; wanted 2"),
        ({"mask": np.zeros((2, 4), np.int64)}, r"mask: sequence \(dimension 1\) differs from input x's; got 4"),
        ({"x": torch.zeros(2, 3, 4, requires_grad=True)}, "x: numpy cannot read the DLPack tensor .*gradient"),
        ({"x": torch.zeros(2, 3, 4, dtype=torch.bfloat16)}, "x: numpy cannot read the DLPack tensor"),
        ({"x": torch.zeros(2, 3, 4, device="meta")}, "x: numpy cannot read the DLPack tensor"),
        ({"x": torch.zeros(2, 3, 4, dtype=torch.float64)}, "x: wrong dtype; got float64"),
    ],
)
def test_an_input_that_does_not_fit_is_named(sessions, change, message):
    for session in sessions.values():
        with pytest.raises(InputError, match=message) as caught:
            session.run({**batch(), **change})
        assert caught.value.where.startswith("Session.run")


def test_a_missing_input_is_named(session):
    with pytest.raises(InputError, match="missing input; got x; wanted mask as well"):
        session.run({"x": batch()["x"]})
    with pytest.raises(InputError, match="missing input; got nothing; wanted x, mask as well"):
        session.run({})


@pytest.mark.parametrize("inputs", [[1, 2], None, np.zeros(3), "x"])
def test_inputs_are_a_mapping(session, inputs):
    with pytest.raises(InputError, match="inputs must be a mapping"):
        session.run(inputs)


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2", float("nan"), True, 1025, 2**40])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_threads_are_a_positive_integer(artifacts, runtime, threads):
    with pytest.raises(InputError, match="threads must be a positive integer or None"):
        load(artifacts[runtime], DEVICE[runtime], threads)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_any_number_of_threads_gives_the_same_outputs(graph, artifacts, runtime):
    inputs = batch()
    assert_equal(load(str(artifacts[runtime]), DEVICE[runtime], threads=2).run(inputs), expected(graph, inputs))


@pytest.mark.parametrize(
    ("runtime", "device", "message"),
    [
        ("onnxruntime", "cuda", "an edge artifact runs on the CPU; got device='cuda'"),
        ("onnxruntime", "reference", "an edge artifact runs on the CPU"),
        ("openvino", "gpu", "an edge:openvino artifact runs on the CPU; got device='gpu'"),
        ("executorch", "npu:0", "an edge:executorch artifact runs on the CPU"),
        ("torch", "npu", "no such device on this machine; got device='npu'"),
        ("torch", "reference", "no such device on this machine"),
        ("torch", "cuda:99", "no such device on this machine; got device='cuda:99'"),
        ("torch", "meta", "no such device on this machine"),
        pytest.param("torch", "cuda", "no such device", marks=pytest.mark.skipif(GPU, reason="there is one here")),
        pytest.param("torch", None, "no CUDA device", marks=pytest.mark.skipif(GPU, reason="there is one here")),
        ("ascend", None, "needs CANN and an NPU"),
        ("ascend", "npu", "needs CANN and an NPU.*build_on_cann.sh.*load it with device=\"reference\""),
        ("ascend", "cuda", "an ascend artifact runs on an NPU; got device='cuda'"),
    ],
)
def test_a_device_that_cannot_run_it_is_refused(artifacts, runtime, device, message):
    with pytest.raises(ArtifactError, match=message):
        load(artifacts[runtime], device)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU")
def test_a_program_runs_on_the_gpu_as_on_the_cpu(graph, artifacts):
    inputs = batch()
    assert_equal(load(artifacts["torch"]).run(inputs), expected(graph, inputs))


def test_edge_takes_cpu_by_name(graph, artifacts):
    inputs = batch()
    assert_equal(load(artifacts["onnxruntime"], "cpu").run(inputs), expected(graph, inputs))


@pytest.fixture
def copied(artifacts, tmp_path):
    return lambda runtime: shutil.copytree(artifacts[runtime], tmp_path / runtime)


def edited(folder, **fields):
    held = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    (folder / MANIFEST).write_text(json.dumps({**held, **fields}), encoding="utf-8")
    return folder


def test_an_unknown_runtime_is_refused(copied):
    folder = edited(copied("onnxruntime"), runtime="tensorrt")
    wanted = "onnxruntime or openvino or executorch or torch or ascend"
    with pytest.raises(ArtifactError, match=f"unknown runtime.*got tensorrt; wanted {wanted}"):
        load(folder)


def test_a_folder_that_is_no_artifact_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="not a tilecut artifact"):
        load(tmp_path)
    with pytest.raises(ArtifactError, match="no such artifact folder"):
        load(str(tmp_path / "missing"))


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("entry", [{}, {"model": "missing.bin", "verify": "missing.bin"}])
def test_an_entry_that_names_no_file_is_refused(copied, runtime, entry):
    with pytest.raises(ArtifactError, match="names no file as its"):
        load(edited(copied(runtime), entry=entry), DEVICE[runtime])


USED = [
    ("onnxruntime", "model.onnx"),
    ("openvino", "openvino_model.xml"),
    ("openvino", "openvino_model.bin"),
    ("executorch", "model.pte"),
    ("torch", "model.pt2"),
    ("torch", "model.safetensors"),
    ("ascend", "graph/verify.onnx"),
    # Weights that two models share are checked with either.
    ("ascend", "graph/weights.bin"),
]


@pytest.mark.parametrize(("runtime", "name"), USED)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-7], "another size than the manifest says"),
        (lambda data: data[:99] + bytes([data[99] ^ 1]) + data[100:], "file was altered"),
        (None, "file of the artifact is missing"),
    ],
    ids=["truncated", "altered", "missing"],
)
def test_a_model_file_that_is_not_whole_is_not_opened(copied, runtime, name, change, message):
    folder = copied(runtime)
    path = folder / name
    data = path.read_bytes()
    path.unlink()
    if change:
        path.write_bytes(change(data))
    with pytest.raises(ArtifactError, match=message) as caught:
        load(folder, DEVICE[runtime])
    assert caught.value.where == str(path)


def test_weights_split_off_a_model_are_checked_with_it(graph, copied):
    folder = copied("onnxruntime")
    model = onnx.load(str(folder / "model.onnx"))
    onnx.save(
        model, str(folder / "model.onnx"), save_as_external_data=True, location="model.onnx.data", size_threshold=256
    )
    manifest = Manifest.read(folder)
    manifest.files = list_files(folder)
    manifest.write(folder)
    inputs = batch()
    assert_equal(load(folder).run(inputs), expected(graph, inputs))
    path = folder / "model.onnx.data"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\1\0")
    with pytest.raises(ArtifactError, match=r"model\.onnx\.data: file was altered"):
        load(folder)


def test_files_that_are_not_used_may_be_missing(copied):
    folder = copied("onnxruntime")
    (folder / "model.safetensors").unlink()
    shutil.rmtree(folder / "ref")
    load(folder)


def test_a_listed_file_that_is_no_model_is_refused_with_the_runtimes_reason(copied):
    folder = copied("onnxruntime")
    (folder / "model.onnx").write_bytes(b"no protobuf")
    edited(folder, files={k: vars(v) for k, v in list_files(folder).items()})
    with pytest.raises(ArtifactError, match=r"onnxruntime [\d.]+ cannot open it"):
        load(folder)


def test_without_torch_a_program_is_refused_with_what_to_install(artifacts, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ArtifactError, match=r"runs on torch, which is not installed; pip install 'tilecut\[compile\]'"):
        load(artifacts["torch"], "cpu")


def test_an_edge_artifact_needs_no_torch(artifacts):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np\n"
        "from tilecut_runtime.session import load\n"
        "out = load(sys.argv[1]).run({'x': np.ones((2, 3, 4), np.float32), 'mask': np.ones((2, 3), np.int64)})\n"
        "print(sorted(out), *(sorted(m for m in ('onnx', 'transformers', 'safetensors') if m in sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(artifacts["onnxruntime"])],
        env={"PYTHONPATH": str(ROOT / "runtime")}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.stdout.strip(), done.returncode) == ("['gated', 'mixed']", 0), done.stderr


@pytest.mark.parametrize("path", [None, 3, b"..", "a\0b", "n" * 300])
def test_what_is_no_path_is_no_artifact(path):
    with pytest.raises(ArtifactError, match="artifact"):
        load(path)


class Lookup(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids)


@pytest.mark.parametrize(("target", "device"), [(EdgeTarget(), None), (CudaTarget(), "cpu")])
def test_numbers_that_the_model_cannot_take_are_an_input_error_and_nothing_is_logged(target, device, tmp_path, capfd):
    graph = capture(randomise(Lookup()), {"ids": torch.ones(2, 3, dtype=torch.int64)})
    session = load(emit(target, graph, tmp_path / "a").folder, device)
    capfd.readouterr()
    with pytest.raises(InputError, match=r"cannot run the model on these inputs: .*(index|indices)") as caught:
        session.run({"ids": np.full((2, 3), 9)})
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert session.run({"ids": np.full((2, 3), 8)})["output"].shape == (2, 3, 4)


@pytest.mark.parametrize("target", ["edge", "edge:openvino"])
@pytest.mark.parametrize("odd", [-1, 9])
def test_ids_that_no_embedding_has_are_an_input_error_in_every_runtime(target, odd, tmp_path):
    given = {"ids": torch.ones(2, 3, dtype=torch.int64)}
    path = compile_pruned(Lookup(), target, example_inputs=given, output=tmp_path / "a", measure=False, config=None).path
    assert Manifest.read(path).table_rows == {"ids": 9}
    session = load(path)
    ids = np.full((2, 3), 8)
    assert session.run({"ids": ids})["output"].shape == (2, 3, 4)
    ids[1, 2] = odd
    wanted = f"input ids: an id that the model has no embedding for; got {min(odd, 8)} to {max(odd, 8)}; wanted 0 to 8"
    with pytest.raises(InputError, match=wanted):
        session.run({"ids": ids})


@pytest.mark.parametrize("part", ["inputs", "outputs"])
@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows[:-1],
        lambda rows: [{**rows[0], "name": "z"}, *rows[1:]],
        lambda rows: [{**rows[0], "shape": [3]}],
    ],
    ids=["missing", "renamed", "another rank"],
)
def test_a_model_with_other_inputs_or_outputs_than_the_manifests_is_refused(copied, part, change):
    folder = copied("onnxruntime")
    rows = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))[part]
    with pytest.raises(ArtifactError, match=f"the model has other {part} than the manifest says"):
        load(edited(folder, **{part: change(rows)}))
