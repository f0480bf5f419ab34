"""Forms chosen by the clock: every form gives the same numbers, the choice follows the times, tables are kept and shipped."""

import json

import onnx
import onnxruntime as ort
import pytest
import torch

from checks import encoder_graph, run_onnx
from norm_models import llama
from tilecut.make_cases import make_inputs
from tilecut_passes.capture import capture
from tilecut_passes.run_passes import largest_error, run_passes
from tilecut_targets.edge import choose_forms as module
from tilecut_targets.edge.choose_forms import (
    DEFAULT,
    KEPT,
    MEASURED,
    SHIPPED,
    choose_forms,
    fastest,
    representatives,
    shipped_row,
    time_forms,
    weights_of,
    write_form,
)
from tilecut_targets.edge.find_sites import find_sites
from tilecut_targets.edge.forms import FORMS, Forms, write_forms
from tilecut_targets.edge.target import EdgeTarget
from tilecut_targets.edge.time_samples import record
from tilecut_targets.export_program import example_inputs

AT = {"batch": 1, "sequence": 9, "threads": 1}
# What an encoder holds; the other kinds are a decoder's.
KINDS = ("residual", "attention", "gelu")
VERSION = ".".join(ort.__version__.split(".")[:2])


@pytest.fixture(scope="module")
def graph():
    made = encoder_graph().copy()
    run_passes(made, EdgeTarget().fusing)
    return made


@pytest.fixture(scope="module")
def decoder():
    made = capture(llama())
    run_passes(made, EdgeTarget().fusing)
    return made


@pytest.fixture
def times(monkeypatch):
    """What the clock will say, by form; the graphs that were timed."""
    said, timed = {}, []

    def clock(graph, kind, samples, given, threads, progress=None):
        timed.append(kind)
        return {form: said.get(form, 1.0) for form in FORMS[kind]}

    monkeypatch.setattr(module, "time_forms", clock)
    monkeypatch.setattr(module, "read_table", dict)
    return said, timed


def test_the_defaults_are_the_first_forms():
    assert Forms().as_dict() == {kind: next(iter(forms)) for kind, forms in FORMS.items()}
    with pytest.raises(AssertionError, match="gelu has no form Relu"):
        Forms(gelu="Relu")


@pytest.mark.parametrize(("kind", "form"), [(kind, form) for kind in FORMS for form in FORMS[kind]])
def test_every_form_gives_the_sites_numbers(graph, decoder, kind, form, tmp_path):
    whole = graph if kind in KINDS else decoder
    site = next(find_sites(whole, kind))
    path = write_form(site, kind, form, tmp_path / "site.onnx")
    values = record(whole, make_inputs(whole, 3, 7, seed=1, ragged=True), {*site.inputs, *site.outputs})
    got = run_onnx(path, {name: values[name] for name in site.inputs})
    assert largest_error(got, {name: values[name] for name in site.outputs}) < 1e-4


@pytest.mark.parametrize("kind", FORMS)
def test_every_form_gives_the_models_numbers(graph, decoder, kind, tmp_path):
    whole = graph if kind in KINDS else decoder
    x = make_inputs(whole, 3, 7, seed=1, ragged=True)
    for form in FORMS[kind]:
        forms, made = Forms(**{kind: form}), whole.copy()
        run_passes(made, forms.passes)
        write_forms(made, tmp_path / "m.onnx", forms)
        assert largest_error(run_onnx(tmp_path / "m.onnx", x), whole.run(x)) < 1e-4, form
        held = onnx.load(str(tmp_path / "m.onnx")).opset_import
        assert max(one.version for one in held if one.domain == "") == FORMS[kind][form].opset


def test_forms_are_different_files(graph, decoder, tmp_path):
    for kind in FORMS:
        site = next(find_sites(graph if kind in KINDS else decoder, kind))
        files = [write_form(site, kind, form, tmp_path / f"{i}.onnx").read_bytes() for i, form in enumerate(FORMS[kind])]
        assert len(set(files)) == len(files), kind


def test_the_clock_runs_every_form(graph):
    sites = representatives(list(find_sites(graph, "gelu")))
    steps = []
    ms = time_forms(graph, "gelu", sites, example_inputs(graph, {"batch": 1, "sequence": 9}), 1, lambda *s: steps.append(s))
    assert list(ms) == list(FORMS["gelu"]) and min(ms.values()) > 0
    assert steps[-1][0] == steps[-1][1]


def test_the_first_form_stays_unless_another_is_clearly_faster():
    assert fastest({"a": 1.0, "b": 0.98, "c": 2.0}) == "a"
    assert fastest({"a": 1.0, "b": 0.9, "c": 0.8}) == "c"
    assert fastest({"a": 1.0}) == "a"


