"""`graph/model.air` by torchair in the private environment: one fused attention a layer, and numbers of the pruned model."""

import dataclasses
import types

import pytest
import transformers as hf

from attention_models import packed_llama
from checks import groups_of, minilm, randomise, tiny_bert
from norm_models import gptj
from test_ascend_lower_attention import captured
from test_ascend_lower_infer_attention import SPELLINGS, padded
from tilecut.make_cases import make_case, make_cases, make_inputs
from tilecut_passes.capture import capture
from tilecut_passes.fuse_attention import FuseAttention
from tilecut_passes.plan import PrunePlan
from tilecut_passes.prune import Prune
from tilecut_passes.run_passes import run_passes
from tilecut_runtime.errors import LoweringError
from tilecut_targets.ascend import environments, write_air
from tilecut_targets.ascend.chips import CHIPS
from tilecut_targets.ascend.read_air import read_air
from tilecut_targets.ascend.target import AscendTarget

LIMIT = 2e-3
B3 = CHIPS["Ascend910B3"]
TINY = {"vocab_size": 99, "use_cache": False}


def halved(model):
    """A captured model that keeps the first half of every group of heads, KV groups and neurons."""
    graph = capture(model)
    groups = groups_of(graph, "heads", "kv_groups", "neurons")
    plan = PrunePlan.keep_all(graph, groups).keeping({g.name: range(max(g.size // 2, 1)) for g in groups})
    run_passes(graph, [Prune(plan)])
    return graph


def gpt2():
    return randomise(hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, **TINY)))


def llama(width=16):
    """8 query heads on 4 KV heads; half of the KV groups stay."""
    config = hf.LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4, head_dim=width,
        intermediate_size=96, max_position_embeddings=64, **TINY,
    )  # fmt: skip
    return randomise(hf.LlamaForCausalLM(config))


def left_padded(graph):
    """A case whose rows are padded on the left."""
    inputs = make_inputs(graph, 3, 11, seed=5)
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    return make_case(inputs, graph.run(inputs))


def emitted(graph, folder, chip=B3):
    """What write_air says, and the manifest's part that check_air reads."""
    fused = graph.copy()
    run_passes(fused, [FuseAttention(), *AscendTarget(chip.soc).fusions])
    facts = write_air.write_air(fused, chip, folder)
    return facts, types.SimpleNamespace(outputs=graph.output_specs(), tolerance=LIMIT)


@pytest.mark.toolchain("ascend-air")
@pytest.mark.parametrize(
    ("model", "layers", "chip"),
    [
        (lambda: tiny_bert(width=16), 2, "Ascend910B3"),
        (gpt2, 2, "Ascend910_9391"),
        (llama, 2, "Ascend950PR_9599"),
        pytest.param(minilm, 6, "Ascend910B3", marks=pytest.mark.slow),
    ],
    ids=["bert", "gpt2", "llama", "minilm"],
)
def test_a_model_pruned_by_half_has_one_fused_attention_a_layer_and_the_pruned_models_numbers(model, layers, chip, tmp_path):
    graph = halved(model())
    facts, manifest = emitted(graph, tmp_path, CHIPS[chip])
    assert facts["air_attention"] == layers and facts["air_refusals"] == []
    assert facts["air_inputs"] == list(graph.inputs)
    operators = read_air(tmp_path / write_air.AIR)
    assert sum(op.type == write_air.OPERATOR for op in operators) == layers
    assert not {"SoftmaxV2", "BatchMatMul"} & {op.type for op in operators}
    # Batch and sequence are open.
    assert {op.shapes for op in operators if op.type == "Data"} == {((-1, -1),)}
    for held in (tmp_path / "graph").iterdir():
        assert str(tmp_path).encode() not in held.read_bytes() and b"site-packages" not in held.read_bytes()
    cases = [*make_cases(graph, sizes=((1, 1), (1, 8), (2, 13), (5, 60))), left_padded(graph)]
    schemas, numbers = write_air.check_air(tmp_path, manifest, cases)
    assert (schemas.status, schemas.figure) == ("passed", 0)
    assert f"{layers} of npu_fused_infer_attention_score" in schemas.detail
    assert numbers.status == "passed" and numbers.figure is not None and 0 < numbers.figure <= LIMIT
    wrong = [make_case(make_inputs(graph, 2, 9, seed=1), graph.run(make_inputs(graph, 2, 9, seed=2)))]
    assert write_air.check_air(tmp_path, manifest, wrong)[1].status == "failed"


@pytest.mark.toolchain("ascend-air")
@pytest.mark.parametrize(
    ("model", "chip", "norms", "rotary", "operator"),
    [
        (lambda: llama(64), "Ascend910B3", 5, 4, "RotaryMul"),
        (llama, "Ascend950PR_9599", 5, 4, "RotaryPositionEmbedding"),
        # Interleaved pairs.
        (gptj, "Ascend950PR_9599", 0, 4, "RotaryPositionEmbedding"),
    ],
    ids=["llama-a2", "llama-950", "gptj-950"],
)
def test_norms_and_rotary_embeddings_are_operators_of_their_own(model, chip, norms, rotary, operator, tmp_path):
    graph = halved(model())
    facts, manifest = emitted(graph, tmp_path, CHIPS[chip])
    assert (facts["air_norms"], facts["air_rotary"], facts["air_refusals"]) == (norms, rotary, [])
    types = [op.type for op in read_air(tmp_path / write_air.AIR)]
    assert (types.count("RmsNorm"), types.count(operator)) == (norms, rotary)
    assert not {"Rsqrt", "Neg"} & set(types)
    schemas, numbers = write_air.check_air(tmp_path, manifest, make_cases(graph, sizes=((1, 1), (2, 13))))
    assert schemas.status == "passed" and f"{rotary} of npu_rotary_mul" in schemas.detail
    assert numbers.status == "passed" and numbers.figure is not None and 0 < numbers.figure <= LIMIT


@pytest.mark.toolchain("ascend-air")
def test_packed_texts_are_evaluated_too(tmp_path):
    graph = capture(*packed_llama())
    _, manifest = emitted(graph, tmp_path)
    assert "IndexByTensor" in {op.type for op in read_air(tmp_path / write_air.AIR)}
    schemas, numbers = write_air.check_air(tmp_path, manifest, make_cases(graph, sizes=((1, 1), (2, 13))))
    assert schemas.status == numbers.status == "passed"


@pytest.mark.toolchain("ascend-air")
def test_every_mask_goes_through(tmp_path):
    """Causal, windows, cross attention with Sq other than Sk, grouped queries, global tokens; padded left and right."""
    graph = captured(*SPELLINGS)
    facts, manifest = emitted(graph, tmp_path)
    assert facts["air_attention"] == len(SPELLINGS)
    modes = {op.attributes["sparse_mode"] for op in read_air(tmp_path / write_air.AIR) if op.type == write_air.OPERATOR}
    assert modes == {0, 2, 3, 4}
    cases = [make_case(padded(side), graph.run(padded(side))) for side in ("left", "right")]
    schemas, numbers = write_air.check_air(tmp_path, manifest, cases)
    assert schemas.status == numbers.status == "passed"


@pytest.mark.toolchain("ascend-air")
def test_a_call_that_torch_npu_would_not_take_is_found(tmp_path, monkeypatch):
    graph = halved(tiny_bert(layers=1, width=16))
    emitted(graph, tmp_path)
    monkeypatch.setattr(write_air, "SCHEMA", write_air.SCHEMA.replace("sparse_mode=0", "sparse_mode=1"))
    schemas, _ = write_air.check_air(tmp_path, types.SimpleNamespace(outputs=graph.output_specs(), tolerance=LIMIT), [])
    assert (schemas.status, schemas.figure) == ("failed", 1) and "the schema is npu::" in schemas.detail


def test_weights_over_the_limit_are_one_error_before_anything_is_run(tmp_path, monkeypatch):
    monkeypatch.setattr(write_air, "WEIGHTS_LIMIT", 1000)
    with pytest.raises(LoweringError, match=r"a protobuf message ends at 2 GB; got .* build graph/model_atc.onnx"):
        emitted(capture(tiny_bert(layers=1, width=16)), tmp_path)


def test_chips_without_the_op_are_one_error(tmp_path):
    with pytest.raises(LoweringError, match=r"Ascend310P1, 310P3\) have no fused attention in a GE model; got Ascend310P3"):
        emitted(capture(tiny_bert(layers=1, width=16)), tmp_path, CHIPS["Ascend310P3"])


def test_without_the_environment_the_schemas_are_not_run_and_the_command_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(environments, "is_installed", lambda name: False)
    schemas = write_air._check_schemas(tmp_path)
    assert schemas.status == "not run" and "tilecut toolchain install ascend" in schemas.detail
    assert dataclasses.asdict(schemas)["figure"] is None
