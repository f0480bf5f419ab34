"""Rules of ATen's core ops and of what torch.export leaves of common spellings: who survives, who is frozen and why.

Every op stands between two layers. Where units survive, the masked and the cut graph are the same function at two
shapes, and a plan with one unit exchanged is another one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from checks import randomise
from tilecut_passes.axes.groups import find_frozen, find_groups
from tilecut_passes.axes.infer import infer
from tilecut_passes.axes.rules import RULES
from tilecut_passes.capture import capture
from tilecut_passes.count_macs import MacCounter
from tilecut_passes.mask import Mask
from tilecut_passes.plan import PrunePlan
from tilecut_passes.prune import Prune
from tilecut_passes.run_passes import largest_error, run_passes

aten = torch.ops.aten

TOKENS: tuple[Any, ...] = ("batch", "sequence", 6)
PIXELS: tuple[Any, ...] = ("batch", 6, 6, 8)
SIGNAL: tuple[Any, ...] = ("batch", 6, 8)
VOLUME: tuple[Any, ...] = ("batch", 6, 4, 4, 4)
SHAPES = ({"batch": 2, "sequence": 4}, {"batch": 3, "sequence": 7})


class Between(nn.Module):
    """A layer `up` to 8 channels, then `body` with the parts that it names; `body` ends in a layer."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor], shape: tuple[Any, ...], parts: Mapping[str, Any]):
        super().__init__()
        self.body = body
        layer = {3: nn.Linear, 4: nn.Conv2d, 5: nn.Conv3d}[len(shape)] if shape is not SIGNAL else nn.Conv1d
        taps = () if layer is nn.Linear else (1,)
        parts = {"up": layer(6, 8, *taps), "down": layer(8, 3, *taps), **parts}
        for name, part in parts.items():
            if isinstance(part, nn.Module | nn.Parameter):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, self.up(x))


@dataclass(frozen=True)
class Row:
    """A body, its further parts, the groups that must survive as (kind, size), or the reason why none does."""

    body: Callable[[Any, Tensor], Tensor]
    groups: tuple[tuple[str, int], ...] = (("neurons", 8),)
    shape: tuple[Any, ...] = TOKENS
    parts: Callable[[], Mapping[str, Any]] = dict
    why: str = ""


def neurons(*sizes: int) -> tuple[tuple[str, int], ...]:
    return tuple(("neurons", size) for size in sizes)


def down(size: int) -> Callable[[], Mapping[str, Any]]:
    return lambda: {"down": nn.Linear(size, 3)}


def images(body: Callable[[Any, Tensor], Tensor], *sizes: int, **parts: Callable[[], Any]) -> Row:
    return Row(body, neurons(*(sizes or (8,))), PIXELS, lambda: {name: make() for name, make in parts.items()})


def frozen(why: str, body: Callable[[Any, Tensor], Tensor], shape: tuple[Any, ...] = TOKENS, parts: Any = dict) -> Row:
    return Row(body, (), shape, parts, why)


def vector(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape))


def squares(h: Tensor) -> Tensor:
    """[B, S, 8] -> [B, 8, S, S]."""
    return h.mT[..., None] * h.mT[..., None, :]


def written(x: Tensor, index: Any, value: Any) -> Tensor:
    out = x.clone()
    out[index] = value
    return out


VIEWS = {
    "swapaxes": Row(lambda m, h: m.down(h.swapaxes(1, 2).swapdims(2, 1))),
    "movedim": Row(lambda m, h: m.down(h.movedim(1, 2).movedim((1, 2), (2, 1)).moveaxis(0, 1))),
    "mT": Row(lambda m, h: m.down(h.mT.adjoint())),
    "T": Row(lambda m, h: m.down(h.sum(0).T.t())),
    "tile": Row(lambda m, h: m.down(h.tile(1, 2, 1))),
    "tile_units": Row(lambda m, h: m.down(h.tile(2)), parts=down(16)),
    "expand_as": Row(lambda m, h: m.down(h + h.mean(1, keepdim=True).expand_as(h))),
    "normalize": Row(lambda m, h: m.down(F.normalize(h, dim=1))),
    "broadcast_to": Row(lambda m, h: m.down(h[:1].sum(1, keepdim=True).broadcast_to(h.shape))),
    "broadcast_tensors": Row(lambda m, h: m.down(torch.broadcast_tensors(h, h.sum(1, keepdim=True))[1])),
    "view_as": Row(lambda m, h: m.down(h.flatten(0, 1).view_as(h) + h.ravel().reshape_as(h))),
    "atleast_3d": Row(lambda m, h: m.down(torch.atleast_3d(h) + torch.atleast_2d(h.sum((0, 1))))),
    "complex": Row(
        lambda m, h: m.down(torch.view_as_real(torch.view_as_complex(h.unflatten(-1, (4, 2))) * m.turn).flatten(-2)),
        neurons(4),
        parts=lambda: {"turn": torch.polar(torch.ones(4), torch.arange(4.0))},
    ),
}