def test_the_choice_follows_the_clock_and_says_so(graph, times):
    said, timed = times
    said |= {"MultiHeadAttention": 0.5, "Add": 0.99}
    chosen = choose_forms(graph, AT, True, None)
    assert timed == list(KINDS)
    assert chosen.forms == Forms(attention="MultiHeadAttention")
    first = chosen.choices[1]
    assert (first.kind, first.source, first.sites) == ("attention", MEASURED, 2)
    assert first.as_json() == {
        "form": "MultiHeadAttention", "source": "measured", "sites": 2, "clock": "cpu",
        "ms": {"Attention": 1.0, "MultiHeadAttention": 0.5, "Attention of opset 23": 1.0, "MatMul and Softmax": 1.0},
    }  # fmt: skip


def test_what_was_measured_is_kept_and_not_measured_again(graph, times, tmp_path):
    said, timed = times
    said["Add"] = 0.5
    first = choose_forms(graph, AT, True, tmp_path)
    timed.clear()
    said.clear()
    # Not even where nothing is to be measured.
    for measure in (True, False):
        again = choose_forms(graph, AT, measure, tmp_path)
        assert again.forms == first.forms == Forms(residual="Add") and not timed
        assert {one.source for one in again.choices} == {KEPT}
    # Another length is another measurement.
    choose_forms(graph, {**AT, "sequence": 12}, True, tmp_path)
    assert timed == list(KINDS)


def test_a_kept_file_that_is_damaged_is_measured_again_and_said(graph, times, tmp_path):
    choose_forms(graph, AT, True, tmp_path)
    for file in tmp_path.glob("forms-*.json"):
        file.write_text("{")
    chosen = choose_forms(graph, AT, True, tmp_path)
    assert all("of no use" in str(one.note) and one.source == MEASURED for one in chosen.choices)
    assert {one.source for one in choose_forms(graph, AT, True, tmp_path).choices} == {KEPT}


def table(kind, weights, rows, ms, threads=1):
    row = {"kind": kind, "weights": weights, "rows": rows, "threads": threads, "clock": "cpu", "ms": ms}
    return {VERSION: {"processor": "a processor", "rows": [row]}}


def test_without_a_measurement_the_shipped_table_decides_where_it_has_something_near(graph, times, monkeypatch):
    _, timed = times
    weights = max(weights_of(site) for site in find_sites(graph, "residual"))
    ms = {"Sum": 2.0, "Add": 1.0}
    monkeypatch.setattr(module, "read_table", lambda: table("residual", weights, 9, ms))
    chosen = choose_forms(graph, AT, False, None)
    assert not timed and chosen.forms == Forms(residual="Add")
    sources = {one.kind: one.source for one in chosen.choices}
    assert sources == {"residual": SHIPPED, "attention": DEFAULT, "gelu": DEFAULT}
    # Too far away, for other forms, of another version: it says nothing.
    for held in (
        table("residual", weights * 100, 9, ms),
        table("residual", weights, 900, ms),
        table("residual", weights, 9, {"Sum": 2.0}),
        {"0.1": table("residual", weights, 9, ms)[VERSION]},
    ):
        monkeypatch.setattr(module, "read_table", lambda held=held: held)
        assert choose_forms(graph, AT, False, None).forms == Forms()


def test_a_measurement_that_differs_from_the_shipped_table_is_said(graph, times, monkeypatch):
    weights = max(weights_of(site) for site in find_sites(graph, "gelu"))
    monkeypatch.setattr(module, "read_table", lambda: table("gelu", weights, 9, {"BiasGelu": 2.0, "Gelu": 1.0}))
    notes = {one.kind: one.note for one in choose_forms(graph, AT, True, None).choices}
    assert notes == {
        "attention": None, "residual": None,
        "gelu": "forms.json says Gelu, which was measured on a processor",
    }  # fmt: skip


def test_the_shipped_table_is_whole():
    held = json.loads(json.dumps(module.read_table()))
    for version in held.values():
        assert version["processor"] and version["rows"]
        for row in version["rows"]:
            assert set(row["ms"]) == set(FORMS[row["kind"]]) and min(row["ms"].values()) > 0
            assert shipped_row(row["kind"], row["weights"], row["rows"], row["threads"])


def test_a_site_of_each_size_stands_for_all(graph):
    sites = list(find_sites(graph, "attention"))
    chosen = representatives(sites * 3)
    assert len(chosen) <= 3 and weights_of(chosen[0]) <= weights_of(chosen[-1])
    assert torch.is_tensor(next(iter(chosen[0].tensors.values())))
