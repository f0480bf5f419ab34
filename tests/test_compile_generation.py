"""compile_pruned with `generate`: what is written, measured and verified; quantized; models written by hand; refusals."""

import json

import numpy as np
import onnxruntime as ort
import pytest
import torch
from typer.testing import CliRunner

from checks import mlp_graph, randomise, tiny_bert
from generation_models import POSITIONS, VOCAB, calm, decoder, greedy, written
from tilecut import Artifact, PruneConfig, cli, compile_pruned, load
from tilecut.plan_generation import ids_of
from tilecut.whole_texts import WholeTexts
from tilecut_runtime.errors import ConfigError, LoweringError
from tilecut_runtime.reference import verify_on_device
from tilecut_targets.edge.target import count_ops
from tilecut_targets.find_target import TARGETS

PROMPTS = [[5, 6, 7, 8], [9]]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    config = PruneConfig(sparsity=0.3, at={"sequence": 16}, method="magnitude", importance="magnitude", cache="")
    folder = tmp_path_factory.mktemp("made") / "llama"
    return compile_pruned(decoder("llama"), "edge", config=config, output=folder, generate=True, max_length=80)


def test_manifest_and_report(artifact):
    manifest = artifact.manifest
    assert manifest.generation.max_length == manifest.dims["capacity"].max == 80
    assert manifest.generation.eos == (2,)
    assert [spec.name for spec in manifest.inputs[:3]] == ["input_ids", "past_lengths", "lengths"]
    assert [spec.name for spec in manifest.of_module.inputs] == ["input_ids", "attention_mask"]
    assert artifact.report["emitted"]["attention"] == artifact.report["emitted"]["fused_attention"] == 2
    assert artifact.report["latency"]["contenders"]["pruned artifact"]["cpu_ms"] > 0
    assert {"steps equal the whole text", "artifact equals pruned model"} <= {
        r["name"] for r in artifact.report["verification"]
    }
    assert count_ops(artifact.path / "model.onnx")["GroupQueryAttention"] == 2


def test_every_ladder_climbs_again(artifact):
    for rungs in (Artifact(artifact.path).verify(), verify_on_device(artifact.path)):
        assert all(r.status == "passed" for r in rungs)


def test_bench_and_inspect_know_it(artifact):
    done = CliRunner().invoke(
        cli.app, ["bench", str(artifact.path), "--seq", "8", "--rounds", "1", "--no-memory", "--json"]
    )
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(cli.app, ["inspect", str(artifact.path), "--json"])
    assert json.loads(done.stdout)["manifest"]["generation"]["max_length"] == 80


def test_a_plain_session_generates_without_tilecut(artifact):
    session = ort.InferenceSession(str(artifact.path / "model.onnx"), providers=["CPUExecutionProvider"])
    want = load(artifact.path).generate(PROMPTS[:1], max_new_tokens=5, eos=()).tokens[0]
    caches = {i.name: np.zeros((1, i.shape[1], 16, i.shape[3]), np.float32) for i in session.get_inputs()[3:]}
    tokens, past, got = np.array(PROMPTS[:1]), 0, []
    for _ in range(5):
        size = tokens.shape[1]
        logits, *presents = session.run(
            None, {"input_ids": tokens, "past_lengths": np.array([past]), "lengths": np.array([size]), **caches}
        )
        past, caches = past + size, dict(zip(caches, presents))
        got.append(int(np.asarray(logits)[0, 0].argmax()))
        tokens = np.array([[got[-1]]])
    assert got == want