PIECES = {
    "narrow": Row(lambda m, h: m.down(h.narrow(-1, 2, 5)), neurons(5), parts=down(5)),
    "tensor_split": Row(lambda m, h: m.down(torch.mul(*h.tensor_split(2, -1))), neurons(4), parts=down(4)),
    "dsplit": Row(lambda m, h: m.down(torch.mul(*h.dsplit(2))), neurons(4), parts=down(4)),
    "unsafe_chunk": Row(lambda m, h: m.down(torch.mul(*torch.unsafe_chunk(h, 2, -1))), neurons(4), parts=down(4)),
    "dstack": Row(lambda m, h: m.down(torch.dstack([h, h.relu()])), parts=down(16)),
    "hstack": Row(lambda m, h: m.down(torch.hstack([h, h.relu()]))),
    "column_stack": Row(lambda m, h: m.down(torch.column_stack([h.sum(0), h.prod(0)])), parts=down(16)),
    "glu": Row(lambda m, h: m.down(F.glu(h)), neurons(4), parts=down(4)),
    "pad": Row(lambda m, h: m.down(F.pad(h, (1, 2), value=0.5)), parts=down(11)),
    "constant_pad_nd": Row(lambda m, h: m.down(torch.constant_pad_nd(h, (0, 1, 1, 0), 0.5)), parts=down(9)),
    "pad_reflect": Row(lambda m, h: m.down(F.pad(h.mT, (1, 1), "reflect").mT)),
    "pad_units_reflect": frozen("padding", lambda m, h: m.down(F.pad(h, (1, 1), "reflect")), parts=down(10)),
    "crop": frozen("padding", lambda m, h: m.down(F.pad(h, (-1, 0))), parts=down(7)),
    "odd_slice": frozen(
        "cuts through a factor", lambda m, h: m.down(h.unflatten(-1, (4, 2)).flatten(-2)[..., :3]), parts=down(3)
    ),
}  # fmt: skip

CONTRACTIONS = {
    "matmul_vector": Row(lambda m, h: h @ m.v, parts=lambda: {"v": vector(8)}),
    "vector_matmul": Row(lambda m, h: h.sum((0, 1)) @ m.v, parts=lambda: {"v": vector(8, 3)}),
    "vector_matmul_batch": Row(lambda m, h: m.v @ h.mT, parts=lambda: {"v": vector(8)}),
    "mv": Row(lambda m, h: torch.mv(h.sum(0), m.v), parts=lambda: {"v": vector(8)}),
    "addmv": Row(lambda m, h: torch.addmv(h.sum((0, 2)), h.sum(0), m.v), parts=lambda: {"v": vector(8)}),
    "dot": Row(lambda m, h: torch.dot(h.sum((0, 1)), m.v), parts=lambda: {"v": vector(8)}),
    "inner": Row(lambda m, h: torch.inner(h, m.v), parts=lambda: {"v": vector(3, 8)}),
    "vecdot": Row(lambda m, h: torch.linalg.vecdot(h, h.flip(1))),
    "addbmm": Row(lambda m, h: m.down(torch.addbmm(m.v, h.mT, h).sum(0)), parts=lambda: {"v": vector(8, 8)}),
    "outer": Row(
        lambda m, h: (torch.outer(h.sum((0, 1)), m.v) + torch.addr(m.w, h.prod(1).sum(0), m.v)).sum(0),
        parts=lambda: {"v": vector(3), "w": vector(8, 3)},
    ),
    "linear_vector": Row(lambda m, h: F.linear(h, m.v), parts=lambda: {"v": vector(8)}),
    "embedding_bag": Row(
        lambda m, h: m.down(m.bag((h[..., 0] > 0).long())), parts=lambda: {"bag": nn.EmbeddingBag(2, 8)}
    ),
}

