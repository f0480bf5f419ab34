"""What a file holds, part by part."""

from tilecut_targets.edge.describe_emission import FORMS, NONE, describe_emission

WHY = {part: f"why {part}" for part in FORMS}


def test_ops_are_sorted_into_the_parts_that_they_are_forms_of():
    counts = {"MatMul": 9, "Softmax": 2, "LayerNormalization": 5, "Gelu": 2, "Tanh": 1}
    assert describe_emission(counts, WHY) == {
        "attention": {"ops": {"Softmax": 2}, "why": "why attention"},
        "norms": {"ops": {"LayerNormalization": 5}, "why": "why norms"},
        "rotary": {"ops": NONE, "why": "why rotary"},
        "activations": {"ops": {"Gelu": 2, "Tanh": 1}, "why": "why activations"},
    }


def test_who_runs_an_op_is_said_before_its_name():
    found = describe_emission({"xnnpack _softmax": 3, "native_layer_norm": 1}, WHY)
    assert found["attention"]["ops"] == {"xnnpack _softmax": 3}
    assert found["norms"]["ops"] == {"native_layer_norm": 1}