@pytest.mark.parametrize("how", ["int4", "int8", "fp16"])
def test_quantized(how, tmp_path):
    model = calm(decoder("mistral"))
    ids = torch.randint(0, VOCAB, (16, 12), generator=torch.Generator().manual_seed(0))
    masks = torch.ones_like(ids)
    masks[1::2, 9:], masks[3::4, 9:], masks[3::4, :2] = 0, 1, 0
    batches = [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(2), masks.split(2))]
    config = PruneConfig(sparsity=0.0, at={"sequence": 16}, quantize=how, reconstruct=False, cache="")
    made = compile_pruned(
        model, "edge", calibration=batches, config=config, output=tmp_path / "made", generate=True, measure=False
    )
    q = made.report["quantization"]
    assert q["products"] > 10 if how != "fp16" else q["weights"] > 10
    near = q["fidelity"]["to_pruned"]["logits"]
    assert 0.9 < near["cosine"] <= 1 and near["relative_error"] < 0.4
    ops = count_ops(made.path / "model.onnx")
    assert (ops["GroupQueryAttention"] == 2 and ops["MatMul"] == 0) or how == "fp16"
    got = load(made.path).generate(PROMPTS, max_new_tokens=8, eos=()).tokens
    if how == "fp16":
        assert got == greedy(lambda ids: model(input_ids=ids).logits, PROMPTS, 8)
    assert [len(row) for row in got] == [8, 8]


def test_a_session_as_a_model_of_whole_texts(artifact):
    ids = torch.randint(0, VOCAB, (3, 9))
    masks = torch.ones_like(ids)
    masks[1, 6:], masks[2, :4] = 0, 0
    got = WholeTexts(load(artifact.path)).run({"input_ids": ids, "attention_mask": masks})["logits"]
    model = artifact.module()
    with torch.no_grad():
        rows = [
            model(input_ids=i[m > 0][None], attention_mask=torch.ones(1, int(m.sum())).long()).logits[0]
            for i, m in zip(ids, masks)
        ]
    for row, mask, want in zip(got, masks, rows):
        torch.testing.assert_close(row[mask > 0], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("positions", ["learned", "slice", "counted"])
def test_models_written_by_hand(positions, tmp_path):
    model, inputs = written(positions)
    dims = {name: {0: "batch", 1: "sequence"} for name in inputs}
    made = compile_pruned(
        model, "edge", inputs, config=None, output=tmp_path / "made", dynamic_shapes=dims, generate=True, measure=False
    )
    run = lambda ids: model(ids, torch.ones_like(ids)) if positions == "counted" else model(ids)
    session = load(made.path)
    assert session.generate(PROMPTS, max_new_tokens=20).tokens == greedy(run, PROMPTS, 20)
    assert made.manifest.generation.max_length == POSITIONS and made.manifest.generation.eos == ()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"generate": 1}, "generate does not fit; got 1; wanted True or False"),
        ({"generate": True, "max_length": 1}, "max_length does not fit; got 1"),
        ({"max_length": 9}, "give generate=True too"),
        (
            {"generate": True, "config": PruneConfig(quantize="int8-static")},
            "'int8-static' takes ranges from calibration data",
        ),
    ],
)
def test_options_that_do_not_fit(options, why, tmp_path):
    with pytest.raises(ConfigError, match=why):
        compile_pruned(decoder("llama"), "edge", **{"config": None, "output": tmp_path / "made", **options})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "edge"])
def test_other_targets_say_so(target, tmp_path):
    with pytest.raises(ConfigError, match=f"the target writes no models that generate; got {target}"):
        compile_pruned(decoder("llama"), target, config=None, output=tmp_path / "made", generate=True)


def test_encoders_are_refused_and_nothing_is_left(tmp_path):
    with pytest.raises(LoweringError, match="token_type_ids|is not causal"):
        compile_pruned(tiny_bert(), "edge", config=None, output=tmp_path / "made", generate=True, measure=False)
    assert not list(tmp_path.iterdir())


def test_ends_of_texts():
    model = mlp_graph().module
    assert ids_of(model, "eos_token_id") == ()
    model.config = type("Config", (), {"eos_token_id": [3, 4]})
    assert ids_of(model, "eos_token_id") == (3, 4)
    assert ids_of(randomise(decoder("llama")), "eos_token_id") == (2,)
