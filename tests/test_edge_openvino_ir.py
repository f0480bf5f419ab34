"""target="edge:openvino": IR in float32 with attention written out, opened by OpenVINO itself."""

import openvino as ov
import pytest

from checks import bert_graph, emit, text_batch
from tilecut_runtime.openvino_runner import open_openvino
from tilecut_targets.edge.openvino_ir import OpenVinoTarget


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return emit(OpenVinoTarget(), bert_graph(), tmp_path_factory.mktemp("openvino") / "a")


def test_attention_is_written_out_and_weights_are_float32(made):
    model = ov.Core().read_model(made.folder / "openvino_model.xml")
    types = [op.get_type_name() for op in model.get_ops()]
    assert types.count("Softmax") == 2 and types.count("MVN") == 5 and "ScaledDotProductAttention" not in types
    weights = [op for op in model.get_ops() if op.get_type_name() == "Constant" and len(op.get_output_shape(0)) == 2]
    assert weights and {op.get_element_type().get_type_name() for op in weights} >= {"f32"}
    assert not {op.get_element_type().get_type_name() for op in weights} & {"f16", "bf16"}


def test_names_and_dynamic_sizes_are_kept(made):
    model = ov.Core().read_model(made.folder / "openvino_model.xml")
    assert {p.get_any_name() for p in model.inputs} == {"input_ids", "attention_mask", "token_type_ids"}
    assert [p.get_any_name() for p in model.outputs] == ["last_hidden_state", "pooler_output"]
    assert all(p.get_partial_shape().is_dynamic for p in model.inputs)


def test_nothing_of_this_machine_is_in_the_file(made):
    text = (made.folder / "openvino_model.xml").read_text(encoding="utf-8")
    assert "/tmp" not in text and str(made.folder) not in text


def test_threads_and_precision_reach_the_plugin(made, monkeypatch):
    seen = []
    compiled = ov.Core.compile_model

    def compile_model(core, path, device, options):
        seen.append((device, dict(options)))
        return compiled(core, path, device, options)

    monkeypatch.setattr(ov.Core, "compile_model", compile_model)
    run = open_openvino(made.folder / "openvino_model.xml", 2)
    assert run({k: v.numpy() for k, v in text_batch(1, 3).items()})["pooler_output"].shape == (1, 32)
    ((device, options),) = seen
    assert device == "CPU"
    assert (options["INFERENCE_NUM_THREADS"], options["INFERENCE_PRECISION_HINT"]) == (2, "f32")


def test_results_outlive_the_next_run(made):
    run = open_openvino(made.folder / "openvino_model.xml", 1)
    one, two = ({k: v.numpy() for k, v in text_batch(1, 3, seed).items()} for seed in (1, 2))
    first = run(one)["pooler_output"]
    kept = first.copy()
    run(two)
    assert (first == kept).all()
