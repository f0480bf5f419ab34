"""Quantized ONNX files: the arithmetic against numpy, the kernels that really run, what stays, what is stored once."""

import collections
import json
import shutil

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from checks import TinyEncoder, bert_graph, groups_of, mlp_graph, randomise, text_batch
from quantized_reference import run_reference, unpacked
from tilecut.make_cases import make_inputs
from tilecut_passes.calibration import Batch
from tilecut_passes.capture import capture
from tilecut_passes.fuse_attention import FuseAttention
from tilecut_passes.plan import PrunePlan
from tilecut_passes.prune import Prune
from tilecut_passes.run_passes import run_passes
from tilecut_targets.edge import quantize_onnx as quantizing
from tilecut_targets.edge.onnx_products import attribute
from tilecut_targets.edge.quantize_onnx import QUANTIZATIONS, quantize_onnx
from tilecut_targets.edge.target import EdgeTarget
from zoo import ZOO

KEPT = {
    "encoder.layer.0.attention:heads": [1, 3],
    "encoder.layer.1.attention:heads": [0, 2, 3],
    "encoder.layer.0:neurons": range(3, 40),
    "encoder.layer.1:neurons": range(0, 48, 2),
}
INTEGER = ("int8", "int8-static", "int4", "int4:128")
# What multiplies float32 weights, under onnxruntime's own names.
FLOAT = {"MatMul", "Gemm", "FusedGemm", "FusedMatMul", "Attention", "DequantizeLinear"}


@pytest.fixture(scope="module")
def pruned():
    """Layers of 2 and 3 heads of 8 under a hidden width of 32, 37 and 24 neurons."""
    graph = bert_graph().copy()
    run_passes(graph, [Prune(PrunePlan.keep_all(graph, groups_of(graph)).keeping(KEPT))])
    return graph


def write(graph, folder):
    """model.onnx of a graph in float32, in a new folder."""
    folder.mkdir(parents=True)
    fused = graph.copy()
    run_passes(fused, [FuseAttention()])
    lowered = fused.copy()
    run_passes(lowered, EdgeTarget().lowering)
    EdgeTarget().write(fused, lowered, folder)
    return folder / "model.onnx"


def batches_of(graph, count=3):
    return [Batch(make_inputs(graph, 2, 9, seed=i, ragged=False)) for i in range(count)]


def quantized(graph, how, folder):
    """The float32 file, the quantized one, and the record."""
    plain = write(graph, folder / "plain")
    made = folder / "made" / "model.onnx"
    made.parent.mkdir()
    shutil.copy(plain, made)
    return plain, made, quantize_onnx(made, how, batches_of(graph))


def run(path, inputs) -> dict[str, np.ndarray]:
    """Outputs by name under a session as a user opens it."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    given = {i.name: inputs[i.name].numpy() for i in session.get_inputs()}
    return {o.name: np.asarray(x) for o, x in zip(session.get_outputs(), session.run(None, given))}


def kernels(path, inputs, folder):
    """How often each kernel ran, by onnxruntime's own profile."""
    options = ort.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    session.run(None, {i.name: inputs[i.name].numpy() for i in session.get_inputs()})
    with open(session.end_profiling(), encoding="utf-8") as file:
        events = json.load(file)
    return collections.Counter(
        e["args"]["op_name"] for e in events if e.get("cat") == "Node" and e["name"].endswith("kernel_time")
    )


def difference(want, got):
    return float(np.linalg.norm(want - got) / np.linalg.norm(want))


@pytest.fixture(scope="module")
def made(pruned, tmp_path_factory):
    """Every quantization of the pruned BERT."""
    return {how: quantized(pruned, how, tmp_path_factory.mktemp("q") / "bert") for how in QUANTIZATIONS}


def test_pruned_attention_and_ffn_run_in_int8_kernels(made, tmp_path):
    ran = kernels(made["int8"][1], text_batch(2, 11), tmp_path)
    assert ran["QAttention"] == 2
    # Output projection and two of the FFN a layer, and the pooler; their inputs are quantized in the kernel.
    assert ran["DynamicQuantizeMatMul"] + ran["MatMulIntegerToFloat"] == 7
    assert not FLOAT & set(ran)
    heads = [attribute(n, "num_heads", 0) for n in onnx.load(made["int8"][1]).graph.node if n.op_type == "QAttention"]
    assert heads == [2, 3]


