"""Turn the hidden width to its principal components, so that what is cut of it is what varies least.

Before: a residual stream x [.., H] that is only added to, and read by matrices behind norms: all of them RMS norms, or all
of them LayerNorms.
After: the stream is x Q for an orthogonal Q [H, H]. RMS norms see the same lengths; their weights are folded into the
matrices that read them and become 1; every tensor along the stream is multiplied by Q: what is written comes out turned,
what is read is turned back. The graph computes the same up to rounding.

    LayerNorm     whatever writes to the stream has the mean of its channels taken away, so that the stream has none, and
                  the norm is an RMS norm, with bias / weight added to it
    tied tables   a table that is a head too, read behind a norm's weight: the head gets a tensor of its own

Left alone, with the reason: streams that a norm's weight scales on the way (norms after the branch), or that an op sees
channel by channel; matrices that are read behind different norm weights.

Source: Ashkboos et al., SliceGPT: Compress Large Language Models by Deleting Rows and Columns (arXiv 2401.15024). There
every layer has a basis of its own and the residual stream is turned between them; here one serves the whole stream, so
that no product is added to the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tilecut_passes.axes.infer import infer
from tilecut_passes.calibration import Batch
from tilecut_passes.find_stream import CannotRotate, Stream, find_stream, stream_of
from tilecut_passes.graph import Graph
from tilecut_passes.open_stream import split_norms, untie_heads
from tilecut_passes.read_contractions import Terms, read_contractions
from tilecut_passes.share_batches import total
from tilecut_runtime.errors import PlanError


@dataclass(frozen=True)
class RotateHidden:
    """Turn streams by given bases: name of a `hidden` group -> Q [H, H]."""

    bases: Mapping[str, Tensor]

    def __call__(self, graph: Graph) -> int:
        """Turn them in place; returns the number of tensors that changed. Streams that are turned already are left alone.

        Raises:
            PlanError: a stream that is not there, cannot be turned, or has another width.
        """
        count = 0
        for name, basis in self.bases.items():
            if name in graph.rotated:
                continue
            try:
                stream = find_stream(graph, name)
            except CannotRotate as e:
                raise PlanError("RotateHidden", f"the stream {name} cannot be turned", got=str(e)) from e
            if tuple(basis.shape) != (stream.width, stream.width):
                raise PlanError(
                    "RotateHidden",
                    f"the basis of {name} has another width",
                    got=list(basis.shape),
                    wanted=[stream.width, stream.width],
                )
            prepare_stream(graph, stream)
            for held, dims in stream.tensors.items():
                tensor = graph.tensor(held)
                turned = tensor.detach().double()
                for dim in dims:
                    turned = (turned.movedim(dim, -1) @ basis.double()).movedim(-1, dim)
                _put(graph, held, turned)
            graph.rotated = (*graph.rotated, name)
            count += len(stream.tensors) + len(stream.norms)
        return count


def prepare_stream(graph: Graph, stream: Stream) -> None:
    """Everything but the turning: norms without weights, heads of their own, a stream without a mean where LayerNorm takes it."""
    split_norms(graph, stream.calls)
    untie_heads(graph, stream.tensors)
    graph.clean()
    if stream.calls:
        graph.propagate()
    if stream.centred:
        for name, dims in stream.tensors.items():
            for dim in dims:
                if (name, dim) not in stream.readers and name not in stream.offsets:
                    tensor = graph.tensor(name).detach().double()
                    _put(graph, name, tensor - tensor.mean(dim, keepdim=True))
    _fold_norms(graph, stream)


def _fold_norms(graph: Graph, stream: Stream) -> None:
    """Multiply the matrices behind norms by the norms' weights, which become 1, and divide the norms' biases by them."""
    factors = {name: graph.tensor(name).detach().double() + short for name, short in stream.norms.items()}
    for bias, norm in stream.offsets.items():
        _put(graph, bias, graph.tensor(bias).detach().double() / factors[norm])
    for (name, dim), norm in stream.readers.items():
        tensor = graph.tensor(name).detach().double()
        _put(graph, name, (tensor.movedim(dim, -1) * factors[norm]).movedim(-1, dim))
    for name, short in stream.norms.items():
        _put(graph, name, torch.full_like(factors[name], 1 - short))


def principal_basis(
    graph: Graph, name: str, batches: Sequence[Batch], progress: Callable[[int, int], None]
) -> tuple[Tensor, Tensor]:
    """The principal components of what layers read of a stream: Q [H, H] float32, and their energies [H], falling.

    Every reader's rows count alike, normed as it sees them, and without the norm's weight; padding is left out.

    Raises:
        CannotRotate: something needs the stream's channels as they are.
        CalibrationError: an activation is not finite; names the layer.
    """
    stream = find_stream(graph, name)
    folded = graph.copy()
    folded.store = None
    prepare_stream(folded, stream)
    # Queries, keys and values read the same rows: they count once.
    once = {sink.source: sink for sink in stream_of(infer(folded), stream.members).gates}
    gram = torch.zeros(stream.width, stream.width, dtype=torch.float64)

    def visit(_: object, terms: Terms) -> None:
        if terms.weight is not None:
            rows = terms.x.detach().float()
            gram.add_((rows.T @ rows).double().cpu())

    if not read_contractions(folded, once.values(), batches, progress, visit):
        gram.zero_()
    total(gram)
    energies, vectors = torch.linalg.eigh(gram)
    return vectors.flip(1).float().contiguous(), energies.flip(0).clamp_min(0)


def _put(graph: Graph, name: str, value: Tensor) -> None:
    held = graph.tensor(name)
    value = value.to(held.dtype).contiguous()
    graph.set_tensor(name, nn.Parameter(value, held.requires_grad) if isinstance(held, nn.Parameter) else value)
