"""The Triton attention kernels, in Triton's interpreter, against float64.

The interpreter is chosen when triton is imported, so the cases run in a process of their own: without TRITON_INTERPRET
this file holds two tests that start pytest on it again. To see the cases: TRITON_INTERPRET=1 pytest <this file>.
"""

import os
from itertools import combinations, product

import pytest
import torch

from attention_reference import Meaning, attend, uniform
from pairwise import pairwise

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Largest error over the largest value.
LIMITS = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}
HEADS = {"1:1": (2, 2), "2:1": (2, 1), "3:1": (3, 1)}
# Lengths of (queries, keys) of each sequence; the dense ones have one of each.
LENGTHS = {
    "packed": ((70, 70), (0, 0), (1, 40), (0, 5), (33, 0)),
    "self": ((70, 70),) * 2,
    "short": ((21, 75),) * 2,
    "long": ((75, 33),),
}
WINDOWS = {"none": (-1, -1), "left": (17, -1), "right": (-1, 9), "both": (20, 6)}
PARAMETERS = {
    "width": (8, 16, 24, 40, 48, 64, 80, 96, 112, 128, 200, 256),
    "value": ("same", 24),
    "heads": tuple(HEADS),
    "causal": ("none", "top_left", "bottom_right"),
    "window": tuple(WINDOWS),
    "global_tokens": (0, 5),
    "lengths": tuple(LENGTHS),
    "padding": (False, True),
    "blocks": ("none", "shared", "per head"),
    "alibi": (False, True),
    "softcap": (0.0, 1.5),
    "bias": ("none", "whole", "rows", "heads"),
    "dropout": (0.0, 0.25),
    "dtype": tuple(DTYPES),
}
# The op for packed sequences takes neither.
PACKED_ONLY = [
    {"lengths": "packed", "padding": True},
    *({"lengths": "packed", "bias": b} for b in ("whole", "rows", "heads")),
]
COVER = pairwise(PARAMETERS, PACKED_ONLY)
# Few queries: the keys are split.
FEW = {"one": ((1, 75),) * 2, "three": ((3, 75),), "packed few": ((1, 75), (0, 9), (3, 40), (2, 0), (1, 1))}
FEW_COVER = pairwise(
    {
        **{name: values for name, values in PARAMETERS.items() if name not in ("blocks", "dropout", "width")},
        "width": (8, 40, 96, 128, 200, 256),
        "lengths": tuple(FEW),
    },
    [
        {"lengths": "packed few", "padding": True},
        *({"lengths": "packed few", "bias": b} for b in ("whole", "rows", "heads")),
    ],
)
# The first of each cover run in every `make test`, the others with the slow tests.
QUICK = 14


def name_of(case: dict) -> str:
    return "-".join(str(value).replace(" ", "_") for value in case.values())


def with_slow(cases: list[dict], quick: int) -> list:
    return [pytest.param(c, id=name_of(c), marks=() if n < quick else pytest.mark.slow) for n, c in enumerate(cases)]


if not INTERPRETED:
    from checks import run_interpreted

    def test_kernels_equal_float64(request):
        run_interpreted(request.config, __file__, "not slow")

    @pytest.mark.slow
    def test_kernels_equal_float64_in_every_case(request):
        run_interpreted(request.config, __file__, "slow")

    def test_cover_is_small_and_whole():
        assert len(COVER) <= 150
        for a, b in combinations(PARAMETERS, 2):
            met = {(case[a], case[b]) for case in COVER}
            apart = {(pair[a], pair[b]) for pair in PACKED_ONLY if a in pair and b in pair}
            assert met == set(product(PARAMETERS[a], PARAMETERS[b])) - apart