def test_static_ranges_run_in_int8_kernels_too(made, tmp_path):
    ran = kernels(made["int8-static"][1], text_batch(2, 11), tmp_path)
    assert (ran["MatMulIntegerToFloat"], ran["MultiHeadAttention"]) == (9, 2)
    assert not FLOAT & set(ran)
    # The pooler reads a slice of what a layer gives; q, k and v share one.
    assert ran["QuantizeLinear"] == 9 and not ran["DynamicQuantizeLinear"]


@pytest.mark.parametrize("how", ["int4", "int4:128"])
def test_four_bits_run_in_their_kernel(made, how, tmp_path):
    ran = kernels(made[how][1], text_batch(2, 11), tmp_path)
    assert (ran["MatMulNBits"], ran["MultiHeadAttention"]) == (9, 2)
    assert not FLOAT & set(ran)


def test_halves_are_cast_when_the_file_is_loaded(made, tmp_path):
    plain, path, record = made["fp16"]
    ran = kernels(path, text_batch(2, 11), tmp_path)
    # One Cast is the mask's.
    assert ran == kernels(plain, text_batch(2, 11), tmp_path) and ran["Cast"] == 1
    assert record["weights"] == 12 and record["bytes"]["after"] < 0.6 * record["bytes"]["before"]


@pytest.mark.parametrize(("batch", "length", "seed"), [(1, 1, 0), (4, 33, 1), (2, 18, 2)])
@pytest.mark.parametrize("how", INTEGER)
def test_files_give_what_their_integers_stand_for(made, how, batch, length, seed):
    inputs = text_batch(batch, length, seed)
    rows = inputs["attention_mask"].numpy() != 0
    got = run(made[how][1], inputs)["last_hidden_state"][rows]
    want = run_reference(made[how][1], {k: v.numpy() for k, v in inputs.items()})["last_hidden_state"][rows]
    # A number in the middle between two integers may go either way.
    assert difference(want, got) < 5e-3


@pytest.mark.parametrize(("how", "limit"), [("int8", 0.02), ("int8-static", 0.03), ("int4", 0.2), ("fp16", 1e-3)])
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (1, 512)])
def test_the_pruned_models_numbers_are_near(pruned, made, how, limit, shape):
    inputs = text_batch(*shape)
    rows = inputs["attention_mask"] != 0
    want, got = pruned.run(inputs), run(made[how][1], inputs)
    assert difference(want["last_hidden_state"][rows].numpy(), got["last_hidden_state"][rows.numpy()]) < limit
    assert difference(want["pooler_output"].numpy(), got["pooler_output"]) < limit


def test_the_record_counts_and_says_what_stays(made):
    _, path, record = made["int8"]
    assert (record["products"], record["attentions"], record["tables"]) == (7, 2, 0)
    assert record["bytes"] == {"before": made["int8"][0].stat().st_size, "after": path.stat().st_size}
    assert [(x["shape"], x["why"]) for x in record["kept"]] == [
        ([99, 32], "a table of less than a megabyte"),
        ([512, 32], "a table of less than a megabyte"),
        ([2, 32], "a table of less than a megabyte"),
    ]


def test_q_k_v_and_gates_share_one_quantized_input(architecture, tmp_path):
    graph, plain = architecture("llama_gqa")
    path, _ = rewritten(graph, plain, "int8", tmp_path)
    readers = collections.Counter(n.input[0] for n in onnx.load(path).graph.node if n.op_type == "MatMulIntegerToFloat")
    # Per layer: q, k, v; attention's output; gate and up; down; and the head.
    assert sorted(readers.values()) == [1] * 5 + [2] * 2 + [3] * 2