CONVOLUTIONS = {
    "depthwise": images(lambda m, h: m.down(m.conv(h)), conv=lambda: nn.Conv2d(8, 8, 3, groups=8, padding=1)),
    "depthwise_multiplier": images(
        lambda m, h: m.down(m.conv(h)), 8, 2, conv=lambda: nn.Conv2d(8, 16, 3, groups=8),
        down=lambda: nn.Conv2d(16, 3, 1),
    ),
    "grouped": images(
        lambda m, h: m.down(m.conv(h)), 2, 3, 4, conv=lambda: nn.Conv2d(8, 12, 3, groups=4),
        down=lambda: nn.Conv2d(12, 3, 1),
    ),
    "transposed": images(
        lambda m, h: m.down(m.conv(h)), 5, 8, conv=lambda: nn.ConvTranspose2d(8, 5, 3, stride=2),
        down=lambda: nn.Conv2d(5, 3, 1),
    ),
    "transposed_grouped": images(
        lambda m, h: m.down(m.conv(h)), 2, 3, 4, conv=lambda: nn.ConvTranspose2d(8, 12, 3, groups=4),
        down=lambda: nn.Conv2d(12, 3, 1),
    ),
    "convolution_transposed": images(
        lambda m, h: m.down(torch.convolution(h, m.v, None, [1, 1], [0, 0], [1, 1], True, [0, 0], 1)), 5, 8,
        v=lambda: vector(8, 5, 3, 3), down=lambda: nn.Conv2d(5, 3, 1),
    ),
    "padding_same": images(
        lambda m, h: m.down(m.conv(h)), 4, 8, conv=lambda: nn.Conv2d(8, 4, 3, padding="same"),
        down=lambda: nn.Conv2d(4, 3, 1),
    ),
    "unbatched": Row(
        lambda m, h: m.down(m.conv(h.mT.sum(0))), neurons(5, 8),
        parts=lambda: {"conv": nn.Conv1d(8, 5, 1), "down": nn.Conv1d(5, 3, 1)},
    ),
    "conv1d": Row(
        lambda m, h: m.down(m.back(m.conv(h))), neurons(4, 5, 8), SIGNAL,
        lambda: {"conv": nn.Conv1d(8, 4, 3, padding="same"), "back": nn.ConvTranspose1d(4, 5, 3), "down": nn.Conv1d(5, 3, 1)},
    ),
    "conv3d": Row(
        lambda m, h: m.down(m.back(m.conv(h))), neurons(4, 5, 8), VOLUME,
        lambda: {"conv": nn.Conv3d(8, 4, 3, padding="same"), "back": nn.ConvTranspose3d(4, 5, 3), "down": nn.Conv3d(5, 3, 1)},
    ),
    "groups_across_factors": frozen(
        "channel groups across the factors",
        lambda m, h: m.down(m.conv(F.pad(h, (0, 0, 0, 0, 1, 0)))), PIXELS,
        lambda: {"conv": nn.Conv2d(9, 9, 3, groups=3), "down": nn.Conv2d(9, 3, 1)},
    ),
}  # fmt: skip

NORMS = {
    "batch_norm": images(lambda m, h: m.down(m.norm(h)), norm=lambda: nn.BatchNorm2d(8)),
    "batch_norm_tokens": Row(lambda m, h: m.down(m.norm(h.mT).mT), parts=lambda: {"norm": nn.BatchNorm1d(8)}),
    "native_batch_norm": images(
        lambda m, h: m.down(aten._native_batch_norm_legit_no_training(h, m.v, m.v, m.mean, m.mean.exp(), 0.1, 1e-5)[0]),
        v=lambda: vector(8), mean=lambda: torch.zeros(8),
    ),
    "instance_norm": images(lambda m, h: m.down(m.norm(h)), norm=lambda: nn.InstanceNorm2d(8, affine=True)),
    "group_norm": Row(
        lambda m, h: m.down(m.norm(h)), (("neurons", 4), ("hidden", 2)), PIXELS, lambda: {"norm": nn.GroupNorm(4, 8)}
    ),
    "group_norm_of_each": images(lambda m, h: m.down(m.norm(h)), norm=lambda: nn.GroupNorm(8, 8)),
    "native_group_norm": Row(
        lambda m, h: m.down(torch.native_group_norm(h, m.v, m.v, h.shape[0], 8, 48, 4, 1e-5)[0]),
        (("neurons", 4), ("hidden", 2)), PIXELS, lambda: {"v": vector(8)},
    ),
    "native_layer_norm": Row(
        lambda m, h: m.down(torch.native_layer_norm(h, (8,), m.v, m.v, 1e-5)[0]), (("hidden", 8),), parts=lambda: {"v": vector(8)}
    ),
    "weight_norm": Row(
        lambda m, h: F.linear(h, aten._weight_norm(m.v, m.g, 0)), (("hidden", 8),),
        parts=lambda: {"v": vector(3, 8), "g": vector(3, 1)},
    ),
    "prelu": images(lambda m, h: m.down(m.act(h)), act=lambda: nn.PReLU(8)),
    "prelu_one": Row(lambda m, h: m.down(m.act(h)), parts=lambda: {"act": nn.PReLU()}),
}  # fmt: skip

