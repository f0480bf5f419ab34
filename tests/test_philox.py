"""Philox in torch against Triton's `tl.rand`, bit for bit, run in its interpreter; and the statistics of a mask."""

import importlib.util
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from checks import ROOT
from tilecut_runtime.philox import dropout_mask, rand

SEEDS = [0, 1, 7, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 2**62 - 1, 2**63 - 1, -1]
# Near 0, through the sign of an int32, and around the largest one.
OFFSETS = [*range(64), *range(2**31 - 64, 2**31), *range(-(2**31), -(2**31) + 64), *range(-64, 0)]

INTERPRETED = """
    import sys
    import torch, triton, triton.language as tl

    @triton.jit
    def draw(seed, offsets, out, N: tl.constexpr):
        places = tl.arange(0, N)
        tl.store(out + places, tl.rand(tl.load(seed), tl.load(offsets + places)))

    seeds, offsets = torch.load(sys.argv[1])
    out = torch.full((len(seeds), len(offsets)), float("nan"))
    for i in range(len(seeds)):
        draw[(1,)](seeds[i : i + 1], offsets, out[i], len(offsets))
    torch.save(out, sys.argv[2])
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is the reference")
def test_every_bit_is_tritons(tmp_path):
    given, drawn, script = (tmp_path / name for name in ("given.pt", "drawn.pt", "draw.py"))
    seeds = torch.tensor(SEEDS, dtype=torch.int64)
    offsets = torch.tensor(OFFSETS, dtype=torch.int64).to(torch.int32)
    torch.save((seeds, offsets), given)
    # triton reads the source of a kernel from its file.
    script.write_text(textwrap.dedent(INTERPRETED))
    subprocess.run(
        [sys.executable, script, given, drawn], check=True, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}
    )
    want, got = torch.load(drawn), rand(seeds[:, None], offsets)
    assert got.dtype == torch.float32 and not want.isnan().any()
    assert torch.equal(got.view(torch.int32), want.view(torch.int32))


def test_only_the_lower_32_bits_of_an_offset_count():
    seed, offset = torch.tensor([3]), torch.arange(100)
    assert torch.equal(rand(seed, offset), rand(seed, offset + 2**32))
    assert not torch.equal(rand(seed, offset), rand(seed + 2**32, offset))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_a_mask_keeps_its_share_and_its_streams_differ(p):
    streams = torch.arange(6).view(2, 3)
    mask = dropout_mask(torch.tensor([11]), streams, 100, 100, 100, p)
    assert mask.shape == (2, 3, 100, 100)
    # Six standard deviations of the mean of 60000 draws.
    assert abs(mask.double().mean().item() - (1 - p)) < 6 * (p * (1 - p) / mask.numel()) ** 0.5
    flat = mask.flatten(0, 1).flatten(1)
    agreement = (flat[:, None] == flat[None]).double().mean(-1)
    apart = agreement[~torch.eye(6, dtype=torch.bool)]
    assert (apart - (p**2 + (1 - p) ** 2)).abs().max() < 0.05


def test_a_mask_is_counted_by_max_k_and_its_stream_added_to_the_seed():
    whole = dropout_mask(torch.tensor([5]), torch.tensor([[4]]), 9, 6, 9, 0.5)
    assert torch.equal(dropout_mask(torch.tensor([9]), torch.tensor([[0]]), 9, 4, 7, 0.5), whole[:, :, :4, :7])
    assert torch.equal(whole[0, 0, 2], rand(torch.tensor([9]), torch.arange(18, 27)) > 0.5)
