"""Make `targets/tilecut_targets/edge/forms.json`: how long each form of a computation takes in this onnxruntime.

    python benchmarks/measure_forms.py [--write]

One layer each of models of common widths, random weights, at three lengths, one thread. Without --write the
choices are compared with those of the table that is there, and differences are printed.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
import transformers

from tilecut_passes.capture import capture
from tilecut_passes.graph import Graph
from tilecut_passes.run_passes import run_passes
from tilecut_runtime.processor import processor_name
from tilecut_runtime.timing import clock
from tilecut_targets.edge.choose_forms import TABLE, fastest, read_table, representatives, time_forms, weights_of
from tilecut_targets.edge.find_sites import find_sites
from tilecut_targets.edge.forms import FORMS
from tilecut_targets.edge.target import EdgeTarget
from tilecut_targets.export_program import example_inputs

LENGTHS, THREADS = (32, 128, 512), (1,)
PLACE = Path(__file__).parent.parent / "targets" / "tilecut_targets" / "edge" / TABLE


def models() -> dict[str, Any]:
    """One layer of each."""
    bert = lambda width, heads, inner: transformers.BertModel(
        transformers.BertConfig(
            hidden_size=width, num_attention_heads=heads, intermediate_size=inner, num_hidden_layers=1, vocab_size=100
        )
    )
    return {
        "small encoder": bert(384, 12, 1536),
        "base encoder": bert(768, 12, 3072),
        "half of a small encoder": bert(384, 12, 768),
        "small decoder": transformers.GPT2Model(
            transformers.GPT2Config(n_embd=768, n_layer=1, n_head=12, vocab_size=100, use_cache=False)
        ),
        "grouped decoder": transformers.LlamaModel(
            transformers.LlamaConfig(
                hidden_size=512, intermediate_size=1408, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=2,
                vocab_size=100, max_position_embeddings=512, use_cache=False,
            )
        ),
    }  # fmt: skip


def rows_of(graph: Graph, length: int, threads: int) -> list[dict[str, Any]]:
    """A row for every kind of computation in a graph."""
    sizes = {name: 1 if name == "batch" else length for name in graph.dims.values()}
    given = example_inputs(graph, sizes)
    rows = []
    for kind in FORMS:
        sites = representatives(list(find_sites(graph, kind)))
        if sites:
            ms = time_forms(graph, kind, sites, given, threads)
            rows.append(
                {
                    "kind": kind,
                    "weights": max(map(weights_of, sites)),
                    "rows": math.prod(sizes.values()),
                    "threads": threads,
                    "clock": clock(threads),
                    "ms": {form: round(value, 4) for form, value in ms.items()},
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the rows of this onnxruntime into the table")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for name, model in models().items():
        graph = capture(model.eval())
        run_passes(graph, EdgeTarget().fusing)
        for length in LENGTHS:
            for threads in THREADS:
                for row in rows_of(graph, length, threads):
                    rows.append(row)
                    print(f"{name}, {length} tokens, {threads} threads: {row['kind']} {fastest(row['ms'])} {row['ms']}")
    version = ".".join(ort.__version__.split(".")[:2])
    table = json.loads(json.dumps(read_table()))
    same = lambda a, b: all(a[key] == b[key] for key in ("kind", "weights", "rows", "threads"))
    for old in table.get(version, {}).get("rows", []):
        for new in rows:
            if same(old, new) and fastest(old["ms"]) != fastest(new["ms"]):
                print(f"differs from {TABLE}: {old} / {new}")
    if options.write:
        table[version] = {"processor": processor_name(), "rows": rows}
        PLACE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
