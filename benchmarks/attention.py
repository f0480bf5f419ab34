"""The attention kernels beside those of others: forward, backward, decoding, packed sequences and lists of blocks.

    make bench-attention    or    python benchmarks/attention.py [--size paper|small] [--only dense,SDPA] [--output FILE]

| section | what |
|---|---|
| dense | head widths 64, 128, 96, 80, 48; 512 to 16k tokens of 16k in all; 2048 / width heads; causal or not; bfloat16 |
| float16, grouped, few heads | the same in float16; 32 query heads on 8 or 1 KV heads; 2, 4 and 8 heads, as pruned models have |
| decode | one query a sequence: bytes of keys and values a second, over those of a plain copy |
| packed | lengths uniform in 1..1024, 32 sequences: the table of `varlen.py` |
| blocks | 8k tokens of which a share of the tiles of 128 x 128 is visible, beside ours without a list |

Before it is timed every contender is compared with float64: the last KV head of the last sequence, with all queries that
read it; outputs, and the gradients of q, k and v. All contenders of a case run in turn, round by round. FLOP: 4 for each
pair, query head and channel (half of the pairs if causal), 10 in the backward. Without a GPU it runs small sizes in
float32, which says nothing about speed: it keeps this script alive. The JSON is written anew after every case.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import contenders
from attention_peers import DENSE, PACKED, Call, Dense, Packed
from contenders import OURS, Clock, Entry, Goal, Row, console, race, relative_error, times_peer, wanted

# Relative errors: of the output, and of the gradients.
TOLERANCES = {torch.bfloat16: (2e-2, 3e-2), torch.float16: (4e-3, 6e-3), torch.float32: (1e-4, 1e-4)}
SEQUENCES, LONGEST = 32, 1024
ALL_BLOCKS = "tilecut, no list"


@dataclass(frozen=True)
class Sizes:
    """What a preset runs."""

    widths: tuple[int, ...]
    lengths: tuple[int, ...]
    tokens: int
    channels: int
    grouped_lengths: tuple[int, ...]
    few_heads: tuple[int, ...]
    decode: tuple[tuple[int, int, int, int], ...]
    sequences: int
    longest: int
    packed_heads: tuple[int, ...]
    sparse_tokens: int
    sparse_widths: tuple[int, ...]
    densities: tuple[float, ...]
    copied_bytes: int
    rounds: int
    warmup: int


SIZES = {
    "paper": Sizes(
        widths=(64, 128, 96, 80, 48),
        lengths=(512, 1024, 2048, 4096, 8192, 16384),
        tokens=16384,
        channels=2048,
        grouped_lengths=(2048, 8192),
        few_heads=(2, 4, 8),
        # batch, query heads, KV heads, keys
        decode=tuple(
            (batch, heads, groups, keys)
            for batch, keys in ((1, 8192), (1, 32768), (8, 8192), (64, 2048))
            for heads, groups in ((32, 32), (32, 8), (8, 8))
        ),
        sequences=SEQUENCES,
        longest=LONGEST,
        packed_heads=(16, 8, 4),
        sparse_tokens=8192,
        sparse_widths=(64, 128),
        densities=(0.1, 0.25, 0.5, 0.75),
        copied_bytes=2**30,
        rounds=30,
        warmup=5,
    ),
    "small": Sizes(
        widths=(16, 24),
        lengths=(64,),
        tokens=128,
        channels=32,
        grouped_lengths=(64,),
        few_heads=(2,),
        decode=((2, 4, 2, 64),),
        sequences=4,
        longest=40,
        packed_heads=(2,),
        sparse_tokens=384,
        sparse_widths=(16,),
        densities=(0.5,),
        copied_bytes=2**22,
        rounds=2,
        warmup=1,
    ),
}


class Exact(NamedTuple):
    """Attention in float64: output and gradient of q [G, Sq, D], of k and v [Sk, D]."""

    out: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def exact(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, visible: Callable[[Tensor, Tensor], Tensor]) -> Exact:
    """Written from the definition, some queries at a time; `visible` of query [n, 1] and key [1, Sk] numbers."""
    q, k, v, grad = (x.double() for x in (q, k, v, grad))
    scale = q.shape[-1] ** -0.5
    keys = torch.arange(len(k), device=q.device)[None]
    out, dq, dk, dv = torch.empty_like(q), torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for start in range(0, q.shape[1], 1024):
        rows = slice(start, min(start + 1024, q.shape[1]))
        seen = visible(torch.arange(rows.start, rows.stop, device=q.device)[:, None], keys)
        p = (q[:, rows] @ k.T * scale).masked_fill(~seen, float("-inf")).softmax(-1)
        out[:, rows] = p @ v
        ds = p * (grad[:, rows] @ v.T - (grad[:, rows] * out[:, rows]).sum(-1, keepdim=True)) * scale
        dq[:, rows] = ds @ k
        dk += (ds.transpose(1, 2) @ q[:, rows]).sum(0)
        dv += (p.transpose(1, 2) @ grad[:, rows]).sum(0)
    return Exact(out, dq, dk, dv)


@dataclass(frozen=True)
class Problem:
    """Tensors in our layout, and the part of them that is compared with float64.

    `part_q` and `part_k` take q's and k's shapes to [G, Sq, D] and [Sk, D].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    part_q: Callable[[Tensor], Tensor]
    part_k: Callable[[Tensor], Tensor]
    visible: Callable[[Tensor, Tensor], Tensor]

    @functools.cached_property
    def exact(self) -> Exact:
        """Of the part."""
        return exact(
            self.part_q(self.q), self.part_k(self.k), self.part_k(self.v), self.part_q(self.grad), self.visible
        )


