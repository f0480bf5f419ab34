"""The GPU benchmarks at their smallest on the CPU: every contender has a row, ours are right, the picture is there."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import contenders
import decoder
import tilecut
import tilecut_passes
import tilecut_runtime
import tilecut_targets
import varlen
from attention_peers import DENSE, PACKED, Packed, csr
from checks import ROOT
from contenders import OURS, Clock, Entry, Goal, LeftOut, Missing, attempt, need, race, relative_error, times_peer

CPU = torch.device("cpu")
# The module's name is that of many things.
ops = importlib.import_module("attention")


def run_benchmark(name: str, folder: Path, *arguments: str) -> dict:
    packages = (tilecut, tilecut_targets, tilecut_passes, tilecut_runtime)
    paths = os.pathsep.join(str(Path(str(p.__file__)).parent.parent) for p in packages)
    output = folder / f"{name}.json"
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / f"{name}.py", "--device", "cpu", "--output", output, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "goals, on one H100" in done.stdout
    held = json.loads(output.read_text())
    assert held["size"] == "small" and held["gpu"] is None
    assert all(goal["got"] == [] and goal["met"] is None for goal in held["goals"])
    for row in held["rows"]:
        assert row["status"] in ("ok", "missing", "failed", "left out"), row
        assert (row["status"] == "ok") == ("ms" in row) == (row["why"] is None), row
    return held


def by_case(rows):
    cases = {}
    for row in rows:
        cases.setdefault(row["case"], {})[row["name"]] = row
    return cases


def test_attention_py(tmp_path):
    cases = by_case(run_benchmark("attention", tmp_path)["rows"])
    sections = {row["section"].split(",")[0].rstrip(" 0123456789") for held in cases.values() for row in held.values()}
    assert sections == {"dense", "grouped", "few heads", "decode", "packed", "blocks"}
    for case, held in cases.items():
        wanted = DENSE if case.split(" ")[0].strip(",") in ("dense", "grouped", "few", "decode") else PACKED
        assert set(wanted) <= set(held) and held[OURS]["status"] == "ok"
        assert held[OURS]["error"] < 1e-5
    assert all(held["tilecut, no list"]["status"] == "ok" for case, held in cases.items() if case.startswith("blocks"))


def test_varlen_py(tmp_path):
    held = run_benchmark("varlen", tmp_path, "--steps", "3", "--warmup", "2")
    cases = by_case(held["rows"])
    names = [*decoder.layouts(8), varlen.PRUNED]
    for case in ("decoder, eval", "decoder, train"):
        assert set(cases[case]) == {f"{name}, {form}" for name in names for form in varlen.FORMS}
        for name in (OURS, varlen.PRUNED, "SDPA, padded"):
            assert all(cases[case][f"{name}, {form}"]["status"] == "ok" for form in varlen.FORMS)
    assert len(cases["GPT-2, train"]) == 10
    assert cases["GPT-2, train"][f"{OURS}, eager"]["status"] == "ok"
    assert cases["GPT-2, train"]["SDPA, packed, eager"]["status"] == "ok"
    alone = [case for case in cases if case.startswith("packed op")]
    assert len(alone) == 4 and all(cases[case][OURS]["status"] == "ok" for case in alone)


def test_a_contender_that_sees_its_neighbours_is_wrong():
    bench = varlen.Bench(varlen.SIZES["small"], CPU, "eager", None)
    texts = bench.texts(shifted=True)

    def leaking(batch, causal, device):
        found = decoder.packed(batch, causal, device)
        bounds = torch.tensor([0, len(found.ids)], dtype=torch.int32)
        return found._replace(context=found.context._replace(cu_seqlens=bounds, longest=len(found.ids)))

    layout = replace(decoder.layouts(48)[OURS], prepare=leaking)
    held = bench.decoders(bench.size.shape)
    want, tolerance = bench.reference(held["SDPA, pad to longest"], texts, True)
    right = bench.measure(held[OURS], False, texts, True, want, tolerance)
    assert right["status"] == "ok"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "layouts", lambda longest: {OURS: layout})
        wrong = bench.measure(bench.decoders(bench.size.shape)[OURS], False, texts, True, want, tolerance)
    assert wrong["status"] == "wrong" and "ms" not in wrong and wrong["error"] > 100 * tolerance


def test_texts_are_the_same_in_every_process():
    texts = varlen.Texts(8, 30, 50, shifted=True)
    again = varlen.Texts(8, 30, 50, shifted=False)
    assert len(texts) == len(list(texts)) == 8
    for i in range(8):
        assert torch.equal(texts[i]["input_ids"], again[i]["input_ids"])
        assert torch.equal(texts[i]["labels"][:-1], texts[i]["input_ids"][1:])
        assert torch.equal(again[i]["labels"], again[i]["input_ids"])


def test_every_contender_has_a_row():
    def fails():
        raise ValueError("no such kernel\nand more")

    def left_out():
        raise LeftOut("too long")

    makers = {
        OURS: lambda: Entry(lambda: None, 1e-3),
        "wrong": lambda: Entry(lambda: None, 0.2),
        "nan": lambda: Entry(lambda: None, float("nan")),
        "missing": lambda: need("no_such_package"),
        "fails": fails,
        "left out": left_out,
    }
    rows = race({"case": "c"}, makers, Clock(CPU, 2, 1), 0.1)
    assert {row["name"]: row["status"] for row in rows} == {
        OURS: "ok",
        "wrong": "wrong",
        "nan": "wrong",
        "missing": "missing",
        "fails": "failed",
        "left out": "left out",
    }
    assert rows[4]["why"] == "ValueError: no such kernel" and rows[5]["why"] == "too long"
    assert [row["name"] for row in rows if "ms" in row] == [OURS]


def test_one_that_fails_while_timed_does_not_end_the_run():
    calls = []

    def run():
        calls.append(0)
        if len(calls) > 1:
            raise MemoryError("full")

    makers = {"x": lambda: Entry(run, 0.0), OURS: lambda: Entry(lambda: None, 0.0)}
    rows = race({"case": "c"}, makers, Clock(CPU, 3, 0), 0.1)
    assert rows[0]["status"] == "failed" and rows[0]["why"] == "while timed: MemoryError: full"
    assert "ms" not in rows[0] and rows[1]["status"] == "ok" and "ms" in rows[1] and len(calls) == 2
    assert attempt(lambda: need("json").no_such_thing, 1.0)["status"] == "failed"


def test_goals():
    rows = [
        {"case": "a", "name": OURS, "ms": 2.0},
        {"case": "a", "name": "peer", "ms": 3.0},
        {"case": "b", "name": OURS, "ms": 2.0},
        {"case": "b", "name": "peer", "ms": 1.0},
        {"case": "c", "name": "peer", "ms": 1.0},
    ]
    assert times_peer(rows, "peer") == [1.5, 0.5]
    assert Goal("x", 1.0, [1.5]).met is True and Goal("x", 1.0, [1.5, 0.5]).met is False
    assert Goal("x", 1.0, []).met is None and Goal("x", 42, [40], at_most=True).met is True
    assert Goal("x", 1.0, [1.5, 0.5]).cells()[2:] == ["1.00 x (0.50 to 1.50 in 2 cases)", "no"]


def test_float64_is_autograds():
    q, k, v = (torch.randn(*shape, 6, dtype=torch.float64, requires_grad=True) for shape in ((2, 9), (9,), (9,)))
    grad = torch.randn(2, 9, 6, dtype=torch.float64)
    exact = ops.exact(q.detach(), k.detach(), v.detach(), grad, lambda i, j: i >= j)
    out = torch.nn.functional.scaled_dot_product_attention(q, k.expand(2, 9, 6), v.expand(2, 9, 6), is_causal=True)
    out.backward(grad)
    for got, want in zip(exact, (out, q.grad, k.grad, v.grad)):
        assert torch.allclose(got, want, atol=1e-12)


def test_lists_of_blocks_are_the_visible_tiles():
    visible = torch.tensor([[True, False], [True, True]])
    offsets, indices = csr(visible, 200)
    # 200 tokens are three and a bit blocks of 64.
    assert offsets.tolist() == [[0, 2, 4, 8, 12]]
    assert indices.tolist() == [0, 1, 0, 1, 0, 1, 2, 3, 0, 1, 2, 3]
    p = Packed((256,), 2, 8, False, torch.float32, CPU, visible)
    problem = ops.packed_problem(p)
    assert ops.forward(problem, lambda: PACKED[OURS](p)).error < 1e-6
    assert ops.forward(problem, lambda: PACKED[OURS](replace(p, blocks=None))).error > 0.1


def test_varlen_attn_is_asked_in_the_words_of_this_torch(monkeypatch):
    from torch.nn.attention import varlen as module

    from attention_peers import varlen_attn

    asked = []
    monkeypatch.setattr(module, "varlen_attn", lambda q, *, is_causal=False: asked.append(is_causal))
    varlen_attn(True, grouped=True)(0)
    monkeypatch.setattr(module, "varlen_attn", lambda q, *, window_size=(-1, -1): asked.append(window_size))
    varlen_attn(True, grouped=True)(0)
    varlen_attn(False)(0)
    monkeypatch.setattr(
        module, "varlen_attn", lambda q, *, window_size=(-1, -1), enable_gqa=False: asked.append(enable_gqa)
    )
    varlen_attn(True, grouped=True)(0)
    assert asked == [True, (-1, 0), (-1, -1), True]


def test_relative_error_and_words():
    one = torch.ones(4)
    assert relative_error(one * 1.5, one) == pytest.approx(0.5)
    assert (
        contenders.wanted(None, "x") and contenders.wanted("SDPA, tile", "tilecut") and not contenders.wanted("q", "x")
    )
    with pytest.raises(Missing, match="cannot import no_such_package: ModuleNotFoundError"):
        need("no_such_package")
