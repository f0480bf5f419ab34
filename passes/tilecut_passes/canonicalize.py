"""Bring a freshly exported graph to the one spelling that the other passes read.

Before: what `torch.export` and `run_decompositions({})` leave.
After:
    - metadata assertions, clones, aliases, detaches, no-op dtype casts, whole-range slices and eval-mode dropouts are
      gone (the graph is functional, so a copy means nothing);
    - view and _unsafe_view are reshape (a view was legal for the strides of the traced shapes; a cut tensor has others);
    - contiguous is gone (reshape copies where it must);
    - scaled_dot_product_attention names its scale, so that a changed head width keeps the dense one;
    - indexing one dimension with a constant run (`x[:, [-2]]`) is a slice;
    - a matmul of rows sorted by expert is `tilecut::grouped_matmul`, whoever's op it was;
    - counting experts with histc is a comparison and a sum.
Left alone: everything else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tilecut_passes.graph import Graph, arguments, calls_before, is_call, size_of, source, value_of

# Importing it registers tilecut::grouped_matmul.
from tilecut_runtime import grouped_matmul as _grouped_matmul_op

aten = torch.ops.aten
assert _grouped_matmul_op

COPIES = (
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
)
CASTS = (aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.type_as.default)
VIEWS = (aten.view.default, aten._unsafe_view.default)
ASSERTIONS = (
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten.sym_constrain_range_for_size.default,
)
# By name: transformers registers its op when it is imported.
GROUPED_MATMULS = ("aten._grouped_mm.default", "transformers.grouped_mm_fallback.default")


@dataclass(frozen=True)
class Canonicalize:
    """Remove what means nothing and spell views and attention one way."""

    def __call__(self, graph: Graph) -> int:
        """Rewrite the graph; returns the number of rewrites."""
        count = 0
        for node in list(graph.nodes):
            if is_call(node, *ASSERTIONS):
                graph.fx.erase_node(node)
            elif (same := means_its_input(node)) is not None:
                node.replace_all_uses_with(same)
                graph.fx.erase_node(node)
            elif is_call(node, *VIEWS):
                node.target = aten.reshape.default
            elif is_call(node, aten.scaled_dot_product_attention.default) and arguments(node)["scale"] is None:
                node.kwargs = {**node.kwargs, "scale": int(value_of(source(node)).shape[-1]) ** -0.5}
            elif (made := _simpler(graph, node)) is not None:
                node.replace_all_uses_with(made)
                graph.fx.erase_node(node)
            else:
                continue
            count += 1
        return count


def _simpler(graph: Graph, node: fx.Node) -> fx.Node | None:
    """A call in simpler ops that means the same, placed before `node`; None where there is none."""
    if is_call(node, aten.index.Tensor):
        return _run_as_slice(graph, node)
    if node.op == "call_function" and str(node.target) in GROUPED_MATMULS:
        return _as_grouped_matmul(graph, node)
    if is_call(node, aten.histc.default):
        return _count_as_sum(graph, node)
    return None


def _run_as_slice(graph: Graph, node: fx.Node) -> fx.Node | None:
    """x[.., [i, i + 1, ..], ..] with constants: the slice i : i + n of that dimension."""
    x, indices = source(node), arguments(node)["indices"]
    given = [d for d, one in enumerate(indices) if one is not None]
    if len(given) != 1 or indices[given[0]].op != "get_attr":
        return None
    dim, wanted = given[0], graph.tensor(str(indices[given[0]].target))
    size = value_of(x).shape[dim]
    if wanted.dtype != torch.int64 or wanted.ndim != 1 or not len(wanted) or not isinstance(size, int):
        return None
    places = [int(i) % size for i in wanted]
    if places != list(range(places[0], places[0] + len(places))):
        return None
    with calls_before(graph, node) as call:
        return call(aten.slice.Tensor, x, dim, places[0], places[0] + len(places))


def _as_grouped_matmul(graph: Graph, node: fx.Node) -> fx.Node | None:
    """A grouped matmul of [T, I] by [E, I, O] with the ends of the groups."""
    given: tuple[Any, ...] = (*node.args, *node.kwargs.values())
    x, weight, ends, *rest = given
    if any(one is not None for one in rest) or ends is None:
        return None
    if value_of(x).ndim != 2 or value_of(weight).ndim != 3 or value_of(x).dtype != value_of(weight).dtype:
        return None
    with calls_before(graph, node) as call:
        return call(torch.ops.tilecut.grouped_matmul.default, x, weight, ends)


def _count_as_sum(graph: Graph, node: fx.Node) -> fx.Node | None:
    """histc of integers with one bin for each of 0..n-1: how often every one of them occurs."""
    a = arguments(node)
    counted, n = source(node), int(a["bins"])
    is_integer = is_call(counted, *CASTS) and not value_of(source(counted)).is_floating_point()
    if not is_integer or value_of(counted).ndim != 1 or (a["min"], a["max"]) != (0, n - 1):
        return None
    with calls_before(graph, node) as call:
        bins = call(aten.arange.default, n, device=value_of(counted).device)
        hits = call(aten.eq.Tensor, call(aten.unsqueeze.default, source(counted), 1), bins)
        return call(aten._to_copy.default, call(aten.sum.dim_IntList, hits, [0]), dtype=value_of(node).dtype)


def means_its_input(node: fx.Node) -> fx.Node | None:
    """The input that a call merely repeats, or None."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    given = node.args[0]
    before, after = value_of(given), value_of(node)
    if is_call(node, *COPIES):
        return given
    if is_call(node, *CASTS) and before.dtype == after.dtype and before.device == after.device:
        return given
    if is_call(node, aten.dropout.default) and not arguments(node)["train"]:
        return given
    is_view = is_call(node, aten.expand.default, aten.reshape.default, *VIEWS)
    if (
        (is_view or (is_call(node, aten.slice.Tensor) and arguments(node)["step"] == 1))
        and before.ndim == after.ndim
        and all(_same(x, y) for x, y in zip(before.shape, after.shape))
    ):
        return given
    return None


def _same(x: object, y: object) -> bool:
    """Whether two sizes are the same expression, without adding a guard."""
    return size_of(x) == size_of(y)
