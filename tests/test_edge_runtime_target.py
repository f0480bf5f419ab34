"""What holds for every runtime behind "edge:": numbers on ragged batches, honest rungs, facts, sessions, fair contenders."""

from typing import Any

import numpy as np
import pytest
import torch

from checks import bert_graph, emit, groups_of, mlp_graph, text_batch
from tilecut.make_cases import make_case
from tilecut_passes.axes.groups import find_groups
from tilecut_passes.axes.infer import infer
from tilecut_passes.count_macs import MacCounter
from tilecut_passes.plan import PrunePlan
from tilecut_passes.prune import Prune
from tilecut_passes.run_passes import largest_error, run_passes
from tilecut_runtime.errors import ArtifactError, InputError
from tilecut_runtime.session import load
from tilecut_runtime.timing import PRUNED
from tilecut_targets.edge import measure_layers as measuring
from tilecut_targets.edge.contend import DENSE, EXPORTED
from tilecut_targets.edge.find_runtime import RUNTIMES, find_runtime

KEPT = {
    "encoder.layer.0.attention:heads": [1, 3],
    "encoder.layer.1.attention:heads": [0, 2, 3],
    "encoder.layer.0:neurons": range(3, 40),
    "encoder.layer.1:neurons": range(0, 48, 4),
}
DEVICES = ("qnn", "coreml")
HERE = tuple(word for word in RUNTIMES if word not in DEVICES)


def target_of(word) -> Any:
    """The target of a word; what all of these have, a `Target` has not."""
    return find_runtime(word)


# One size for the profiles of devices.
AT = {"batch": 3, "sequence": 17}


@pytest.fixture(scope="module")
def pruned():
    graph = bert_graph().copy()
    run_passes(graph, [Prune(PrunePlan.keep_all(graph, groups_of(graph)).keeping(KEPT))])
    return graph


@pytest.fixture(scope="module")
def emitted(pruned, tmp_path_factory):
    held = {}

    def make(word):
        if word not in held:
            held[word] = emit(target_of(word), pruned, tmp_path_factory.mktemp(word) / "artifact", AT)
        return held[word]

    return make


@pytest.mark.parametrize("word", RUNTIMES)
def test_a_right_artifact_passes_every_rung(emitted, word):
    made = emitted(word)
    first, equal, *rest = target_of(word).verify(made.folder, made.manifest, made.cases)
    assert first.status == "passed" and first.name in ("onnx checker", "openvino IR", "executorch program")
    assert (equal.name, equal.status, equal.limit) == ("artifact equals pruned model", "passed", 1e-4)
    assert 0 < equal.figure < 1e-5 and "ragged inputs of" in equal.detail
    assert [(r.name, r.status) for r in rest] == ([(f"{word} device", "not run")] if word in DEVICES else [])


@pytest.mark.parametrize("word", RUNTIMES)
def test_an_artifact_of_another_model_fails(emitted, word):
    made, dense = emitted(word), bert_graph()
    inputs = text_batch(3, 17)
    _, equal, *_ = target_of(word).verify(made.folder, made.manifest, [make_case(inputs, dense.run(inputs))])
    assert equal.status == "failed" and equal.figure > 1e-2


@pytest.mark.parametrize("word", HERE)
def test_lengths_from_one_to_the_maximum_give_the_pruned_models_numbers(pruned, emitted, word):
    session = load(emitted(word).folder, threads=1)
    for seed, (batch, length) in enumerate([(1, 1), (8, 1), (2, 2), (3, 31), (5, 64), (8, 200), (1, 512)]):
        inputs = text_batch(batch, length, seed)
        rows = inputs["attention_mask"] != 0
        want = pruned.run(inputs)
        got = session.run({k: v.numpy() for k, v in inputs.items()})
        assert list(got) == list(want) == ["last_hidden_state", "pooler_output"]
        for name, valid in (("last_hidden_state", rows), ("pooler_output", slice(None))):
            assert largest_error({"y": want[name][valid]}, {"y": torch.from_numpy(got[name])[valid]}) < 1e-4


@pytest.mark.parametrize("word", DEVICES)
def test_a_profile_of_a_device_takes_its_sizes_and_no_others(pruned, emitted, word):
    session = load(emitted(word).folder)
    inputs = text_batch(3, 17, seed=4)
    rows = inputs["attention_mask"] != 0
    assert not rows.all()
    want = pruned.run(inputs)["last_hidden_state"]
    got = torch.from_numpy(session.run({k: v.numpy() for k, v in inputs.items()})["last_hidden_state"])
    assert largest_error({"y": want[rows]}, {"y": got[rows]}) < 1e-4
    with pytest.raises(InputError, match="wrong size of dimension 1; got 16; wanted 17"):
        session.run({k: v.numpy() for k, v in text_batch(3, 16).items()})