REDUCTIONS = {
    "sums": Row(lambda m, h: h.sum() + torch.nansum(h, (1, 2)) + torch.count_nonzero(h.relu())),
    "statistics": Row(
        lambda m, h: m.down(
            h.var(1) + h.std(1) + torch.var_mean(h, 1)[1] + torch.std_mean(h, 1)[0] + h.logsumexp(1) + h.prod(1)
            + torch.linalg.norm(h, dim=1) + torch.aminmax(h, dim=1)[0] + h.nanmean(1) + h.quantile(0.5, 1)
        )
    ),
    "any_all": Row(lambda m, h: m.down((h > 0).any(1).float() + (h > 0).all(1) + (h > 0).any(dim=(0, 1)))),
    "extrema": Row(lambda m, h: m.down(h.max(1).values + h.min(1)[1] + h.amax((0, 1)))),
    "positions": Row(lambda m, h: m.down(h.argmax(1) + h.argmin(1) + h.median(1)[0] + h.kthvalue(1, 1)[0] + h.mode(1)[0])),
    "cosine_similarity": Row(lambda m, h: m.down(h) * F.cosine_similarity(h, h.flip(1), 1).sum()),
    "mean_of_units": Row(lambda m, h: m.down(h) + h.mean(-1, keepdim=True) + h.std(), (("hidden", 8),)),
    "max_of_units": Row(lambda m, h: m.down(h) + h.max(-1, keepdim=True)[0] + h.max(), (("hidden", 8),)),
    "mean_of_all": Row(lambda m, h: m.down(h) + h.mean(), (("hidden", 8),)),
    "argmax_of_units": frozen("an index along it is computed", lambda m, h: m.down(h) + h.argmax(-1, keepdim=True)),
    "max_index_of_units": frozen("index of its extremum", lambda m, h: m.down(h) + h.max(-1, keepdim=True)[1]),
}  # fmt: skip

POSITIONS = {
    "along_tokens": Row(
        lambda m, h: m.down(
            h.flip(1) + h.roll(1, 1) + h.sort(1)[0] + h.argsort(1) + h.cumsum(1) + h.cumprod(1) + h.cummax(1)[0]
            + h.logcumsumexp(1) + h.topk(1, 1)[0] + h.diff(dim=0).sum(0)
        )
    ),
    "rot90": Row(lambda m, h: m.down(h.rot90(1, (0, 1)))),
    "triangle": Row(lambda m, h: m.down((squares(h).tril() + squares(h).triu(1)).sum(-1).mT)),
    "diagonal": Row(lambda m, h: m.down(squares(h).diagonal(0, 2, 3).mT)),
    "diag_embed": Row(lambda m, h: m.down(torch.diag_embed(h.mT).sum(-1).mT)),
    "diagonal_scatter": Row(lambda m, h: m.down(squares(h).diagonal_scatter(h.mT, 0, 2, 3).sum(-1).mT)),
    "one_hot": Row(lambda m, h: m.down(F.one_hot((h > 0).long(), 3)[..., 1].float())),
    "bucketize": Row(
        lambda m, h: m.down((torch.bucketize(h, m.t) + torch.searchsorted(m.t, h) + torch.isin(h.round(), m.t)).float()),
        parts=lambda: {"t": torch.arange(4)},
    ),
    "repeat_by_counts": Row(
        lambda m, h: m.down(h.sum(1).tile(4, 1)[:4].repeat_interleave(m.t, 0, output_size=6)),
        parts=lambda: {"t": torch.arange(4)},
    ),
    "cross": Row(
        lambda m, h: m.down(torch.linalg.cross(m.wide(h).unflatten(-1, (5, 3)), m.v).flatten(-2)), neurons(5, 8),
        parts=lambda: {"wide": nn.Linear(8, 15), "v": vector(1, 1, 5, 3), "down": nn.Linear(15, 3)},
    ),
    "flip_units": frozen("flip runs over it", lambda m, h: m.down(h.flip(-1))),
    "roll_all": frozen("roll runs over it", lambda m, h: m.down(h.roll(1))),
    "sort_units": frozen("sort runs over it", lambda m, h: m.down(h.sort(-1)[0])),
    "topk_units": frozen("topk runs over it", lambda m, h: m.down(h.topk(2)[0]), parts=down(2)),
    "cumsum_units": frozen("cumsum runs over it", lambda m, h: m.down(h.cumsum(-1))),
    "tril_units": frozen("a triangle of it", lambda m, h: m.down(h.tril())),
    "diagonal_units": frozen("diagonal", lambda m, h: h.diagonal(0, 1, 2)),
    "nonzero": frozen("nonzero goes through it in order", lambda m, h: m.down(h) + torch.nonzero(h).sum()),
    "masked_select": frozen("masked_select goes through it", lambda m, h: h.masked_select(h > 0).sum()),
    "masked_scatter": frozen("masked_scatter goes through it", lambda m, h: m.down(h.masked_scatter(h > 0, h.exp()))),
}  # fmt: skip