@pytest.fixture(scope="module")
def architecture(tmp_path_factory):
    """A function from a name to a captured model and its float32 file, each made once."""
    made = {}

    def of(name):
        if name not in made:
            torch.manual_seed(0)
            built = ZOO[name].build()
            graph = capture(*built) if isinstance(built, tuple) else capture(built)
            made[name] = graph, write(graph, tmp_path_factory.mktemp("zoo") / name)
        return made[name]

    return of


def rewritten(graph, plain, how, folder):
    """A quantized copy of a float32 file, and the record."""
    path = folder / "model.onnx"
    shutil.copy(plain, path)
    return path, quantize_onnx(path, how, batches_of(graph))


@pytest.mark.parametrize("how", INTEGER)
@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "llama_tied", "vit", "opt", "t5", "albert", "routed_moe"])
def test_architectures_run_and_stay_near(name, how, architecture, tmp_path):
    graph, plain = architecture(name)
    path, record = rewritten(graph, plain, how, tmp_path)
    inputs = make_inputs(graph, 2, 9, seed=7, ragged=False)
    for want, got in zip(run(plain, inputs).values(), run(path, inputs).values(), strict=True):
        assert difference(want, got) < (0.04 if how.startswith("int8") else 0.25)
    ran = kernels(path, inputs, tmp_path)
    integer = ("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "MatMulNBits", "QAttention")
    assert sum(ran[k] for k in integer) == record["products"] + record["attentions"] > 5


@pytest.mark.parametrize("how", ["int4", "int4:128"])
def test_four_bits_equal_the_dequantized_weights(how, architecture, tmp_path):
    """What the kernel should compute: the float32 model with the weights that the integers stand for."""
    graph, plain = architecture("llama_gqa")
    path, _ = rewritten(graph, plain, how, tmp_path)
    model, exact = onnx.load(path), onnx.load(plain)
    held = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    weights = {}
    for node in (n for n in model.graph.node if n.op_type == "MatMulNBits"):
        sizes = [attribute(node, name, 0) for name in ("K", "N", "block_size")]
        weights[node.input[1].removesuffix(".int4")] = unpacked(*(held[n] for n in node.input[1:4]), *sizes)
        # With level 1 nothing but the weights is rounded.
        next(a for a in node.attribute if a.name == "accuracy_level").i = 1
    for tensor in exact.graph.initializer:
        if tensor.name in weights:
            values = weights[tensor.name].astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(values), tensor.name))
    assert len(weights) == 15
    for name, made in (("model", model), ("exact", exact)):
        onnx.save(made, tmp_path / f"{name}_1.onnx")
    inputs = make_inputs(graph, 2, 9, seed=7, ragged=False)
    want, got, fast = (run(p, inputs)["logits"] for p in (tmp_path / "exact_1.onnx", tmp_path / "model_1.onnx", path))
    assert difference(want, got) < 1e-3
    # The file's own level rounds activations to int8 as well.
    assert 1e-4 < difference(want, fast) < 0.05


@pytest.mark.parametrize("how", ["int8", "int8-static", "int4"])
def test_a_tied_table_is_stored_once(how, architecture, tmp_path):
    graph, plain = architecture("llama_tied")
    path, record = rewritten(graph, plain, how, tmp_path)
    model = onnx.load(path)
    tables = [t.name for t in model.graph.initializer if list(t.dims) in ([99, 32], [32, 99])]
    assert record["tables"] == 1 and len(tables) == 1
    inputs = make_inputs(graph, 1, 5, seed=0, ragged=False)
    # The table is transposed when the file is loaded.
    assert kernels(path, inputs, tmp_path)["Transpose"] == kernels(plain, inputs, tmp_path)["Transpose"]


def test_a_large_table_is_stored_in_bytes_with_a_scale_a_row(tmp_path):
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.up = nn.Embedding(9000, 32), nn.Linear(32, 48)

        def forward(self, ids):
            return self.up(self.words(ids))

    graph = capture(randomise(Bag()), {"ids": torch.ones(2, 7, dtype=torch.long)})
    plain, path, record = quantized(graph, "int8", tmp_path / "bag")
    assert record["tables"] == 1 and record["kept"] == []
    assert record["bytes"]["after"] < 0.3 * record["bytes"]["before"]
    inputs = {"ids": torch.tensor([[0, 1, 8999], [-1, 5, 5]])}
    (want,), (got,) = run(plain, inputs).values(), run(path, inputs).values()
    assert difference(want, got) < 0.03