else:
    import triton
    import triton.language as tl

    from interpreted_bf16 import repair_dot
    from tilecut_runtime.kernels.choose_tile import Tile
    from tilecut_runtime.launch_attention import backward, forward

    repair_dot()

    @pytest.fixture(autouse=True)
    def _poison():
        """torch.empty gives NaN, so that what a kernel leaves unwritten is seen."""
        torch.use_deterministic_algorithms(True)
        yield
        torch.use_deterministic_algorithms(False)

    class Example:
        """Tensors of a case, what they mean and how the launcher is called."""

        def __init__(self, case: dict, lengths: tuple[tuple[int, int], ...], seed: int = 0):
            make = torch.Generator().manual_seed(seed)
            self.lengths = lengths
            self.packed = "packed" in case["lengths"]
            self.dtype = DTYPES[case["dtype"]]
            self.limit = LIMITS[case["dtype"]]
            self.hq, self.hk = HEADS[case["heads"]]
            width = case["width"]
            value = width if case["value"] == "same" else case["value"]
            self.max_q, self.max_k = (max(pair[side] for pair in lengths) for side in (0, 1))
            n, tq, tk = len(lengths), sum(a for a, _ in lengths), sum(b for _, b in lengths)

            def tensor(*shape: int) -> torch.Tensor:
                return torch.randn(shape, generator=make).to(self.dtype)

            if self.packed:
                shapes = ((tq, self.hq, width), (tk, self.hk, width), (tk, self.hk, value), (tq, self.hq, value))
                self.q, self.k, self.v, self.grad = (tensor(*shape) for shape in shapes)
            else:
                # [B, S, H, D] seen as [B, H, S, D], as projections leave it.
                rows = (self.max_q, self.max_k, self.max_k, self.max_q)
                heads = (self.hq, self.hk, self.hk, self.hq)
                columns = (width, width, value, value)
                self.q, self.k, self.v, self.grad = (
                    tensor(n, r, h, c).transpose(1, 2) for r, h, c in zip(rows, heads, columns)
                )
            self.meaning = Meaning(
                scale=width**-0.5,
                causal=case["causal"],
                window=WINDOWS[case["window"]],
                global_tokens=case["global_tokens"],
                softcap=case["softcap"],
                dropout_p=case.get("dropout", 0.0),
                dropout_seed=2**40 + 12345,
            )
            self.slopes = torch.rand(self.hq, generator=make) if case["alibi"] else None
            self.padding = torch.rand(n, self.max_k, generator=make) > 0.3 if case["padding"] else None
            if self.padding is not None:
                self.padding[0] = False
            shape = {"whole": (n, self.hq), "rows": (1, self.hq), "heads": (n, 1)}.get(case["bias"])
            self.bias = None if shape is None else tensor(*shape, self.max_q, self.max_k)
            self.listed = self._list_blocks(case.get("blocks", "none"), make)

        def _list_blocks(self, kind: str, make: torch.Generator) -> list[torch.Tensor] | None:
            """bool [H or 1, query blocks, key blocks] of each sequence; NaN where no head sees a block of keys."""
            if kind == "none":
                return None
            heads = 1 if kind == "shared" else self.hq
            listed = []
            for s, (nq, nk) in enumerate(self.lengths):
                blocks = torch.rand(heads, -(-nq // 64), -(-nk // 64), generator=make) < 0.5
                if s == 0:
                    # one block of keys that nobody sees
                    blocks[:, :, -1:] = False
                listed.append(blocks)
                for block in (~blocks.any(0).any(0)).nonzero().flatten().tolist():
                    for x in (self.k, self.v):
                        self.rows(x, s, 1)[:, block * 64 : block * 64 + 64] = torch.nan
            return listed

        def rows(self, x: torch.Tensor, s: int, side: int) -> torch.Tensor:
            """[H, S, .] of a sequence, a view; side 0: queries, 1: keys."""
            if not self.packed:
                return x[s]
            start = sum(pair[side] for pair in self.lengths[:s])
            return x[start : start + self.lengths[s][side]].transpose(0, 1)

        def arguments(self) -> dict:
            m = self.meaning
            arguments: dict = {
                "max_q": self.max_q,
                "max_k": self.max_k,
                "key_padding": self.padding,
                "bias": self.bias,
                "alibi_slopes": self.slopes,
                "scale": m.scale,
                "causal": m.causal,
                "window": m.window,
                "global_tokens": m.global_tokens,
                "softcap": m.softcap,
                "dropout_p": m.dropout_p,
                "dropout_seed": torch.tensor([m.dropout_seed]),
                "tiles": TILES,
            }
            if self.packed:
                for side, name in enumerate(("cu_q", "cu_k")):
                    ends = torch.tensor([0, *(pair[side] for pair in self.lengths)]).cumsum(0)
                    arguments[name] = ends.to(torch.int32)
            if self.listed is not None:
                rows = torch.cat([blocks.sum(2) for blocks in self.listed], 1)
                ends = rows.flatten().cumsum(0).reshape(rows.shape)
                starts = torch.cat((torch.zeros(1, dtype=ends.dtype), ends[:-1, -1]))[:, None]
                arguments["block_offsets"] = torch.cat((starts, ends), 1).to(torch.int32)
                heads = range(len(rows))
                indices = [blocks[h].nonzero()[:, 1] for h in heads for blocks in self.listed]
                arguments["block_indices"] = torch.cat(indices).to(torch.int32)
            return arguments

        def reference(self) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
            """out and the gradients in float64 in the layouts of their tensors, and the lse of each row."""
            leaves = {name: getattr(self, name).double() for name in ("q", "k", "v")}
            leaves = {name: x.nan_to_num(0.0).requires_grad_() for name, x in leaves.items()}
            if self.bias is not None:
                leaves["bias"] = self.bias.double().requires_grad_()
            outs, lses = [], []
            for s, (nq, nk) in enumerate(self.lengths):
                q, k, v = (self.rows(leaves[name], s, side) for name, side in (("q", 0), ("k", 1), ("v", 1)))
                for h in range(self.hq):
                    keep = torch.ones(nq, nk, dtype=torch.bool)
                    if self.padding is not None:
                        keep &= self.padding[s]
                    if self.listed is not None:
                        blocks = self.listed[s][min(h, len(self.listed[s]) - 1)]
                        keep &= blocks.repeat_interleave(64, 0).repeat_interleave(64, 1)[:nq, :nk]
                    bias = torch.zeros(nq, nk, dtype=torch.float64)
                    if self.bias is not None:
                        whole = leaves["bias"].expand(len(self.lengths), self.hq, -1, -1)
                        bias = whole[s, h]
                    slope = 0.0 if self.slopes is None else self.slopes[h].item()
                    kv = h // (self.hq // self.hk)
                    out, lse = attend(
                        q[h], k[kv], v[kv], self.meaning,
                        keep=keep, bias=bias, slope=slope, head=s * self.hq + h, max_k=self.max_k,
                    )  # fmt: skip
                    outs.append(out)
                    lses.append(lse.detach())
            grads = [self.rows(self.grad, s, 0)[h].double() for s in range(len(self.lengths)) for h in range(self.hq)]
            wanted = torch.autograd.grad(outs, list(leaves.values()), grads, allow_unused=True)
            found = {
                f"d{name}": torch.zeros_like(x) if g is None else g for (name, x), g in zip(leaves.items(), wanted)
            }
            return {"out": torch.cat([out.detach().flatten() for out in outs]), **found}, torch.cat(lses)

        def in_order(self, x: torch.Tensor) -> torch.Tensor:
            """Rows of queries, [.., E] or lse, one (sequence, head) after another."""
            if not self.packed:
                return x.flatten()
            x = x if x.ndim == 3 else x.T[..., None]
            return torch.cat([self.rows(x, s, 0).flatten() for s in range(len(self.lengths))])

    TILES = {
        "forward": Tile(64, 32, 4, 1),
        "decode": Tile(16, 16, 4, 1),
        "dq": Tile(64, 32, 4, 1),
        "dkdv": Tile(32, 64, 4, 1),
    }

    def check(example: Example) -> None:
        arguments = example.arguments()
        tensors = (example.q, example.k, example.v)
        out, lse = forward(*tensors, **arguments)
        gradients = backward(example.grad, *tensors, out, lse, **arguments)
        wanted, wanted_lse = example.reference()
        found = {"out": example.in_order(out), **dict(zip(("dq", "dk", "dv", "dbias"), gradients))}
        assert out.dtype == example.dtype and lse.dtype == torch.float32
        for name, reference in wanted.items():
            # Gradients start from an output that is rounded already.
            close(name, found[name], reference, example.limit * (1 if name == "out" else 2))
        got_lse = example.in_order(lse).double()
        seen = wanted_lse.isfinite()
        assert torch.equal(got_lse.isneginf(), ~seen)
        torch.testing.assert_close(got_lse[seen], wanted_lse[seen], rtol=1e-4, atol=2e-4)

    def close(name: str, got: torch.Tensor, wanted: torch.Tensor, limit: float) -> None:
        assert got.shape == wanted.shape, name
        assert not got.isnan().any(), f"{name} has NaN"
        if got.numel():
            error = (got.double() - wanted).abs().max().item()
            assert error <= limit * max(wanted.abs().max().item(), 1.0), f"{name} is off by {error}"

    @pytest.mark.parametrize("case", with_slow(COVER, QUICK))
    def test_cover(case):
        check(Example(case, LENGTHS[case["lengths"]]))

    @pytest.mark.parametrize("case", with_slow(FEW_COVER, QUICK))
    def test_cover_of_few_queries(case):
        check(Example(case, FEW[case["lengths"]]))

    PLAIN = {
        "width": 16, "value": "same", "heads": "1:1", "causal": "none", "window": "none", "global_tokens": 0,
        "padding": False, "alibi": False, "softcap": 0.0, "bias": "none", "dtype": "float32",
    }  # fmt: skip

    @pytest.mark.parametrize("lengths", [((0, 9),) * 2, ((9, 0),) * 2, ((30, 0),), ((1, 1),), ((30, 1),)])
    def test_dense_without_queries_or_keys(lengths):
        check(Example({**PLAIN, "lengths": "dense"}, lengths))

    @pytest.mark.parametrize("given", ["queries", "keys"])
    def test_offsets_beyond_int32(tmp_path, given):
        """Rows 2 ** 22 elements apart, 2 ** 31 to the next head: a sparse file holds them."""
        rows, row, head = 600, 2**22, 2**31 + 2**12
        storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=rows * row + head, dtype=torch.float16)
        example = Example(
            {**PLAIN, "lengths": "dense", "dtype": "float16"}, ((rows, 40) if given == "queries" else (40, rows),)
        )
        for name in ("q",) if given == "queries" else ("k", "v"):
            wide = storage.as_strided((1, 2, rows, 16), (0, head, row, 1), storage_offset=32 if name == "v" else 0)
            wide.copy_(getattr(example, name))
            setattr(example, name, wide)
        check(example)

    @triton.jit
    def _draw(Out, seed, first, COUNT: tl.constexpr):
        place = tl.arange(0, COUNT)
        tl.store(Out + place, tl.rand(seed, first + place))

    @pytest.mark.parametrize("seed", [0, 7, 2**33 + 5, 2**63 - 1])
    def test_reference_draws_what_triton_draws(seed):
        found = torch.empty(64)
        _draw[(1,)](found, torch.tensor(seed).item(), 2**31 - 70, COUNT=64)
        wanted = uniform(seed, torch.arange(2**31 - 70, 2**31 - 6).numpy())
        assert found.tolist() == wanted.tolist()