WINDOWS = {
    "pools": images(lambda m, h: m.down(F.avg_pool2d(h, 2) + F.max_pool2d(h, 2) + F.adaptive_avg_pool2d(h, (3, 4)))),
    "pool_to_one": images(lambda m, h: m.down(F.adaptive_avg_pool2d(h, 1) + F.adaptive_max_pool2d(h, 1))),
    "native_pool": images(
        lambda m, h: m.down(aten._adaptive_avg_pool2d(h, [2, 2]) + F.max_pool2d(h, 3, return_indices=True)[1])
    ),
    "interpolate": images(
        lambda m, h: m.down(sum(F.interpolate(h, scale_factor=2, mode=k) for k in ("nearest", "bilinear", "bicubic", "area")))
    ),
    "interpolate_to": images(
        lambda m, h: m.down(
            F.interpolate(h, size=(3, 3), mode="nearest-exact")
            + F.interpolate(h, size=3, mode="bilinear", antialias=True)
        )
    ),
    "pads": images(lambda m, h: m.down(sum(F.pad(h, (1, 1, 1, 1), k) for k in ("reflect", "replicate", "circular", "constant")))),
    "native_pads": images(lambda m, h: m.down(aten.reflection_pad2d(h, [1, 1, 1, 1]) + aten.replication_pad2d(h, [1, 1, 1, 1]))),
    "im2col": images(lambda m, h: m.last(F.unfold(h, 3).mT), last=lambda: nn.Linear(72, 3)),
    "col2im": images(lambda m, h: m.down(F.fold(F.unfold(h, 3), (6, 8), 3))),
    "pixel_shuffle": images(lambda m, h: m.down(F.pixel_shuffle(h, 2)), 2, down=lambda: nn.Conv2d(2, 3, 1)),
    "pixel_unshuffle": images(lambda m, h: m.down(F.pixel_unshuffle(h, 2)), down=lambda: nn.Conv2d(32, 3, 1)),
    "channel_shuffle": images(lambda m, h: m.down(F.channel_shuffle(h, 2)), 4),
    "unfold": Row(lambda m, h: m.down(h.unfold(1, 2, 1).sum(-1))),
    "unfold_units": frozen("windows of unfold", lambda m, h: m.down(h.unfold(-1, 2, 2).sum(-1)), parts=down(4)),
    "one_dimension": Row(
        lambda m, h: m.down(
            F.avg_pool1d(h, 2) + F.max_pool1d(h, 2) + F.adaptive_avg_pool1d(h, 4) + F.adaptive_max_pool1d(h, 4)
            + F.interpolate(h, 4) + F.interpolate(h, 4, mode="linear") + aten.reflection_pad1d(h, [1, 1])[..., :4]
        ),
        shape=SIGNAL,
    ),
    "three_dimensions": Row(
        lambda m, h: m.down(
            F.avg_pool3d(h, 2) + F.max_pool3d(h, 2) + F.adaptive_avg_pool3d(h, 2) + F.adaptive_max_pool3d(h, 2)
            + F.interpolate(h, scale_factor=0.5) + F.interpolate(h, scale_factor=0.5, mode="trilinear")
            + F.avg_pool3d(aten.replication_pad3d(h, [0, 0, 0, 0, 0, 0]), 2) + aten._adaptive_avg_pool3d(h, [2, 2, 2])
        ),
        shape=VOLUME,
    ),
}  # fmt: skip

