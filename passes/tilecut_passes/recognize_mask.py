"""What an attention mask means: evaluate its sub-graph on probes and find the product of atoms that equals it.

`mask_probes.py` evaluates, `mask_atoms.py` holds the hypotheses. The decision needs no search: keep every atom that
allows all that is visible on every probe, require the product of the kept ones to be exactly what is visible, and drop
atoms without which it still is, the loosest paddings first. Values above `MASKED` on visible pairs are a bias: either ALiBi,

    bias = -slope[h] * |i + shift - j| + a constant for each row (which softmax ignores)

or a node of the cone that equals it on all visible pairs up to a constant factor (a table of relative positions).

This is evidence, not proof: the compile's own parity check on whole models stands behind it. Rejected, with the reason:
random ops, activations, inputs that are no integers of rank 2 or 1, heads that see differently, probes that fail, and masks that
no product equals. Sizes at which the sub-graph cannot be computed at all are left out: the model cannot run there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from tilecut_passes.graph import Graph, Size, number_of, sizes_of, value_of
from tilecut_passes.mask_atoms import (
    Atom,
    Observation,
    Padding,
    Segments,
    atoms_of,
    bound_in_reality,
    equal,
    sizes_fit,
)
from tilecut_passes.mask_probes import (
    LARGE,
    MASKED,
    Evaluation,
    Probe,
    ProbeError,
    cone_of,
    literals_of,
    make_probes,
    unprobeable,
)

# Biases are compared on probes of at most this many pairs.
BIAS_PAIRS = 1 << 21
# How many choices of sizes a mask must be computable at.
FEWEST_SIZES = 3


@dataclass(frozen=True)
class MaskMeaning:
    """A product of what the attention op calls causal, window, global_tokens and key_padding, and of what it cannot hold.

    Attributes:
        paddings: all of them must let a key through.
        segments: which do not see one another; all of them together.
        chunk: positions see only their own run of `chunk`; 0 for none.
        queries: queries that see nothing.
        shift: where the diagonal of a window without causality starts.
        bias, ratio: the node that is added to the scores, times ratio.
        slopes: of ALiBi, one for each head.
    """

    causal: str = "none"
    window: tuple[int, int] = (-1, -1)
    global_tokens: int = 0
    paddings: tuple[Padding, ...] = ()
    segments: tuple[Segments, ...] = ()
    chunk: int = 0
    queries: tuple[Padding, ...] = ()
    shift: str = "bottom_right"
    bias: str | None = None
    ratio: float = 1.0
    slopes: tuple[float, ...] = ()

    @property
    def beyond(self) -> str | None:
        """Why the dense op cannot hold it; None where it can."""
        if self.segments or self.chunk or self.queries:
            return str(self)
        if self.shift == "top_left" and self.causal == "none":
            return f"{self}, counted from the first key"
        return None

    def __str__(self) -> str:
        parts = [f"packed segments of {one}" for one in self.segments]
        parts += [f"chunks of {self.chunk}"] if self.chunk else []
        if self.causal != "none":
            parts.append("causal" if self.causal == "top_left" else "causal to the last key")
        parts += [f"window {self.window}"] if self.window != (-1, -1) else []
        parts += [f"{self.global_tokens} global tokens"] if self.global_tokens else []
        parts += [f"padding {one}" for one in self.paddings]
        parts += [f"query padding {one}" for one in self.queries]
        text = " x ".join(parts) or "everything is seen"
        return f"{text} + ALiBi" if self.slopes else f"{text} + bias" if self.bias else text


def recognize_mask(graph: Graph, mask: fx.Node, query: fx.Node, key: fx.Node) -> MaskMeaning | str:
    """The meaning of `mask` [B|1, H|1, Sq|1, Sk|1] for these queries and keys [.., S, D], or the reason why it has none."""
    cone = cone_of(mask)
    if reason := unprobeable(graph, cone):
        return reason
    sizes = (sizes_of(value_of(query))[-2], sizes_of(value_of(key))[-2])
    try:
        try:
            seen = _observe(graph, cone, mask, *sizes, shrink=True)
        except ProbeError:
            # A table as long as the literal says is no shorter with a smaller one.
            if not any(x > LARGE for x in literals_of(cone)):
                raise
            seen = _observe(graph, cone, mask, *sizes, shrink=False)
    except ProbeError as e:
        return str(e)
    meaning = _decide(graph, cone, seen)
    if isinstance(meaning, str):
        return meaning
    if all(one.bias is None or not one.bias.any() for one in seen):
        return meaning
    return _with_bias(cone, seen, meaning)


def _observe(
    graph: Graph, cone: list[fx.Node], mask: fx.Node, queries: Size, keys: Size, shrink: bool
) -> list[Observation]:
    """What the mask does on every probe.

    Raises:
        ProbeError: it fails on a probe, or is no mask on one.
    """
    seen: list[Observation] = []
    counted, failure = 0, ProbeError("it cannot be computed at any size")
    shape = value_of(mask).shape
    heads = shape[1] if len(shape) == 4 and isinstance(shape[1], int) else shape[0] if len(shape) == 3 else 1
    for probes in make_probes(graph, cone, (queries, keys), heads if isinstance(heads, int) else 1, shrink):
        found = []
        for probe in probes:
            try:
                found.append(_look(graph, mask, probe, number_of(queries, probe.sizes), number_of(keys, probe.sizes)))
            except ProbeError as e:
                # What cannot be computed for plain inputs cannot be computed at these sizes.
                if set(probe.styles) <= {"ones"} and not probe.literals:
                    failure = e
                    break
                raise
        else:
            seen += found
            counted += 1
    if counted < FEWEST_SIZES and graph.dims:
        raise failure
    return seen


def _look(graph: Graph, mask: fx.Node, probe: Probe, sq: int, sk: int) -> Observation:
    values = Evaluation(graph, probe)
    found = values(mask)
    if not sizes_fit(found, sq, sk) or found.ndim > 4:
        raise ProbeError(f"it is {list(found.shape)} for {sq} queries and {sk} keys")
    found = found[(None,) * (4 - found.ndim)]
    additive = found.dtype != torch.bool
    visible = found > MASKED if additive else found
    if not bool((visible == visible[:, :1]).all()):
        raise ProbeError("its heads see differently")
    # A mask of 2 makes (1 - mask) * min a large positive number: nothing is asked of such a key.
    free = torch.zeros_like(visible)
    if additive and not probe.binary:
        free = (found >= -MASKED).any(-2, keepdim=True).expand_as(found)
    bias = found.masked_fill(~visible | free, 0) if additive and visible.shape[1] * sq * sk <= BIAS_PAIRS else None
    shape = (-1, sq, sk)
    visible, free = visible[:, 0].expand(shape), free.any(1).expand(shape)
    return Observation(values, visible & ~free, free, bias, sq, sk)


def _decide(graph: Graph, cone: list[fx.Node], seen: Sequence[Observation]) -> MaskMeaning | str:
    square = all(one.sq == one.sk for one in seen)
    literals = {x for x in literals_of(cone) if x <= LARGE}
    counts = [0, *sorted({1, *literals, *(x + 1 for x in literals)})]
    for n in counts:
        for shift in ("top_left",) if square else ("bottom_right", "top_left"):
            kept = [atom for atom in atoms_of(graph, cone, seen, shift, n) if atom.holds(seen)]
            if n and not any(atom.kind == "window" for atom in kept):
                continue
            if not equal(kept, seen):
                continue
            # The op has options for all but padding of queries: where either will do (a window of 1), that goes first.
            kept.sort(key=lambda atom: {"padding": atom.size(seen), "query padding": math.inf}.get(atom.kind, -1))
            for atom in reversed(list(kept)):
                rest = [one for one in kept if one is not atom]
                if equal(rest, seen):
                    kept = rest
            return _meaning(kept, "bottom_right" if square and shift == "top_left" else shift, shift, n)
    return "no product of causal, window, global tokens, padding, segments and chunks equals it"


def _meaning(atoms: Iterable[Atom], shift: str, causal: str, n: int) -> MaskMeaning | str:
    meaning = MaskMeaning()
    for atom in atoms:
        left, right = meaning.window
        if atom.kind == "causal":
            meaning = replace(meaning, causal=causal)
        elif atom.kind in ("left", "right", "window"):
            bounds = {"window": atom.value, "left": (atom.value, None), "right": (None, atom.value)}[atom.kind]
            found = [bound_in_reality(x) for x in bounds]
            if any(x is not None and y < 0 for x, y in zip(bounds, found)):
                return f"its window ends before the query itself ({found[0]}, {found[1]})"
            window = (max(left, found[0]), max(right, found[1]))
            tokens = n if atom.kind == "window" else 0
            meaning = replace(meaning, window=window, global_tokens=tokens, shift=shift)
        elif atom.kind == "padding":
            meaning = replace(meaning, paddings=(*meaning.paddings, atom.value))
        elif atom.kind == "segments":
            meaning = replace(meaning, segments=(*meaning.segments, atom.value))
        elif atom.kind == "chunk":
            meaning = replace(meaning, chunk=atom.value, shift=shift)
        else:
            meaning = replace(meaning, queries=(*meaning.queries, atom.value))
    return meaning


def _with_bias(cone: list[fx.Node], seen: Sequence[Observation], meaning: MaskMeaning) -> MaskMeaning | str:
    """The meaning with what is added to visible scores."""
    seen = [one for one in seen if one.bias is not None]
    slopes = _slopes([one for one in seen if one.values.probe.binary], meaning)
    if slopes is not None:
        return replace(meaning, slopes=slopes)
    for node in sorted(cone, key=lambda n: -value_of(n).ndim if isinstance(value_of(n), Tensor) else 0):
        value = value_of(node)
        if not isinstance(value, Tensor) or not value.is_floating_point() or not 2 <= value.ndim <= 4:
            continue
        ratio = _ratio(node, seen)
        if ratio is not None:
            return replace(meaning, bias=node.name, ratio=ratio)
    return "it adds a bias to visible scores that no node of its sub-graph holds alone"


def _slopes(seen: Sequence[Observation], meaning: MaskMeaning) -> tuple[float, ...] | None:
    """The slopes of ALiBi, one for each head, or None where the bias is another (Press et al., arXiv 2108.12409)."""
    shift = meaning.causal if meaning.causal != "none" else "bottom_right"
    slopes: Tensor | None = None
    for one in sorted(seen, key=lambda one: -one.sk):
        assert one.bias is not None
        behind = one.behind(shift).abs().double()
        bias, behind, visible = torch.broadcast_tensors(one.bias.double(), behind, one.visible[:, None])
        count = visible.sum(-1, keepdim=True)
        centred = [_centred(x, visible, count) for x in (bias, behind)]
        if slopes is None:
            # Least squares over all visible pairs, rows apart.
            moment = (centred[1] ** 2).sum((0, 2, 3))
            if not bool((moment > 0).all()):
                continue
            slopes = -(centred[0] * centred[1]).sum((0, 2, 3)) / moment
            if not bool((slopes > 0).all()):
                return None
        error = (centred[0] + slopes[:, None, None] * centred[1]).abs().max()
        if error > 1e-5 * bias.abs().max().clamp_min(1e-3):
            return None
    return None if slopes is None else tuple(float(x) for x in slopes.float())


def _centred(x: Tensor, visible: Tensor, count: Tensor) -> Tensor:
    """x without each row's mean over what is visible, 0 elsewhere."""
    kept = torch.where(visible, x, 0.0)
    return torch.where(visible, kept - kept.sum(-1, keepdim=True) / count.clamp_min(1), 0.0)


def _ratio(node: fx.Node, seen: Sequence[Observation]) -> float | None:
    """What a node is multiplied by to give the bias on all visible pairs of all probes; None where nothing does."""
    ratio: float | None = None
    for one in seen:
        assert one.bias is not None
        try:
            value = one.values(node)
        except ProbeError:
            return None
        if not sizes_fit(value, one.sq, one.sk) or not bool(value.isfinite().all()) or bool((value <= MASKED).any()):
            return None
        try:
            value, bias, visible = torch.broadcast_tensors(value, one.bias, one.visible[:, None])
        except RuntimeError:
            return None
        x, y = value[visible].double(), bias[visible].double()
        if not x.numel():
            continue
        if ratio is None and bool(x.any()):
            largest = x.abs().argmax()
            ratio = float(y[largest] / x[largest])
            ratio = 1.0 if abs(ratio - 1) < 1e-6 else ratio
        if not torch.allclose(x * (ratio or 1.0), y, rtol=1e-6, atol=1e-6 * float(y.abs().max())):
            return None
    return ratio or None
