"""A smaller vocabulary behind the caller's old one: ids and logits keep their numbers.

Cut:     rows of the table are selected. A lookup reads at `remap[id]`, the new row of a word that stays, or that of the
         stand-in for one that went; what is returned along the vocabulary is put back to its full width, the least
         number for words that went.
Masked:  nothing is selected. A lookup reads at `remap[id]` among the old rows, and what is returned has the same numbers.

The stand-in is the unit that the plan names (`GroupPlan.unknown`), or else the first that it keeps.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from tilecut_passes.axes.axis import Axis
from tilecut_passes.axes.infer import Axes
from tilecut_passes.axes.selection import Selection
from tilecut_passes.graph import REMAP, arguments, value_of

aten = torch.ops.aten
# The logit of a word that went: the least number that float32 and bfloat16 both have.
LEAST = torch.finfo(torch.bfloat16).min


def remap_lookups(axes: Axes, selection: Selection, masked: bool) -> int:
    """Read tables of a cut (or `masked`) vocabulary at the rows that ids have now; returns how many calls changed."""
    count = 0
    for node in axes.lookups:
        rows = axes.input(node)[0].root
        if not selection.touches(rows):
            continue
        ids = arguments(node)["indices"]
        table = axes.graph.add_tensor(f"{REMAP}{node.name}", _rows_now(selection, rows, masked))
        with axes.graph.fx.inserting_before(node):
            now = axes.graph.fx.call_function(aten.index.Tensor, (table, [_long(axes, ids)]))
        node.args, node.kwargs = (node.args[0], now), {}
        count += 1
    return count


def _long(axes: Axes, ids: fx.Node) -> fx.Node:
    if value_of(ids).dtype == torch.int64:
        return ids
    return axes.graph.fx.call_function(aten._to_copy.default, (ids,), {"dtype": torch.int64})


def _rows_now(selection: Selection, rows: Axis, masked: bool) -> Tensor:
    kept = selection.units[rows]
    stand_in = selection.stand_ins.get(rows, int(kept[0]))
    now = torch.arange(int(rows.size)) if masked else _places(kept, int(rows.size))
    went = torch.ones(int(rows.size), dtype=torch.bool)
    went[kept] = False
    now[went] = now[stand_in].clone()
    return now


def _places(kept: Tensor, size: int) -> Tensor:
    """The new number of every old one; `len(kept)` where it went."""
    places = torch.full((size,), len(kept))
    places[kept] = torch.arange(len(kept))
    return places


def widen_outputs(axes: Axes, selection: Selection, masked: bool) -> int:
    """Give outputs along a cut (or `masked`) vocabulary their full width; returns how many."""
    graph = axes.graph
    count = 0
    for name, axis in axes.returned:
        if not selection.touches(axis):
            continue
        rows = axis.root
        result = dict(zip(graph.outputs, graph.results, strict=True))[name]
        places = _places(selection.units[rows], int(rows.size))
        output = graph.fx.output_node()
        if masked:
            held = graph.add_tensor(f"tilecut_went_{count}", places == len(selection.units[rows]))
        else:
            held = graph.add_tensor(f"tilecut_places_{count}", places)
        with graph.fx.inserting_before(output):
            if masked:
                wide = graph.fx.call_function(aten.masked_fill.Scalar, (result, held, LEAST))
            else:
                more = graph.fx.call_function(aten.constant_pad_nd.default, (result, [0, 1], LEAST))
                wide = graph.fx.call_function(aten.index_select.default, (more, -1, held))
        wide.meta["val"] = value_of(result)
        results = [wide if n == name else r for n, r in zip(graph.outputs, graph.results, strict=True)]
        output.args = (tuple(results),)
        count += 1
    return count