def dense_problem(p: Dense) -> Problem:
    """Random tensors of the shape."""
    draw = _drawer(p.device, p.dtype)
    q, grad = (draw(p.batch, p.heads, p.queries, p.width) for _ in range(2))
    k, v = (draw(p.batch, p.groups, p.keys, p.width) for _ in range(2))
    members = p.heads // p.groups
    rule = (lambda i, j: i >= j) if p.causal else (lambda i, j: (i >= 0) & (j >= 0))
    return Problem(q, k, v, grad, lambda x: x[-1, -members:], lambda x: x[-1, -1], rule)


def packed_problem(p: Packed) -> Problem:
    """Random tensors of the lengths; the longest sequence is compared."""
    draw = _drawer(p.device, p.dtype)
    q, k, v, grad = (draw(sum(p.lengths), p.heads, p.width) for _ in range(4))
    longest = p.lengths.index(p.longest)
    rows = slice(sum(p.lengths[:longest]), sum(p.lengths[: longest + 1]))

    def visible(i: Tensor, j: Tensor) -> Tensor:
        seen = (i >= j) if p.causal else (i >= 0) & (j >= 0)
        return seen if p.blocks is None else seen & p.blocks[i // 128, j // 128]

    return Problem(q, k, v, grad, lambda x: x[rows, -1][None], lambda x: x[rows, -1], visible)


def _drawer(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator, device=device, dtype=dtype)


def forward(problem: Problem, make: Callable[[], Call]) -> Entry:
    """A forward that ran once and was compared."""
    call = make()
    tensors = [call.lay(x) for x in (problem.q, problem.k, problem.v)]

    def run() -> Tensor:
        with torch.no_grad():
            return call.attend(*tensors)

    return Entry(run, relative_error(problem.part_q(call.unlay(run())), problem.exact.out))


def backward(problem: Problem, make: Callable[[], Call]) -> Entry:
    """A backward that ran once and was compared; the forward is outside of the clock."""
    call = make()
    tensors = [call.lay(x).detach().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    out, grad = call.attend(*tensors), call.lay(problem.grad)
    run = lambda: torch.autograd.grad(out, tensors, grad, retain_graph=True)
    dq, dk, dv = (call.unlay(x) for x in run())
    want = problem.exact
    pairs = ((problem.part_q(dq), want.dq), (problem.part_k(dk), want.dk), (problem.part_k(dv), want.dv))
    return Entry(run, max(relative_error(got, exactly) for got, exactly in pairs))


Cases = Iterator[list[Row]]
Finish = Callable[[Sequence[Row]], None] | None

DIRECTIONS = {"forward": (forward, 4), "backward": (backward, 10)}


class Asked(NamedTuple):
    """What one contender of a case is asked: on these tensors, so many visible pairs."""

    problem: Problem
    pairs: float
    make: Callable[[], Call]


def beside_all_blocks(rows: Sequence[Row]) -> None:
    """Every time over ours without a list."""
    whole = next((row["ms"] for row in rows if row["name"] == ALL_BLOCKS and row.get("ms")), None)
    for row in rows:
        if whole and row.get("ms"):
            row["of_dense"] = row["ms"] / whole


class Bench:
    """What has been measured."""

    def __init__(self, sizes: Sizes, device: torch.device, only: str | None):
        self.sizes, self.device, self.only = sizes, device, only
        self.clock = Clock(device, sizes.rounds, sizes.warmup)
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.rows: list[Row] = []

    def run(self) -> Iterator[None]:
        """Every section; yields after every case."""
        for section in (self.dense, self.decode, self.packed, self.blocks):
            for rows in section():
                self.rows += rows
                yield

    def race(self, section: str, x: str, asked: Mapping[str, Asked], finish: Finish = None, **case: Any) -> Cases:
        """One case in both directions, as rows; `finish` adds to them."""
        chosen = {name: one for name, one in asked.items() if wanted(self.only, section, name)}
        if not chosen:
            return
        for i, (direction, (ready, flop)) in enumerate(DIRECTIONS.items()):
            makers = {name: functools.partial(ready, one.problem, one.make) for name, one in chosen.items()}
            held = {"section": section, "direction": direction, "case": f"{section}, {x}, {direction}", "x": x, **case}
            tolerance = TOLERANCES[next(iter(chosen.values())).problem.q.dtype][i]
            rows = race(held, makers, self.clock, tolerance)
            for row in rows:
                if row.get("ms"):
                    one = chosen[row["name"]]
                    row["tflops"] = one.pairs * flop * one.problem.q.shape[-1] / row["ms"] / 1e9
                row |= {"panel": f"{section}, {direction}", "series": row["name"], "height": row.get("tflops")}
            if finish is not None:
                finish(rows)
            contenders.show(held["case"], rows, {"tflops": ".1f", **({} if finish is None else {"of_dense": ".2f"})})
            yield rows

    def dense(self) -> Cases:
        """Equal lengths."""
        for section, p in self.dense_shapes():
            if wanted(self.only, section, *DENSE):
                pairs = p.batch * p.heads * p.queries * p.keys * (0.5 if p.causal else 1)
                problem = dense_problem(p)
                asked = {name: Asked(problem, pairs, functools.partial(make, p)) for name, make in DENSE.items()}
                heads = "" if section.startswith("dense") else f"{p.heads}/{p.groups} heads, "
                yield from self.race(section, f"{heads}{p.keys}", asked, width=p.width, causal=p.causal)

    def dense_shapes(self) -> Iterator[tuple[str, Dense]]:
        """Sections and shapes."""
        s = self.sizes

        def shape(heads: int, groups: int, length: int, width: int, causal: bool) -> Dense:
            batch = max(1, s.tokens // length)
            return Dense(batch, heads, groups, length, length, width, causal, self.dtype, self.device)

        for width, causal, length in itertools.product(s.widths, (False, True), s.lengths):
            heads = max(1, s.channels // width)
            yield (
                f"dense {width}, {'causal' if causal else 'not causal'}",
                shape(heads, heads, length, width, causal),
            )
        for width in s.widths[:2] if self.device.type == "cuda" else ():
            heads = s.channels // width
            one = replace(shape(heads, heads, 4096, width, True), dtype=torch.float16)
            yield f"float16 {width}, causal", one
        for groups, length in itertools.product((8, 1), s.grouped_lengths):
            heads = min(32, s.channels // 4)
            yield "grouped, causal", shape(heads, min(groups, heads // 2), length, s.widths[1], True)
        for heads, length in itertools.product(s.few_heads, s.grouped_lengths):
            yield "few heads, causal", shape(heads, heads, length, s.widths[0], True)

    def decode(self) -> Cases:
        """One query a sequence, without gradients."""
        if not wanted(self.only, "decode", *DENSE):
            return
        copied = self.copy_bandwidth()
        console.print(f"a copy moves {copied / 1e9:.0f} GB/s")
        for batch, heads, groups, keys in self.sizes.decode:
            p = Dense(batch, heads, groups, 1, keys, self.sizes.widths[1], False, self.dtype, self.device)
            problem = dense_problem(p)
            moved = sum(x.numel() * x.element_size() for x in (problem.q, problem.k, problem.v, problem.grad))
            x = f"{batch} x {keys}, {heads}/{groups} heads"
            chosen = {name: make for name, make in DENSE.items() if wanted(self.only, "decode", name)}
            makers = {n: functools.partial(forward, problem, functools.partial(make, p)) for n, make in chosen.items()}
            held = {"section": "decode", "direction": "forward", "case": f"decode, {x}", "x": x}
            rows = race(held, makers, self.clock, TOLERANCES[self.dtype][0])
            for row in rows:
                if row.get("ms"):
                    row["of_copy"] = moved / (row["ms"] / 1e3) / copied
                row |= {"panel": "decode", "series": row["name"], "unit": "% of a copy's bandwidth"}
                row["height"] = 100 * row["of_copy"] if "of_copy" in row else None
            contenders.show(held["case"], rows, {"of_copy": ".0%"})
            yield rows

    def copy_bandwidth(self) -> float:
        """Bytes a second, read and written, of a plain copy."""
        source = torch.zeros(self.sizes.copied_bytes, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        ms = self.clock.time({"copy": lambda: target.copy_(source)})["copy"]
        return 2 * self.sizes.copied_bytes / (ms / 1e3)

    def packed(self) -> Cases:
        """Sequences of different lengths."""
        lengths = draw_lengths(self.sizes.sequences, self.sizes.longest)
        for heads, causal in itertools.product(self.sizes.packed_heads, (False, True)):
            p = Packed(lengths, heads, self.sizes.widths[0], causal, self.dtype, self.device)
            yield from self.packed_case(f"packed, {'causal' if causal else 'not causal'}", f"{heads} heads", p)

    def packed_case(self, section: str, x: str, p: Packed) -> Cases:
        """One set of lengths."""
        if wanted(self.only, section, *PACKED):
            pairs = sum(n * n for n in p.lengths) * p.heads * (0.5 if p.causal else 1)
            problem = packed_problem(p)
            asked = {name: Asked(problem, pairs, functools.partial(make, p)) for name, make in PACKED.items()}
            yield from self.race(section, x, asked, width=p.width, causal=p.causal)

    def blocks(self) -> Cases:
        """A share of the tiles, beside ours with all of them and no list."""
        tokens = self.sizes.sparse_tokens
        for width, density in itertools.product(self.sizes.sparse_widths, self.sizes.densities):
            section = f"blocks {width}"
            if not wanted(self.only, section, *PACKED):
                continue
            generator = torch.Generator().manual_seed(0)
            drawn = torch.rand(tokens // 128, tokens // 128, generator=generator) < density
            # Every query sees itself.
            visible = (drawn | torch.eye(tokens // 128, dtype=torch.bool)).to(self.device)
            share = float(visible.float().mean())
            heads = max(1, self.sizes.channels // 2 // width)
            sparse = Packed((tokens,), heads, width, False, self.dtype, self.device, visible)
            whole = replace(sparse, blocks=None)
            pairs = tokens**2 * heads
            problem = packed_problem(sparse)
            asked = {n: Asked(problem, pairs * share, functools.partial(make, sparse)) for n, make in PACKED.items()}
            asked[ALL_BLOCKS] = Asked(packed_problem(whole), pairs, functools.partial(PACKED[OURS], whole))
            yield from self.race(section, f"density {density:g}", asked, beside_all_blocks, width=width, density=share)

    def goals(self) -> list[Goal]:
        """What is wanted of an H100, beside what was measured."""
        # Elsewhere no time means anything.
        rows = self.rows if self.device.type == "cuda" else []
        dense = [row for row in rows if row["section"].startswith("dense")]
        ours = [row for row in rows if row["name"] == OURS]
        way = lambda direction, width=None: (
            lambda row: row["direction"] == direction and width in (None, row.get("width"))
        )
        sparse = [row["of_dense"] - row["density"] for row in ours if "of_dense" in row]
        return [
            Goal(
                "forward, width 64, beside SDPA flash", 1.1, times_peer(dense, "SDPA flash", where=way("forward", 64))
            ),
            Goal(
                "forward, width 128, beside SDPA flash", 1.0, times_peer(dense, "SDPA flash", where=way("forward", 128))
            ),
            Goal(
                "forward, width 64, beside SDPA cuDNN", 0.9, times_peer(dense, "SDPA cuDNN", where=way("forward", 64))
            ),
            Goal(
                "forward, width 128, beside SDPA cuDNN",
                0.65,
                times_peer(dense, "SDPA cuDNN", where=way("forward", 128)),
            ),
            Goal("backward, beside SDPA flash", 0.9, times_peer(dense, "SDPA flash", where=way("backward"))),
            Goal("beside FlexAttention, everywhere", 1.0, times_peer(rows, "FlexAttention")),
            Goal("decode, share of a copy's bandwidth", 0.7, [row["of_copy"] for row in ours if "of_copy" in row]),
            Goal("blocks: time over all blocks, less the density", 0.1, sparse, at_most=True),
            Goal("packed, beside varlen_attn", 1.0, times_peer(rows, "varlen_attn", where=_packed)),
        ]


def _packed(row: Row) -> bool:
    return row["section"].startswith("packed")


def draw_lengths(sequences: int, longest: int, seed: int = 0) -> tuple[int, ...]:
    """Uniform in 1..longest."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(1, longest + 1, (sequences,), generator=generator).tolist())


def prepare_torch() -> None:
    """What both scripts set before the first kernel."""
    import torch._functorch.config

    torch.set_float32_matmul_precision("high")
    # Kept, so that a compiled backward can run again.
    torch._functorch.config.donated_buffer = False


def main() -> None:
    options = contenders.arguments(__doc__, "attention").parse_args()
    device, size, output = contenders.chosen(options, "attention")
    prepare_torch()
    bench = Bench(SIZES[size], device, options.only)
    header = {"size": size, "clock": bench.clock.describe(), **contenders.environment(device)}
    console.print(f"{header['gpu'] or 'no GPU'}; {header['clock']}")
    for _ in bench.run():
        contenders.write(output, header, bench.rows, bench.goals())
    contenders.finish(output, bench.rows, bench.goals(), "TFLOP/s")


if __name__ == "__main__":
    main()