INDEXING = {
    "gap": Row(
        lambda m, h: m.down(h.unflatten(-1, (4, 2))[m.t, :, :, m.t]), neurons(4),
        parts=lambda: {"t": torch.arange(2), **down(4)()},
    ),
    "mask": Row(lambda m, h: m.down(h[m.one(h).squeeze(-1) > 0]).sum(0), parts=lambda: {"one": nn.Linear(8, 1)}),
    "mask_of_tokens": Row(
        lambda m, h: m.down(h[:, m.one(h).sum((0, 2)) > 0]).sum((0, 1)), parts=lambda: {"one": nn.Linear(8, 1)}
    ),
    "mask_before_index": Row(lambda m, h: m.down(h.mT[h.sum((1, 2)) * 0 > -1, :, 0]).sum(0)),
    "index_put": Row(
        lambda m, h: m.down(h.index_put((m.t,), m.v) + written(h, (slice(None), m.t), m.v)),
        parts=lambda: {"t": torch.arange(2), "v": vector(1, 8)},
    ),
    "index_put_accumulate": Row(
        lambda m, h: m.down(h.index_put((m.t, m.t), h[m.t, 0], accumulate=True)), parts=lambda: {"t": torch.tensor([1, 1, 0])}
    ),
    "index_put_gap": Row(
        lambda m, h: m.down(written(h.unflatten(-1, (4, 2)), (m.t, slice(None), slice(None), m.t), m.v).flatten(-2)), neurons(4),
        parts=lambda: {"t": torch.arange(2), "v": vector(2, 1, 4)},
    ),
    "write_by_mask": Row(
        lambda m, h: m.down(written(h, m.one(h).squeeze(-1) > 0, m.v)), parts=lambda: {"one": nn.Linear(8, 1), "v": vector(8)}
    ),
    "write_constant": Row(lambda m, h: m.down(written(h, (slice(None), 0), m.v)), parts=lambda: {"v": vector(8)}),
    "write_into_zeros": Row(lambda m, h: m.down(written(torch.zeros(3, 8), 1, h.sum((0, 1))))),
    "index_writes": Row(
        lambda m, h: m.down(
            h.index_add(1, m.t, h[:, :2]) + h.index_copy(1, m.t, h[:, :2].exp()) + h.index_fill(1, m.t, 2.0)
            + h.index_reduce(1, m.t, h[:, :2], "mean")
        ),
        parts=lambda: {"t": torch.tensor([1, 0])},
    ),
    "scatters": Row(
        lambda m, h: m.down(
            h.scatter(1, (h > 0).long(), 2.0) + h.scatter_add(1, (h > 0).long(), h) + h.scatter(1, h.argsort(1), h.exp())
            + h.scatter_reduce(1, (h > 0).long(), h, "amax")
        )
    ),
    "short_scatter": frozen("meet", lambda m, h: m.down(h.scatter_add(1, (h[..., :4] > 0).long(), h[..., :4]))),
    "scatter_units": frozen("it is scattered to", lambda m, h: m.down(h.scatter_add(2, (h > 0).long(), h))),
    "gathers": Row(
        lambda m, h: m.down(
            h.gather(1, (h > 0).long()) + torch.take_along_dim(h, (h[:, :1] > 0).long(), 1)
            + h.index_select(1, m.t).sum(1)[:, None]
        ),
        parts=lambda: {"t": torch.tensor([1, 0])},
    ),
    "select_scatter": Row(lambda m, h: m.down(h.select_scatter(h.sum(1), 1, 0) + h.slice_scatter(h[:, :1].exp(), 1, 0, 1))),
    "slice_scatter_units": Row(lambda m, h: m.down(h.slice_scatter(h[..., :4].exp(), 2, 4, 8)), neurons(4)),
    "take": frozen("it is indexed", lambda m, h: m.down(h) + h.take(m.t).sum(), parts=lambda: {"t": torch.arange(3)}),
}  # fmt: skip

