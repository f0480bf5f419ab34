"""The measured cost model of the edge target. What is timed is faked by MACs where figures are compared."""

import itertools
import json
import types
from pathlib import Path

import onnxruntime as ort
import pytest
import torch

from checks import TinyMlp, bert_graph, encoder_graph, mlp_graph, randomise
from layer_graphs import graph_of
from tilecut_passes.axes.groups import find_groups
from tilecut_passes.axes.infer import infer
from tilecut_passes.capture import capture
from tilecut_passes.count_macs import MacCounter
from tilecut_passes.layer_region import resizing
from tilecut_passes.prune import Prune
from tilecut_passes.run_passes import run_passes
from tilecut_passes.search import Lattice, Limit, search
from tilecut_runtime.errors import ConfigError
from tilecut_targets.cost_model import CostModel
from tilecut_targets.edge import measure_layers as measuring
from tilecut_targets.edge import time_samples as timing
from tilecut_targets.edge.target import count_ops
from tilecut_targets.find_target import find_target
from tilecut_targets.target import Target

KINDS = ("heads", "kv_groups", "queries", "neurons")
EDGE = find_target("edge")
AT = {"batch": 1, "sequence": 8, "threads": 1}


def subject(graph, kinds=KINDS):
    axes = infer(graph)
    every = find_groups(axes)
    groups = [g for g in every if g.kind in kinds]
    counter = MacCounter(axes, every, AT)
    sets = counter.groups_together([g.name for g in groups])
    return types.SimpleNamespace(graph=graph, axes=axes, groups=groups, sets=sets, counter=counter)


def cost_of(s, folder=None, at=AT, lattice=None, target=EDGE, progress=lambda i, n: None) -> CostModel:
    made = target.cost(s.graph, s.axes, s.groups, s.sets, at, lattice or target.lattice(), folder, progress)
    assert made is not None
    return made


def macs_of(graph):
    axes = infer(graph)
    return MacCounter(axes, find_groups(axes), AT).total()


@pytest.fixture
def timed_by_macs(monkeypatch):
    """A clock on which a run takes a nanosecond a MAC; yields the names that it timed, a list a call."""
    calls = []

    def time_samples(target, samples, count, threads, evaluate, progress, open_model):
        ms = {sample.name: 1e-6 * macs_of(sample.graph) for sample in samples}
        assert len(ms) == count
        calls.append(list(ms))
        return evaluate(ms)

    monkeypatch.setattr(measuring, "time_samples", time_samples)
    return calls


@pytest.mark.parametrize("name", ["bert", "llama_gqa", "gpt2", "falcon_mqa", "albert", "encoder", "gated"])
def test_the_parts_of_a_model_are_the_whole_when_time_is_macs(timed_by_macs, name):
    s = subject(graph_of(name))
    model = cost_of(s)
    assert model.factor == pytest.approx(1) and model.worst < 1e-9 and not model.notes
    legal = {g.name: EDGE.emitted_sizes(EDGE.lattice(), g) for g in s.groups}
    for i in range(4):
        sizes = {g.name: legal[g.name][(3 * i + k) % len(legal[g.name])] for k, g in enumerate(s.groups)}
        assert model.total(sizes) == pytest.approx(1e-6 * s.counter.total(sizes), rel=1e-6)
        for names in s.sets:
            # The hidden width is in products of three sizes, which is linear in each.
            assert model.of(names, sizes) == pytest.approx(1e-6 * s.counter.of_groups(names, sizes), rel=1e-6)
    assert model.rest == pytest.approx(1e-6 * (s.counter.total() - s.counter.of_groups([g.name for g in s.groups])))


def test_layers_of_one_type_share_a_row(timed_by_macs):
    model = cost_of(subject(bert_graph()))
    heads, neurons = model.as_json()["layer_types"]
    assert (heads["kinds"], len(heads["layers"])) == (["heads"], 2)
    assert (neurons["kinds"], len(neurons["layers"])) == (["neurons"], 2)
    assert (heads["grid"], neurons["grid"]) == ([[1, 2, 3, 4]], [[16, 32, 48]])
    assert timed_by_macs == [
        [
            *measuring.WHOLE,
            *(f"layer type 0 at {n}" for n in (1, 2, 3, 4)),
            *(f"layer type 1 at {n}" for n in (16, 32, 48)),
        ]
    ]
    facts = model.as_json()["facts"]
    assert facts["sizes"] == {"batch": 1, "sequence": 8} and facts["clock"] == "cpu"


def test_a_group_that_is_left_out_belongs_to_the_rest(timed_by_macs):
    s = subject(bert_graph(), kinds=("neurons",))
    model = cost_of(s)
    assert {t["kinds"][0] for t in model.as_json()["layer_types"]} == {"neurons"}
    assert model.rest == pytest.approx(1e-6 * (s.counter.total() - s.counter.of_groups([g.name for g in s.groups])))


