"""Which masks hide where they are not 0: torch's own transformer layers take such ones.

A mask is read by what it does. Before: a graph, and inputs [B, S] or [S, S] that may be masks. After: those where 1 hides, and
bools that cannot be told. Every other position is marked; then a text is changed at the marked ones, and at the others. What
is hidden changes nothing elsewhere. It is still its own text, or can be cut off at the end: else the mask puts something in
the text's place. `attention_mask` is taken at its word, and so is every mask of integers of which this says nothing: 1 keeps.
"""

from __future__ import annotations

import itertools
from typing import Any

import sympy
import torch
from torch import Tensor

from tilecut_passes.graph import Graph, size_at, sizes_of, symbols_of, value_of
from tilecut_runtime.errors import first_line

# Rows and positions that are tried, and how many are cut off.
ROWS, LENGTH, CUT = 2, 8, 2
# Of the largest number, what rounding may change.
ROUNDING = 1e-6
KEEPS = "attention_mask"
# What the other masks are full of, or that they are as the one that is tried.
SAME = 2


def find_hiding(graph: Graph) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the inputs [B, S] or [S, S] that hide keys where they are not 0, and of bools that no run explains."""
    values = {name: value_of(node) for name, node in zip(graph.inputs, graph.placeholders, strict=True)}
    masks = [name for name, x in values.items() if not name.endswith(KEEPS) and may_mask(name, x.ndim, x.dtype)]
    hiding, unclear = [], []
    for name in masks:
        hides, why = None, "no run tells"
        try:
            hides = _Trial(graph, name, masks, values).hides()
        # Random inputs of small sizes need not be what the model can run on, and a model may raise anything.
        except Exception as e:
            why = f"it cannot be tried: {first_line(e)}"
        if hides:
            hiding.append(name)
        elif hides is None and values[name].dtype == torch.bool:
            unclear.append(name)
            graph.notes.append(f"capture: whether {name} keeps or hides what it marks is not known ({why})")
    return tuple(hiding), tuple(unclear)


def may_mask(name: str, dims: int, dtype: torch.dtype) -> bool:
    """Whether an input is a mask of positions, as far as name and type say."""
    return dims == 2 and (dtype == torch.bool or ("mask" in name and not dtype.is_floating_point))


# Outputs, each with its dimension of positions.
Placed = list[tuple[Tensor, int | None]]


class _Trial:
    """Runs of a graph in which one mask marks some positions."""

    def __init__(self, graph: Graph, mask: str, masks: list[str], values: dict[str, Tensor]):
        self.graph, self.mask, self.masks = graph, mask, masks
        self.sizes = {name: sizes_of(value) for name, value in values.items()}
        self.size = self.sizes[mask][1]
        # What it may hide: ids [B, S] and features [B, S, ..], or [S, B], [S, B, ..].
        self.texts = [
            name
            for name, value in values.items()
            if name not in masks
            and not name.endswith(KEEPS)
            and value.ndim >= (3 if value.is_floating_point() else 2)
            and self._axis(self.sizes[name]) is not None
        ]
        rows = graph.row_sizes()
        sizes = {
            name: graph.ranges[name].nearest(ROWS if name in rows and symbol != self.size else LENGTH)
            for symbol, name in graph.dims.items()
        }
        shapes = {spec.name: [size_at(d, sizes) for d in spec.shape] for spec in graph.input_specs()}
        self.length = shapes[mask][1]
        self.given, self.others = (_random(graph, values, shapes, seed) for seed in (0, 1))

    def hides(self) -> bool | None:
        """Whether a 1 hides; None where no trial tells."""
        if self.length < 2:
            return None
        for first, rest in itertools.product((0, 1), (0, 1, SAME)):
            marked = torch.arange(self.length) % 2 == first
            before = self._run(self._made(marked, rest))
            for text in self.texts:
                inside, outside = (self._run(self._made(marked, rest, text, at)) for at in (marked, ~marked))
                # Whether what changes at the marked positions, and at the others, reaches beyond them.
                from_marked, from_others = self._differ(before, inside, ~marked), self._differ(before, outside, marked)
                if from_marked and not from_others:
                    return False
                if from_others and not from_marked and (self._own(before, inside, marked) or self._can_be_cut(rest)):
                    return True
        return None

    def _axis(self, sizes: list[Any]) -> int | None:
        """Which dimension counts the positions; None where none does, or it cannot be told."""
        found = [d for d, size in enumerate(sizes) if size == self.size]
        return found[0] if len(found) == 1 else 1 if found == [0, 1] else None

    def _made(self, marked: Tensor, rest: int, text: str = "", changed: Tensor | None = None) -> dict[str, Tensor]:
        """Random inputs with the mask as it is to be, the others full of `rest`, and one text changed at some positions."""
        made = dict(self.given)
        if changed is not None:
            axis = self._axis(self.sizes[text])
            shape = [-1 if d == axis else 1 for d in range(made[text].ndim)]
            made[text] = torch.where(changed.reshape(shape), self.others[text], made[text])
        for name in self.masks:
            as_this = name == self.mask or (rest == SAME and made[name].shape[1] == self.length)
            fill = marked if as_this else torch.tensor(rest == 1)
            made[name] = fill.to(made[name].dtype).expand_as(made[name])
        return made

    def _run(self, inputs: dict[str, Tensor]) -> Placed:
        """The outputs that have positions, with their dimension of them; all, where none has."""
        values = self.graph.run(inputs).values()
        found = [
            (x, self._axis(sizes_of(value_of(n)))) for x, n in zip(values, self.graph.results) if x.is_floating_point()
        ]
        return [one for one in found if one[1] is not None] or found

    def _differ(self, before: Placed, after: Placed, at: Tensor) -> bool:
        """Whether an output changed: at the given positions where it has positions, else anywhere."""
        return any(
            _unequal(*(x if axis is None else x.index_select(axis, at.nonzero()[:, 0]) for x in (old, new)))
            for (old, axis), (new, _) in zip(before, after, strict=True)
        )

    def _own(self, before: Placed, after: Placed, at: Tensor) -> bool:
        """Whether what was changed shows at its own positions."""
        return before[0][1] is not None and self._differ(before, after, at)

    def _can_be_cut(self, rest: int) -> bool:
        """Whether the last positions, marked, are as good as not there."""
        size, short = self.size, self.length - CUT
        if not isinstance(size, sympy.Symbol) or short < max(self.graph.ranges[self.graph.dims[size]].min, 1):
            return False
        if any(size in symbols_of(s) and s != size for sizes in self.sizes.values() for s in sizes):
            return False
        whole = self._made(torch.arange(self.length) >= short, rest)
        part = {
            name: value[tuple(slice(short) if s == size else slice(None) for s in self.sizes[name])]
            for name, value in whole.items()
        }
        kept = torch.arange(self.length) < short
        outputs = [(x if d is None else x.index_select(d, kept.nonzero()[:, 0]), d) for x, d in self._run(whole)]
        return all(x.shape == y.shape and not _unequal(x, y) for (x, _), (y, _) in zip(outputs, self._run(part)))


def _random(graph: Graph, values: dict[str, Tensor], shapes: dict[str, list[int]], seed: int) -> dict[str, Tensor]:
    """Random inputs; ids differ from those of another seed everywhere, where their table has two rows."""
    generator, table_rows = torch.Generator().manual_seed(seed), graph.table_rows()
    made = {}
    for name, value in values.items():
        shape = shapes[name]
        if value.is_floating_point():
            made[name] = torch.randn(shape, generator=generator).to(value.dtype)
        elif name.endswith(KEEPS):
            made[name] = torch.ones(shape, dtype=value.dtype)
        else:
            rows = table_rows.get(name, 2)
            ids = torch.randint(0, max(rows // 2, 1), shape, generator=generator) * 2 + seed
            made[name] = (ids % rows).to(value.dtype)
    return made


def _unequal(before: Tensor, after: Tensor) -> bool:
    finite = before.isfinite() & after.isfinite()
    x, y = before[finite].double(), after[finite].double()
    return bool(x.numel()) and float((x - y).abs().max()) > ROUNDING * max(float(x.abs().max()), 1e-12)