MAKERS = {
    "constants": Row(lambda m, h: m.down(h * torch.linspace(0, 1, 8) + torch.logspace(0, 1, 8) + torch.hann_window(8))),
    "random": Row(lambda m, h: m.down(h * torch.rand(8) + torch.randn(8) + torch.randint(0, 9, (8,)) + torch.randperm(8))),
    "fill": Row(lambda m, h: m.down(h + torch.fill(h, 2.0))),
    "names_of_elementwise_ops": Row(
        lambda m, h: m.down(
            torch.multiply(torch.subtract(torch.negative(h), 1), 2) + F.hardswish(h) + F.logsigmoid(h) + torch.special.expit(h)
            + torch.isclose(h, h.exp()) + torch.divide(h, 3) + torch.complex(h, h).real
        )
    ),
    "random_like": Row(lambda m, h: m.down(h + torch.randn_like(h) + torch.bernoulli(h.sigmoid()) + torch.randint_like(h, 3))),
    "gumbel": Row(lambda m, h: m.down(F.gumbel_softmax(h, dim=1))),
}  # fmt: skip

ROWS: dict[str, Row] = {
    **VIEWS, **PIECES, **CONTRACTIONS, **CONVOLUTIONS, **NORMS, **REDUCTIONS, **POSITIONS, **WINDOWS, **INDEXING, **MAKERS,
}  # fmt: skip
# The same distribution, but other draws: only what survives is compared.
RANDOM = ("random_like", "gumbel")


def between(row: Row) -> Any:
    torch.manual_seed(0)
    shape = [SHAPES[0].get(size, size) for size in row.shape]
    dynamic = {d: name for d, name in enumerate(row.shape) if isinstance(name, str)}
    model = randomise(Between(row.body, row.shape, row.parts()))
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.exp_()
    return capture(model, {"x": torch.randn(shape)}, {"x": dynamic})


def random_plan(graph: Any, kinds: tuple[str, ...] = ("neurons",)) -> PrunePlan:
    rng = random.Random(0)
    groups = [g for g in find_groups(infer(graph)) if g.kind in kinds]
    plan = PrunePlan.keep_all(graph, groups)
    return plan.keeping({g.name: sorted(rng.sample(range(g.size), (g.size + 1) // 2)) for g in groups})


def swapped(plan: PrunePlan) -> PrunePlan:
    group = plan.groups[0]
    dropped = next(u for u in range(group.size) if u not in group.kept)
    return plan.keeping({group.name: sorted([*group.kept[1:], dropped])})


def transformed(graph: Any, one: Any) -> Any:
    graph = graph.copy()
    run_passes(graph, [one])
    return graph


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.groups])
def test_masked_equals_cut(name):
    row = ROWS[name]
    graph = between(row)
    axes = infer(graph)
    assert sorted((g.kind, g.size) for g in find_groups(axes)) == sorted(row.groups), find_frozen(axes)
    if "neurons" not in dict(row.groups):
        return
    plan = random_plan(graph)
    cut, masked, other = (transformed(graph, one) for one in (Prune(plan), Mask(plan), Mask(swapped(plan))))
    for sizes in SHAPES:
        x = {"x": torch.randn([sizes.get(size, size) for size in row.shape])}
        got = []
        for one in (masked, cut, other):
            torch.manual_seed(1)
            got.append(one.run(x))
        assert name in RANDOM or largest_error(got[0], got[1]) <= 1e-5
        assert largest_error(got[2], got[1]) > 1e-4


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if not row.groups])
def test_frozen_with_a_reason(name):
    axes = infer(between(ROWS[name]))
    assert not [g for g in find_groups(axes) if "up.weight" in {m.parameter for m in g.members}]
    assert any(ROWS[name].why in f.why for f in find_frozen(axes) if f.name == "up.weight[0]"), find_frozen(axes)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_macs_of_convolutions_are_those_of_torch(name):
    graph = between(CONVOLUTIONS[name])
    axes = infer(graph)
    x = torch.randn([SHAPES[0].get(size, size) for size in CONVOLUTIONS[name].shape])
    with FlopCounterMode(display=False) as counted:
        graph.run({"x": x})
    assert MacCounter(axes, find_groups(axes), SHAPES[0]).total() == counted.get_total_flops() // 2


