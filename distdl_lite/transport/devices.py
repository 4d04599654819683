"""Where tensors of GPUs travel, and what must have happened to them before.

A process takes the GPU of its number on its host, unless the program has chosen one. Over NCCL tensors of GPUs travel as they
are, where each process has a GPU of its own. Over MPI they go through pinned host memory; with ``DISTDL_LITE_MPI_CUDA=direct``
MPI gets their memory itself, which only an MPI that takes it survives.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from typing import Any

import torch

HOST = torch.device("cpu")
_LOCAL_RANKS = "LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"


def local_rank() -> int:
    """This process's number on its host, as its launcher says; 0 where none does."""
    return int(next((os.environ[name] for name in _LOCAL_RANKS if name in os.environ), 0))


def take_gpu() -> None:
    """Choose this process's GPU, if there are any and the program has not used one."""
    if torch.cuda.is_available() and not torch.cuda.is_initialized():
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())


def gpu() -> str:
    """Which GPU this process has taken, by a name that no other in the world has; empty without one."""
    if not torch.cuda.is_available():
        return ""
    return f"{platform.node()} {torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"


def mpi_takes(device: torch.device) -> bool:
    """Whether MPI gets the memory of a device's tensors itself.

    Raises
    ------
    ValueError
        If ``DISTDL_LITE_MPI_CUDA`` is neither ``staged``, as without it, nor ``direct``.
    """
    if device.type == "cpu":
        return True
    way = os.environ.get("DISTDL_LITE_MPI_CUDA", "staged")
    if way not in ("staged", "direct"):
        raise ValueError(f"DISTDL_LITE_MPI_CUDA={way!r} is neither staged nor direct")
    return way == "direct"


def event_of(tensor: torch.Tensor) -> Callable[[], Any] | None:
    """A function that waits for all that this thread has asked of the tensor's device so far; None for the host."""
    return None if tensor.is_cpu else torch.accelerator.current_stream(tensor.device).record_event().synchronize


def settle(tensor: torch.Tensor) -> None:
    """Wait for all that was asked of the tensor's device: who is given its memory next knows of no stream."""
    if not tensor.is_cpu:
        torch.accelerator.current_stream(tensor.device).synchronize()