def test_sizes_are_those_after_padding(timed_by_macs):
    # 23 and 40 neurons become 32 and 48; 3 heads become 4 where powers of two are asked for.
    s = subject(encoder_graph())
    model = cost_of(s, lattice=EDGE.lattice(power_of_two_heads=True))
    grids = [t["grid"][0] for t in model.as_json()["layer_types"]]
    assert sorted(max(g) for g in grids) == [2, 4, 32, 48]
    dense = next(c for c in model.checks if c.name == "dense")
    assert sorted(dense.sizes.values()) == [2, 4, 32, 48]
    padded = s.graph.copy()
    run_passes(padded, [Prune(resizing(s.graph, s.groups, [dense.sizes[g.name] for g in s.groups]))])
    assert dense.measured == pytest.approx(1e-6 * macs_of(padded))


def test_a_budget_of_milliseconds_is_met_and_used(timed_by_macs):
    s = subject(bert_graph(neurons=256))
    model, lattice = cost_of(s), EDGE.lattice()
    sizes = {g.name: lattice.sizes(g.kind, g.size) for g in s.groups}
    curves = {g.name: [float(g.size - n) / g.size for n in range(g.size + 1)] for g in s.groups}
    dense = model.total({g.name: g.size for g in s.groups})
    for fraction in (0.8, 0.5, 0.3):
        limit = Limit("milliseconds", fraction * dense, model.of, rest=model.rest)
        found = search(s.groups, s.sets, curves, sizes, [limit])
        assert 0.9 * fraction * dense < model.total(found) <= fraction * dense
        assert 1e-6 * s.counter.total(found) <= fraction * dense * (1 + 1e-9)


def test_a_model_that_is_kept_is_not_measured_again(timed_by_macs, tmp_path):
    s = subject(bert_graph())
    first = cost_of(s, tmp_path)
    second = cost_of(s, tmp_path, lattice=EDGE.lattice(block=32))
    assert len(timed_by_macs) == 1
    assert second.as_json() == first.as_json() and not second.notes
    assert len(list(tmp_path.iterdir())) == 1