UP, DOWN = 2 * 4 * 6 * 8, 2 * 4 * 8 * 3
MACS = {
    "matmul_vector": UP + 2 * 4 * 8,
    "vector_matmul": UP + 8 * 3,
    "vector_matmul_batch": UP + 2 * 4 * 8,
    "mv": UP + 4 * 8,
    "addmv": UP + 4 * 8,
    "dot": UP + 8,
    "inner": UP + DOWN,
    "vecdot": UP + 2 * 4 * 8,
    "addbmm": UP + 2 * 8 * 4 * 8 + 8 * 3,
    "linear_vector": UP + 2 * 4 * 8,
}


@pytest.mark.parametrize("name", MACS)
def test_macs_of_products_with_vectors(name):
    axes = infer(between(CONTRACTIONS[name]))
    assert MacCounter(axes, find_groups(axes), SHAPES[0]).total() == MACS[name]


def test_fewer_channel_groups_cost_fewer_macs():
    axes = infer(between(CONVOLUTIONS["depthwise"]))
    (group,) = find_groups(axes)
    count = MacCounter(axes, [group], SHAPES[0])
    assert count.total({group.name: 2}) * 4 == count.total()


def test_channel_groups_are_named_by_a_literal_that_is_cut():
    graph = between(CONVOLUTIONS["depthwise"])
    (group,) = find_groups(infer(graph))
    cut = transformed(graph, Prune(PrunePlan.keep_all(graph, [group]).keeping({group.name: [1, 4, 6]})))
    assert cut.tensor("conv.weight").shape == (3, 1, 3, 3)
    assert [n.args[6] for n in cut.nodes if n.target is aten.conv2d.default and len(n.args) > 6] == [3]


def test_an_op_without_a_rule_freezes_all_that_it_touches_and_is_named():
    axes = infer(between(Row(lambda m, h: m.down(torch.fft.fft(h, dim=1).real))))
    assert not find_groups(axes)
    assert {f.name for f in find_frozen(axes) if f.why == "no rule for aten.fft_fft.default"} == {
        "up.weight[0]", "up.bias[0]", "down.weight[1]",
    }  # fmt: skip


BACKWARD = "gradients are not captured"
LAYOUT = "reads memory layout, which a cut tensor does not keep"
NUMBER = "returns a number: what it reads is frozen without a rule"
KNOWN_WITHOUT_RULE = {
    aten._adaptive_avg_pool2d_backward.default: BACKWARD,
    aten.avg_pool2d_backward.default: BACKWARD,
    aten.convolution_backward.default: BACKWARD,
    aten.embedding_dense_backward.default: BACKWARD,
    aten.max_pool2d_with_indices_backward.default: BACKWARD,
    aten.native_group_norm_backward.default: BACKWARD,
    aten.native_layer_norm_backward.default: BACKWARD,
    aten._native_batch_norm_legit.default: "writes its running statistics",
    aten.as_strided.default: LAYOUT,
    aten.sym_stride.int: LAYOUT,
    aten.sym_storage_offset.default: LAYOUT,
    aten.sym_size.int: NUMBER,
    aten.sym_numel.default: NUMBER,
    aten._local_scalar_dense.default: NUMBER,
    aten.sym_is_contiguous.default: LAYOUT,
    aten.resize_.default: "writes in place",
    aten._fft_c2r.default: "mixes every index of the dimensions that it transforms",
    aten._fft_r2c.default: "mixes every index of the dimensions that it transforms",
    aten._cdist_forward.default: "distances of all pairs",
    aten._pdist_forward.default: "distances of all pairs",
    aten.grid_sampler_2d.default: "samples places that data decide",
}


def core_ops():
    for name in dir(aten):
        packet = getattr(aten, name)
        if isinstance(packet, torch._ops.OpOverloadPacket):
            yield from (op for op in (getattr(packet, o) for o in packet.overloads()) if torch.Tag.core in op.tags)


def test_every_core_op_has_a_rule_or_a_reason_for_none():
    # Packets are found lazily: ask for every op that torch knows.
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("aten::"):
            getattr(aten, schema.name.removeprefix("aten::"), None)
    ruled = {op for op in core_ops() if op in RULES or torch.Tag.pointwise in op.tags}
    assert len(ruled) > 150
    assert set(core_ops()) - ruled == set(KNOWN_WITHOUT_RULE)
