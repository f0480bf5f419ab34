"""Data-parallel calibration without processes: threads that take turns and add up their tensors."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tilecut_passes import share_batches


def simulate_processes(monkeypatch: pytest.MonkeyPatch, count: int, work: Callable[[], Any]) -> list[Any]:
    """What every one of `count` processes returns; only one runs at a time, up to its next sum."""
    local, turn, barrier = threading.local(), threading.Lock(), threading.Barrier(count, timeout=120)
    held: list[Tensor] = []
    results: list[Any] = [None] * count

    def all_reduce(value: Tensor) -> None:
        held.append(value.clone())
        turn.release()
        try:
            barrier.wait()
            summed = torch.stack(held).sum(0)
            if barrier.wait() == 0:
                held.clear()
            barrier.wait()
        finally:
            turn.acquire()
        value.copy_(summed)

    def run(rank: int) -> None:
        local.rank = rank
        with turn:
            try:
                results[rank] = work()
            except BaseException as e:
                results[rank] = e
                barrier.abort()

    with monkeypatch.context() as patch:
        patch.setattr(share_batches, "process", lambda: (local.rank, count))
        patch.setattr(torch.distributed, "all_reduce", all_reduce)
        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
