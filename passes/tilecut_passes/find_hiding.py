"""Which masks hide where they are not 0: torch's own transformer layers take such ones.

A mask is read by what it does. Before: a graph, and inputs [B, S] or [S, S] that may be masks. After: those where 1 hides.
Every other position is marked; then a text is changed at the marked ones, and at the others. What is hidden changes
nothing elsewhere. `attention_mask` is taken at its word, and so is every mask of which this says nothing: 1 keeps.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, fx

from tilecut_passes.graph import Graph, size_at, sizes_of, value_of
from tilecut_runtime.errors import first_line

# Rows and positions that are tried.
ROWS, LENGTH = 2, 8
# Of the largest number, what rounding may change.
ROUNDING = 1e-6
KEEPS = "attention_mask"


def find_hiding(graph: Graph) -> tuple[str, ...]:
    """Names of the inputs [B, S] or [S, S] that hide keys where they are not 0; `Graph.notes` has those that cannot be tried."""
    masks = [name for name, node in zip(graph.inputs, graph.placeholders, strict=True) if _may_hide(name, node)]
    found = []
    for name in masks:
        try:
            if _Trial(graph, name, masks).hides():
                found.append(name)
        # Random inputs of small sizes need not be what the model can run on.
        except (RuntimeError, IndexError) as e:
            graph.notes.append(
                f"capture: whether {name} keeps or hides what it marks cannot be tried ({first_line(e)}); it keeps"
            )
    return tuple(found)


def may_mask(name: str, dims: int, dtype: torch.dtype) -> bool:
    """Whether an input is a mask of positions, as far as name and type say."""
    return dims == 2 and (dtype == torch.bool or ("mask" in name and not dtype.is_floating_point))


def _may_hide(name: str, node: fx.Node) -> bool:
    return not name.endswith(KEEPS) and may_mask(name, value_of(node).ndim, value_of(node).dtype)


class _Trial:
    """Runs of a graph in which one mask marks every other position."""

    def __init__(self, graph: Graph, mask: str, masks: list[str]):
        self.graph, self.mask = graph, mask
        self.others = [name for name in masks if name != mask]
        nodes = dict(zip(graph.inputs, graph.placeholders, strict=True))
        size = sizes_of(value_of(nodes[mask]))[1]
        # What it may hide: texts [B, S] and features [B, S, ..].
        self.texts = [
            n
            for n, node in nodes.items()
            if n not in masks
            and not n.endswith(KEEPS)
            and value_of(node).ndim >= 2
            and sizes_of(value_of(node))[1] == size
        ]
        rows = graph.row_sizes()
        sizes = {}
        for name in graph.dims.values():
            limits, wanted = graph.ranges[name], ROWS if name in rows else LENGTH
            sizes[name] = max(limits.min, wanted if limits.max is None else min(wanted, limits.max))
        self.shapes = {spec.name: [size_at(d, sizes) for d in spec.shape] for spec in graph.input_specs()}

    def hides(self) -> bool:
        """Whether a 1 hides, as far as any trial tells."""
        length = self.shapes[self.mask][1]
        if not self.texts or length < 2:
            return False
        for first, rest in itertools.product((0, 1), (0, 1)):
            marked = torch.arange(length) % 2 == first
            before = self._outputs(marked, rest)
            for text in self.texts:
                # Whether what changes at the marked positions, and at the others, reaches beyond them.
                reaches = [self._differ(before, self._outputs(marked, rest, text, at), ~at) for at in (marked, ~marked)]
                if reaches[0] != reaches[1]:
                    return reaches[1]
        return False

    def _outputs(self, marked: Tensor, rest: int, text: str = "", changed: Tensor | None = None) -> list[Tensor]:
        """With the other masks full of `rest`, and one text changed at some positions."""
        made = dict(self._made(0))
        if changed is not None:
            at = changed.reshape(-1, *[1] * (made[text].ndim - 2))
            made[text] = torch.where(at, dict(self._made(1))[text], made[text])
        made[self.mask] = marked.to(made[self.mask].dtype).expand_as(made[self.mask])
        made |= {name: torch.full_like(made[name], rest) for name in self.others}
        return [x for x in self.graph.run(made).values() if x.is_floating_point()]

    def _made(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """Random inputs; ids that differ from those of another seed everywhere, where the table has two rows."""
        generator = torch.Generator().manual_seed(seed)
        for name, node in zip(self.graph.inputs, self.graph.placeholders, strict=True):
            dtype, shape = value_of(node).dtype, self.shapes[name]
            if dtype.is_floating_point:
                yield name, torch.randn(shape, generator=generator).to(dtype)
            elif name.endswith(KEEPS):
                yield name, torch.ones(shape, dtype=dtype)
            else:
                rows = self.graph.table_rows().get(name, 2)
                yield (
                    name,
                    ((torch.randint(0, max(rows // 2, 1), shape, generator=generator) * 2 + seed) % rows).to(dtype),
                )

    def _differ(self, before: list[Tensor], after: list[Tensor], at: Tensor) -> bool:
        """Whether an output changed: at the given positions where it has positions, else anywhere."""
        for x, y in zip(before, after, strict=True):
            if x.ndim >= 2 and x.shape[1] == len(at):
                x, y = x[:, at], y[:, at]
            finite = x.isfinite() & y.isfinite()
            x, y = x[finite].double(), y[finite].double()
            if x.numel() and float((x - y).abs().max()) > ROUNDING * max(float(x.abs().max()), 1e-12):
                return True
        return False