def test_nothing_is_kept_without_a_folder(timed_by_macs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    s = subject(mlp_graph())
    cost_of(s)
    cost_of(s)
    assert len(timed_by_macs) == 2 and not list(tmp_path.iterdir())


def corrupt(path: Path, how: str) -> None:
    held = json.loads(path.read_text())
    if how == "foreign":
        held["key"]["processor"] = "another"
    elif how == "a part is missing":
        del held["model"]["layer_types"][0]["grid"]
    elif how == "a number is none":
        held["model"]["layer_types"][0]["ms"][0] = "x"
    elif how == "a grid does not fit":
        held["model"]["layer_types"][0]["grid"][0].append(999)
    path.write_text({"cut short": path.read_text()[:99], "not JSON": "\x00", "a list": "[]"}.get(how, json.dumps(held)))


@pytest.mark.parametrize(
    "how",
    ["foreign", "a part is missing", "a number is none", "a grid does not fit", "cut short", "not JSON", "a list"],
)
def test_a_file_that_is_of_no_use_is_made_again_and_that_is_said(timed_by_macs, tmp_path, how):
    s = subject(mlp_graph())
    first = cost_of(s, tmp_path)
    (path,) = tmp_path.iterdir()
    corrupt(path, how)
    second = cost_of(s, tmp_path)
    assert len(timed_by_macs) == 2
    (note,) = second.notes
    assert path.name in note and "was measured again" in note
    assert ("another model or machine" in note) == (how == "foreign")
    # The file is good again, and what happened to the old one is no part of it.
    assert cost_of(s, tmp_path).as_json() == first.as_json()
    assert len(timed_by_macs) == 2 and len(list(tmp_path.iterdir())) == 1


def test_what_a_measurement_holds_for(timed_by_macs, tmp_path, monkeypatch):
    s = subject(mlp_graph())
    cost_of(s, tmp_path)
    cost_of(subject(mlp_graph(seed=1)), tmp_path)
    # Other weights cost the same; every other difference is measured.
    assert len(timed_by_macs) == 1
    cost_of(s, tmp_path, at={**AT, "batch": 2})
    cost_of(s, tmp_path, at={**AT, "threads": 2})
    cost_of(subject(mlp_graph(neurons=24)), tmp_path)
    assert len(timed_by_macs) == 4
    for where, value in ((f"{measuring.__name__}.processor_name", lambda: "another"), ("onnxruntime.__version__", "0")):
        with monkeypatch.context() as changed:
            changed.setattr(where, value)
            cost_of(s, tmp_path)
    monkeypatch.setattr(measuring, "FORMAT", 0)
    cost_of(s, tmp_path)
    assert len(timed_by_macs) == 7 and len(list(tmp_path.iterdir())) == 7


def test_sizes_are_what_latency_is_measured_at():
    graph = bert_graph()
    assert measuring.sizes_at(graph, {"batch": 3, "sequence": 20, "threads": 1}) == {"batch": 3, "sequence": 20}
    assert measuring.sizes_at(graph, {"sequence": 1000}) == {"batch": 1, "sequence": 512}


def test_a_grid_has_the_ends_and_is_even():
    assert measuring.spread(range(1, 13), 5) == (1, 4, 6, 9, 12)
    assert measuring.spread([16, 32], 5) == (16, 32)
    assert measuring.spread([7], 5) == (7,)
    group = types.SimpleNamespace(kind="neurons", size=1500)
    assert EDGE.emitted_sizes(Lattice({"neurons": 64}, padded={"neurons": 64}), group)[-2:] == [1504, 1536]


def test_nothing_to_cut_is_one_clear_error(timed_by_macs):
    s = subject(mlp_graph(), kinds=())
    with pytest.raises(ConfigError, match="no group of the model can be cut: there is no latency to choose"):
        cost_of(s)
    assert not timed_by_macs


def test_too_many_groups_together_are_refused():
    model = randomise(torch.nn.Sequential(*(torch.nn.Linear(6, 6) for _ in range(7))))
    with pytest.raises(ConfigError, match="shares contractions with 5 other groups; wanted at most 4"):
        cost_of(subject(capture(model, torch.randn(2, 6))))


@pytest.fixture
def few_rounds(monkeypatch):
    """Real sessions, and few runs of them: no figure is looked at."""
    monkeypatch.setattr(timing, "ROUNDS", 2)
    monkeypatch.setattr(timing, "WARMUP", 0)
    # However wrong a model of so few runs is, once is enough.
    monkeypatch.setattr(timing, "TRUSTED", float("inf"))


def test_real_runs_give_a_model(few_rounds, tmp_path):
    s = subject(mlp_graph(neurons=32))
    steps = []
    model = cost_of(s, tmp_path, progress=lambda done, of: steps.append((done, of)))
    (table,) = model.as_json()["layer_types"]
    assert table["grid"] == [[16, 32]] and all(ms > 0 for ms in table["ms"])
    # 32 neurons have two legal sizes: no more whole models than that.
    assert [c.name for c in model.checks] == ["dense", "3/5 of all"] and all(c.measured > 0 for c in model.checks)
    assert steps == [(i, 6) for i in range(1, 7)]
    # The sessions are gone; the same model is found again, without a step.
    assert cost_of(s, tmp_path, progress=lambda done, of: pytest.fail("measured again")).as_json() == model.as_json()


def test_a_layer_is_emitted_as_it_is_in_the_whole_model(tmp_path):
    s = subject(bert_graph())
    kinds = measuring.layer_types(EDGE, s.axes, s.groups, s.sets, EDGE.lattice())
    inputs = measuring.example_inputs(s.graph, {"batch": 1, "sequence": 8})
    samples = list(measuring.region_samples(s.graph, kinds, inputs))
    assert [x.name for x in samples] == [
        f"layer type {i} at {n}" for i, sizes in enumerate([(1, 2, 3, 4), (16, 32, 48)]) for n in sizes
    ]
    for sample, fused in ((samples[0], "Attention"), (samples[4], "BiasGelu")):
        want = sample.graph.run(sample.inputs)
        path = timing.emit(EDGE, sample.graph, sample.inputs, tmp_path / fused)
        assert count_ops(path)[fused] == 1
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        taken = {i.name for i in session.get_inputs()}
        got = session.run(None, {n: x.numpy() for n, x in sample.inputs.items() if n in taken})
        assert all(torch.allclose(torch.from_numpy(a), b, atol=1e-4) for a, b in zip(got, want.values(), strict=True))


def test_threads_rest_while_other_sessions_are_timed(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "onnxruntime.InferenceSession", lambda path, options, **_: seen.append(options)
    )
    timing.plain_session(Path("model.onnx"), 3)
    (options,) = seen
    assert options.intra_op_num_threads == 3
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


def test_a_poor_fit_is_measured_once_more_and_the_lower_times_count(monkeypatch):
    graph = capture(randomise(TinyMlp()), torch.randn(4, 12))
    rounds = itertools.count()

    def time_interleaved(runners, *_):
        ms = 5.0 - 2 * next(rounds)
        return {name: types.SimpleNamespace(cpu_ms=ms, wall_ms=9.0) for name in runners}

    seen = []

    def evaluate(ms):
        seen.append(dict(ms))
        return types.SimpleNamespace(worst=0.2)

    monkeypatch.setattr(timing, "time_interleaved", time_interleaved)
    sample = timing.Sample("a", graph.copy(), {"x": torch.randn(4, 12)})
    timing.time_samples(EDGE, [sample], 1, 1, evaluate, lambda i, n: None)
    assert seen == [{"a": 5.0}, {"a": 3.0}]


def test_a_target_says_nothing_of_its_cost_unless_it_is_told_how():
    s = subject(mlp_graph())
    target = find_target("ascend")
    assert Target.cost(target, s.graph, s.axes, s.groups, s.sets, AT, target.lattice(), None, lambda i, n: None) is None
