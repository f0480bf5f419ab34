"""Several processes as one compile: `accelerate launch` starts them, this makes them meet.

Afterwards `torch.distributed` is up where there is more than one process, and `share_batches` shares calibration and
training between them. A process that was started alone stays alone.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable

import torch
import torch.distributed

from tilecut_passes.share_batches import process, total
from tilecut_runtime.errors import ConfigError, RecoveryError

# What torchrun (which accelerate calls) and the MPI launchers say of the number of processes.
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return any(int(os.environ.get(name) or 1) > 1 for name in SIZES)


def join_processes(cpu: bool = False) -> torch.device:
    """Meet the other processes, if any; returns this one's device, the CPU when asked for.

    Raises:
        ConfigError: accelerate is not installed.
    """
    try:
        from accelerate import PartialState
    except ModuleNotFoundError as e:
        raise ConfigError(
            "accelerate", "it is not installed", fix="pip install 'tilecut[recover]' to recover, or to use several devices"
        ) from e
    if not launched() and "MASTER_PORT" in os.environ and os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        # It names a port where it was asked for several.
        warnings.warn(
            "`accelerate launch --cpu` starts one process, whatever --num_processes says, where no MPI is configured; "
            "--multi_gpu instead of --cpu starts several, on a machine without a GPU too",
            UserWarning,
            stacklevel=2,
        )
    cpu = cpu or not torch.accelerator.is_available()
    if "RANK" in os.environ and launched() and not torch.distributed.is_initialized():
        # Without a named backend torch takes one for every device. Accelerate would take the accelerator's alone, and
        # calibration sums live on the CPU.
        torch.distributed.init_process_group()
    # No `Accelerator`: its settings can be given once in a process, and a caller may have one of its own.
    state = PartialState(cpu=cpu)
    assert state.device is not None
    return torch.device("cpu") if cpu else state.device


def in_main_process(work: Callable[[], None]) -> None:
    """Do what writes files in the main process; the others wait, and fail where it failed.

    Raises:
        RecoveryError: in the others, when the main process failed; that one raises what went wrong.
    """
    failed = torch.zeros(1)
    try:
        if process()[0] == 0:
            work()
    except BaseException:
        failed += 1
        raise
    finally:
        total(failed)
    if failed:
        raise RecoveryError("processes", "the main process failed", fix="look at its own message")
