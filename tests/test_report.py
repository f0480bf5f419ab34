import re
from html.parser import HTMLParser

import pytest

from tilecut.report import human_bytes, human_count, kept_per_layer, write_report


class Page(HTMLParser):
    """Collects text, outside links and how often each tag opens."""

    def __init__(self):
        super().__init__()
        self.text, self.links, self.tags = "", [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href") and v]

    def handle_data(self, data):
        self.text += data


def page(folder):
    parsed = Page()
    parsed.feed((folder / "report.html").read_text(encoding="utf-8"))
    return parsed


def test_the_page_is_self_contained_and_shows_every_figure(edge_artifact):
    shown, report = page(edge_artifact.path), edge_artifact.report
    assert not [link for link in shown.links if not link.startswith("#")]
    assert "script" not in shown.tags and "svg" in shown.tags
    words = [
        human_count(report["macs"]["dense"]),
        human_count(report["macs"]["pruned"]),
        human_count(report["parameters"]["pruned"]),
        human_bytes(report["bytes"]["deployed"]),
        report["lattice"],
        report["calibration"]["source"],
        *report["latency"]["contenders"],
        *(rung["name"] for rung in report["verification"]),
        *(f"{row['cpu_ms']:.2f}" for row in report["latency"]["contenders"].values()),
        *report["seconds"],
        human_bytes(report["peak_memory_bytes"]),
    ]
    for word in words:
        assert word in shown.text, word
    for group in report["groups"]:
        assert re.search(rf"\b{group['kept']}\b", shown.text)


@pytest.mark.parametrize("which", ["cuda_artifact", "ascend_artifact"])
def test_what_was_not_run_is_said(which, request):
    artifact = request.getfixturevalue(which)
    assert artifact.report["latency"]["status"] == "not measured"
    assert "not measured" in page(artifact.path).text
    rungs = {r["name"]: r["status"] for r in artifact.report["verification"]}
    assert "not run" in rungs.values()
    assert page(artifact.path).text.count("not run") >= list(rungs.values()).count("not run")


def test_markup_in_names_is_escaped(edge_artifact, tmp_path):
    write_report({**edge_artifact.report, "model": "<script>alert(1)</script>"}, tmp_path)
    assert "<script>" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_picture_has_a_row_a_group_with_its_fraction():
    groups = [
        {"name": "a", "kind": "heads", "size": 4, "kept": 1, "padded_to": None},
        {"name": "b", "kind": "neurons", "size": 8, "kept": 8, "padded_to": None},
        {"name": "c", "kind": "heads", "size": 2, "kept": 1, "padded_to": None},
    ]
    rows = kept_per_layer(groups)
    assert [r["fraction"] for r in rows["heads"]] == [0.25, 0.5]
    assert [r["fraction"] for r in rows["neurons"]] == [1.0]


def test_figures_for_people():
    assert [human_count(n) for n in (384, 22_713_216, 717_371_904, 1.4e9, 2e12)] == [
        "384",
        "22.7 M",
        "717 M",
        "1.40 G",
        "2.00 T",
    ]
    assert [human_bytes(n) for n in (12, 90_800_000)] == ["12 B", "90.8 MB"]


def test_bytes_add_up(edge_artifact):
    sizes = edge_artifact.report["bytes"]
    assert sizes["deployed"] == (edge_artifact.path / "model.onnx").stat().st_size
    for name, size in sizes["files"].items():
        assert (edge_artifact.path / name).stat().st_size == size
