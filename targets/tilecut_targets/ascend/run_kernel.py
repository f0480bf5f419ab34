"""Run a lowered kernel on this machine's CPU, and compare it with attention in float64."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tilecut_runtime.attention import attention_naive
from tilecut_targets.ascend.environments import SCRIPTS, call
from tilecut_targets.ascend.plan_kernel import ENVIRONMENT, KERNEL, Chip, Tile, Variant, compiler_options

# The largest difference from float64 of numbers of magnitude one: fp16 and bf16 round the weights and the output.
LIMITS = {"float16": 4e-3, "bfloat16": 3e-2}
TIMEOUT = 600.0
# Fewer than the tiles of every problem, so that each program makes several, and some one more than others.
PROGRAMS = 5


@dataclass(frozen=True)
class Problem:
    """Sizes of one attention: batch, heads, KV heads, queries, keys."""

    batch: int
    heads: int
    kv_heads: int
    nq: int
    nk: int


def list_problems(variant: Variant, tile: Tile) -> Iterator[Problem]:
    """Small sizes that reach every branch of the kernel: grouped heads, several tiles, ends of tiles, few queries."""
    m, n = tile
    if not variant.tail:
        yield Problem(1, 2, 1, 2 * m, 2 * n)
        yield Problem(2, 2, 2, m, n)
        return
    yield Problem(2, 4, 2, m + 5, 2 * n + 3)
    yield Problem(1, 3, 1, 1, n - 1)
    # More queries than keys: rows that see none, where causal is bottom-right.
    yield Problem(1, 1, 1, m + 1, max(m // 2, 1))


def run_kernel(
    linalg: Path, variant: Variant, tile: Tile, chip: Chip, stage: str, problems: Sequence[Problem] | None = None
) -> float:
    """The largest difference from float64; `stage`: "linalg", or "hfusion" for the IR after bishengir's fusing passes.

    Raises:
        ConfigError: the private environment is not installed.
        LoweringError: the IR cannot be lowered to this CPU.
    """
    given = list(problems or list_problems(variant, tile))
    arrays: dict[str, np.ndarray] = {}
    wanted: list[Tensor] = []
    runs = []
    generator = torch.Generator().manual_seed(0)
    for i, problem in enumerate(given):
        tensors = _make_tensors(variant, problem, generator)
        wanted.append(_reference(variant, *(tensors[name] for name in ("Q", "K", "V", "KeyPadding"))))
        # A number that is not written must not pass for one.
        tensors["Out"] = torch.full(wanted[-1].shape, torch.nan, dtype=tensors["Q"].dtype)
        arrays |= {f"{name}{i}": _to_numpy(tensor) for name, tensor in tensors.items()}
        names = [f"{name}{i}" for name in variant.signature() if name in tensors]
        sizes = (problem.batch, problem.heads, problem.kv_heads, problem.nq, problem.nk)
        arguments = [*names, {"float": variant.width**-0.5}, *({"int": n} for n in sizes)]
        runs.append({"arguments": arguments, "programs": PROGRAMS})
    with tempfile.TemporaryDirectory() as work:
        inputs, outputs = Path(work) / "inputs.npz", Path(work) / "outputs.npz"
        np.savez(inputs, **arrays)  # type: ignore[arg-type]
        request = {
            "linalg": str(linalg.resolve()),
            "kernel": KERNEL,
            "stage": stage,
            "family": chip.family,
            "options": compiler_options(chip),
            "work": work,
            "inputs": str(inputs),
            "outputs": str(outputs),
            "runs": runs,
        }
        call(ENVIRONMENT, SCRIPTS / "run_linalg.py", request, TIMEOUT)
        with np.load(outputs) as held:
            got = [torch.from_numpy(held[f"Out{i}"]).view(getattr(torch, variant.dtype)) for i in range(len(given))]
    errors = [(a.double() - b).abs().max() for a, b in zip(got, wanted)]
    return float(torch.stack(errors).nan_to_num(torch.inf).max())


def _make_tensors(variant: Variant, problem: Problem, generator: torch.Generator) -> dict[str, Tensor]:
    b, hq, hk, nq, nk = problem.batch, problem.heads, problem.kv_heads, problem.nq, problem.nk
    shapes = {
        "Q": (b, hq, nq, variant.width),
        "K": (b, hk, nk, variant.width),
        "V": (b, hk, nk, variant.value_width),
    }
    dtype = getattr(torch, variant.dtype)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    padding = torch.rand((b, nk), generator=generator) > 0.3
    # Of the last sequence nothing is left, where there is another.
    padding[1:] = False
    return tensors | {"KeyPadding": padding}


def _reference(variant: Variant, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return attention_naive(
        q.double(),
        k.double(),
        v.double(),
        padding if variant.padding else None,
        None,
        None,
        scale=variant.width**-0.5,
        causal=variant.causal,
        window=(variant.left, variant.right),
        global_tokens=0,
        softcap=0.0,
        dropout_p=0.0,
    )


def _to_numpy(tensor: Tensor) -> np.ndarray:
    """As the kernel's memory holds it: numpy has no bfloat16."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    return tensor.to(torch.int8).numpy() if tensor.dtype == torch.bool else tensor.numpy()
