"""Bring a freshly exported graph to the one spelling that the other passes read.

Before: what `torch.export` and `run_decompositions({})` leave.
After:
    - metadata assertions, clones, aliases, detaches, no-op dtype casts, whole-range slices and eval-mode dropouts are
      gone (the graph is functional, so a copy means nothing);
    - view and _unsafe_view are reshape (a view was legal for the strides of the traced shapes; a cut tensor has others);
    - contiguous is gone (reshape copies where it must);
    - scaled_dot_product_attention names its scale, so that a changed head width keeps the dense one.
Left alone: everything else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from tilecut_passes.graph import Graph, arguments, is_call, size_of, source, value_of

aten = torch.ops.aten

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
ASSERTIONS = (aten._assert_tensor_metadata.default, aten.sym_constrain_range_for_size.default)


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
            else:
                continue
            count += 1
        return count


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
    if is_call(node, aten.slice.Tensor):
        a = arguments(node)
        whole = (
            a["start"] in (0, None)
            and a["step"] == 1
            and (a["end"] is None or (isinstance(a["end"], int) and a["end"] > 1 << 60))
        )
        return given if whole else None
    if (
        is_call(node, aten.expand.default, aten.reshape.default, *VIEWS)
        and before.ndim == after.ndim
        and all(_same(x, y) for x, y in zip(before.shape, after.shape))
    ):
        return given
    return None


def _same(x: object, y: object) -> bool:
    """Whether two sizes are the same expression, without adding a guard."""
    return size_of(x) == size_of(y)