@pytest.mark.parametrize("word", RUNTIMES)
def test_padding_does_not_reach_the_real_positions(emitted, word):
    session = load(emitted(word).folder)
    inputs = {k: v.numpy() for k, v in text_batch(3, 17).items()}
    rows = inputs["attention_mask"] != 0
    other = {**inputs, "input_ids": np.where(rows, inputs["input_ids"], 98 - inputs["input_ids"])}
    one, two = (session.run(x)["last_hidden_state"] for x in (inputs, other))
    assert np.array_equal(one[rows], two[rows]) and not np.array_equal(one[~rows], two[~rows])


@pytest.mark.parametrize("word", RUNTIMES)
def test_the_facts_say_what_is_emitted_and_why(emitted, word):
    facts: Any = emitted(word).written.facts
    assert facts["attention"] == 2 and facts["nodes"] == sum(facts["ops"].values()) > 20
    emits = facts["emits"]
    assert {part: entry["why"] for part, entry in emits.items()} == dict(target_of(word).why)
    assert sum(emits["attention"]["ops"].values()) == 2
    assert sum(emits["norms"]["ops"].values()) == 5
    assert sum(n for op, n in emits["activations"]["ops"].items() if "gelu" in op.lower()) == 2
    assert facts["sizes"]["sequence"] == ([17, 17] if word in DEVICES else [1, 512])


@pytest.mark.parametrize("word", RUNTIMES)
def test_a_damaged_file_does_not_pass(emitted, word, tmp_path):
    made = emitted(word)
    for name in ("model.onnx", "openvino_model.xml", "openvino_model.bin", "model.pte"):
        if (made.folder / name).is_file():
            (tmp_path / name).write_bytes(b"something else")
    with pytest.raises(ArtifactError, match=r"not valid ONNX|no IR|no program"):
        target_of(word).verify(tmp_path, made.manifest, made.cases)


@pytest.mark.parametrize("word", HERE)
def test_contenders_are_dense_models_in_the_same_runtime(emitted, word, tmp_path):
    made = emitted(word)
    found = target_of(word).contenders(bert_graph(), made.folder, made.manifest, 1, tmp_path)
    assert list(found.runners) == [PRUNED, DENSE, EXPORTED] and not found.failed
    inputs = text_batch(2, 9)
    want = bert_graph().run(inputs)["last_hidden_state"][inputs["attention_mask"] != 0]
    for name, run in found.runners.items():
        out = run({k: v.numpy() for k, v in inputs.items()})
        first = out["last_hidden_state"] if isinstance(out, dict) else out[0]
        error = largest_error({"y": want}, {"y": torch.from_numpy(first)[inputs["attention_mask"] != 0]})
        assert error > 1e-2 if name == PRUNED else error < 1e-4, name


@pytest.mark.parametrize("word", DEVICES)
def test_a_device_that_is_not_here_is_timed_by_nothing(emitted, word, tmp_path):
    made, target = emitted(word), target_of(word)
    assert target.contenders(bert_graph(), made.folder, made.manifest, 1, tmp_path) is None
    assert target.cost(bert_graph(), None, [], [], {}, target.lattice(), None, lambda i, n: None) is None
    assert made.written.facts["cost_model"].startswith("none: the device is not here")


@pytest.mark.parametrize("word", HERE)
def test_layers_are_timed_in_the_runtime_that_will_run_them(word, monkeypatch):
    graph, target = bert_graph(), target_of(word)
    axes = infer(graph)
    groups = [g for g in find_groups(axes) if g.kind == "neurons"]
    sets = MacCounter(axes, find_groups(axes), {"batch": 1, "sequence": 8}).groups_together([g.name for g in groups])
    opened = []

    def time_samples(target, samples, count, threads, evaluate, progress, open_model):
        opened.append(open_model)
        return evaluate({sample.name: 1.0 + len(sample.name) for sample in samples})

    monkeypatch.setattr(measuring, "time_samples", time_samples)
    model = target.cost(
        graph, axes, groups, sets, {"batch": 1, "sequence": 8, "threads": 1}, target.lattice(), None, lambda i, n: None
    )
    assert opened == [target.open_model]
    assert model.as_json()["facts"]["runtime"] == target.version


@pytest.mark.parametrize("word", HERE)
def test_a_written_layer_runs_in_the_runtime(word, tmp_path):
    from tilecut_targets.edge import time_samples as timing

    target = target_of(word)
    x = torch.randn(4, 12)
    path = timing.emit(target, mlp_graph().copy(), {"x": x}, tmp_path / "a")
    out = target.open_model(path, 1)({"x": x.numpy()})
    (got,) = out.values() if isinstance(out, dict) else out
    assert torch.allclose(torch.from_numpy(got), mlp_graph().run({"x": x})["output"], atol=1e-5)
