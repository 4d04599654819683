"""What the MPI library says of itself, and what it does when it is given memory of a device."""

from __future__ import annotations

import ctypes
import sys

import torch

from distdl_lite.transport.mpi.buffers import MPI, TAG, as_bytes, as_numbers


def about() -> dict[str, str]:
    """Versions, the thread level, and whether MPI takes CUDA memory, by their names."""
    levels = {getattr(MPI, f"THREAD_{name}"): name for name in ("SINGLE", "FUNNELED", "SERIALIZED", "MULTIPLE")}
    return {
        "mpi4py": sys.modules["mpi4py"].__version__,
        "MPI library": " ".join(MPI.Get_library_version().split("\n")[0].strip("\0").split()),
        "MPI standard": ".".join(map(str, MPI.Get_version())),
        "thread level": levels[MPI.Query_thread()],
        "CUDA-aware MPI": {True: "yes", False: "no", None: "the MPI library does not say"}[takes_cuda()],
    }


def takes_cuda() -> bool | None:
    """Whether MPI takes pointers to CUDA memory, None if its library does not say."""
    kinds = MPI.COMM_WORLD.Get_info().Get("mpi_memory_alloc_kinds")  # of MPI 4.1
    if kinds is not None:
        return "cuda" in kinds
    # Of Open MPI, MPICH and their relatives; looked up in the libraries that mpi4py was linked to.
    query = getattr(ctypes.CDLL(MPI.__file__), "MPIX_Query_cuda_support", None)
    return None if query is None else bool(query())


def ring(comm: MPI.Comm, x: torch.Tensor) -> torch.Tensor:
    """The tensor of the rank before, passed to MPI where it lies; the caller synchronises the stream before."""
    y = torch.empty_like(x)
    comm.Sendrecv(as_bytes(x), (comm.rank + 1) % comm.size, TAG, as_bytes(y), (comm.rank - 1) % comm.size, TAG)
    return y


def posted_sum(comm: MPI.Comm, x: torch.Tensor) -> torch.Tensor:
    """The tensor, after a non-blocking sum into it where it lies; the caller synchronises the stream before."""
    comm.Iallreduce(MPI.IN_PLACE, as_numbers(x), MPI.SUM).Wait()
    return x