@pytest.mark.parametrize("how", INTEGER)
def test_layers_without_attention_and_of_any_width(how, tmp_path):
    """One layer has no attention left, and none has another's sizes."""

    class Uneven(TinyEncoder):
        def forward(self, input_ids, attention_mask):
            x = self.embed(input_ids)
            x = self.norms[4](x + self.down[2](nn.functional.gelu(self.up[2](x))))
            self_attended = super().forward(input_ids, attention_mask)
            return {"hidden": self_attended["hidden"] + x}

    model = randomise(Uneven(heads=(1, 5, 2), neurons=(17, 40, 23)))
    example = {name: torch.ones(2, 7, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    graph = capture(model, example)
    plain, path, record = quantized(graph, how, tmp_path / "uneven")
    assert (record["attentions"], record["products"]) == (3, 11)
    for shape in ((1, 1), (3, 20)):
        inputs = {k: v for k, v in text_batch(*shape, vocab=50).items() if k in graph.inputs}
        rows = inputs["attention_mask"].numpy() != 0
        want, got = run(plain, inputs)["hidden"][rows], run(path, inputs)["hidden"][rows]
        assert difference(want, got) < (0.03 if how.startswith("int8") else 0.3)


def test_what_is_too_narrow_stays(tmp_path):
    _, _, record = quantized(mlp_graph(neurons=40), "int8", tmp_path / "mlp")
    assert [x["why"] for x in record["kept"]] == ["too narrow to gain"] * 2
    assert sorted(sorted(x["shape"]) for x in record["kept"]) == [[3, 40], [12, 40]]
    assert record["products"] == 0


class Wide(nn.Module):
    """A product whose input has one channel far above all others."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return self.down(torch.relu(self.up(x))) + x


def test_static_leaves_a_product_that_would_lose_too_much(tmp_path):
    model = randomise(Wide())
    with torch.no_grad():
        # The outlier's own weights are small: its steps ruin what the other channels say.
        model.up.weight[:, 0] = 0
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    x[:, 0] *= 3000
    graph = capture(model, {"x": x})
    path = write(graph, tmp_path / "wide")
    record = quantize_onnx(path, "int8-static", [Batch({"x": x})])
    assert record["products"] == 1
    (kept,) = record["kept"]
    assert kept["why"].startswith("its output would be off by") and kept["why"].endswith("on calibration data")
    (want,), (got,) = graph.run({"x": x}).values(), run(path, {"x": x}).values()
    assert difference(want.numpy(), got) < 0.01


def test_numbers_beyond_16_bits_stay(tmp_path):
    model = randomise(Wide())
    with torch.no_grad():
        model.up.weight[0, 0] = 1e5
    graph = capture(model, {"x": torch.randn(4, 32)})
    path = write(graph, tmp_path / "wide")
    record = quantize_onnx(path, "fp16")
    assert record["weights"] == 1 and [x["why"] for x in record["kept"]] == ["its numbers exceed 65504"]


def test_weights_beside_the_model_stay_beside_it(pruned, tmp_path, monkeypatch):
    path = write(pruned, tmp_path / "large")
    whole = tmp_path / "whole.onnx"
    shutil.copy(path, whole)
    model = onnx.load(path)
    onnx.save_model(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    before = (path.parent / "model.onnx.data").stat().st_size
    monkeypatch.setattr(quantizing, "EXTERNAL_DATA_BYTES", 1000)
    record = quantize_onnx(path, "int8-static", batches_of(pruned))
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert record["bytes"]["before"] > before > record["bytes"]["after"]
    quantize_onnx(whole, "int8-static", batches_of(pruned))
    inputs = text_batch(2, 9)
    for want, got in zip(run(whole, inputs).values(), run(path, inputs).values()):
        assert np.array_equal(want, got)
