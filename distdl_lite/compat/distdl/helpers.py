"""DistDL's small helpers: slices of blocks, structures of tensors, and what its examples and tests use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch

from distdl_lite import layout as lay
from distdl_lite.compat.distdl.partitions import plain
from distdl_lite.grid import balanced


def compute_subshape(shape: Any, index: Any, global_shape: Any) -> np.ndarray:
    """The shape of the balanced block at an index of a grid."""
    return compute_stop_index(shape, index, global_shape) - compute_start_index(shape, index, global_shape)


def compute_start_index(shape: Any, index: Any, global_shape: Any) -> np.ndarray:
    """Where that block starts."""
    return np.asarray([balanced(int(n), int(p))[i] for p, i, n in zip(shape, index, global_shape, strict=True)])


def compute_stop_index(shape: Any, index: Any, global_shape: Any) -> np.ndarray:
    """Where it stops."""
    return compute_start_index(shape, np.asarray(index) + 1, global_shape)


def compute_intersection(
    start_0: Any, stop_0: Any, start_1: Any, stop_1: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start, stop and shape of what two boxes have in common."""
    start, stop = np.maximum(start_0, start_1), np.minimum(stop_0, stop_1)
    return start, stop, np.maximum(stop - start, 0)


def assemble_slices(start: Any, stop: Any) -> tuple[slice, ...]:
    return tuple(slice(int(a), int(b)) for a, b in zip(start, stop, strict=True))


def compute_nd_slice_shape(slices: Sequence[slice]) -> np.ndarray:
    return np.asarray([s.stop - (s.start or 0) for s in slices])


def worker_layout(shape: Any) -> np.ndarray:
    """The ranks of a grid, where they stand."""
    return np.arange(np.prod(shape)).reshape(shape)


def range_index(shape: Any) -> Iterator[tuple[int, ...]]:
    """All indices of a shape in row-major order."""
    return product(*map(range, shape))


def assemble_index_filter(index: Any, dims: Any, invert: bool = False) -> tuple[slice, ...]:
    """Slices that keep the index along `dims`, or along the others, and are whole elsewhere."""
    return tuple(slice(i, i + 1) if (d in dims) != invert else slice(None) for d, i in enumerate(index))


def filtered_range_index(shape: Any, index_filter: Sequence[Any]) -> Iterator[tuple[int, ...]]:
    """The indices that a filter of slices lets through, in row-major order."""
    return product(*(range(*kept.indices(n)) for n, kept in zip(shape, index_filter, strict=True)))


def cartesian_index_c(shape: Any, i: int) -> tuple[Any, ...]:
    """The index of a position in row-major order."""
    return np.unravel_index(i, shape)


def cartesian_index_f(shape: Any, i: int) -> tuple[Any, ...]:
    """The index of a position in column-major order."""
    return np.unravel_index(i, shape, order="F")


def zero_volume_tensor(
    b: int | None = None, *, requires_grad: bool = False, dtype: torch.dtype | None = None, device: Any = None
) -> torch.Tensor:
    """The tensor of a rank without data: of shape ``(0,)``, or ``(b, 0)``."""
    return torch.empty((0,) if b is None else (b, 0), requires_grad=requires_grad, dtype=dtype, device=device)


class NoneTensor:
    """Stands where there is no tensor."""

    shape = dtype = None
    requires_grad = False


class TensorStructure:
    """Shape, dtype and requires_grad of a tensor, None without one."""

    def __init__(self, tensor: Any = None) -> None:
        self.shape = getattr(tensor, "shape", None)
        self.dtype = getattr(tensor, "dtype", None)
        self.requires_grad = getattr(tensor, "requires_grad", None)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TensorStructure) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]


def assemble_global_tensor_structure(local: TensorStructure, P_in: Any, P_out: Any = None) -> TensorStructure:
    """The structure of the tensor whose blocks P_in holds, on P_out (None: P_in); its ranks and P_in's call together."""
    P_in, P_out, made = plain(P_in), plain(P_in if P_out is None else P_out), TensorStructure()
    union = P_in.create_partition_union(P_out)
    told = dict(zip(union.ranks, union.allgather_data(vars(local)) or (), strict=False))
    if P_out.active:
        cuts = lay.cuts_from_shapes(P_in.grid_of_ranks, {rank: told[rank]["shape"] for rank in P_in.ranks})
        vars(made).update(told[P_in.ranks[0]], shape=torch.Size(cut[-1] for cut in cuts))
    return made


def distdl_padding_to_torch_padding(pad: Any) -> tuple[int, ...]:
    """Pairs for each dim as torch takes them, the last dim first."""
    return tuple(int(n) for pair in reversed(list(pad)) for n in pair)


class ZeroVolumeCorrectorFunction(torch.autograd.Function):
    """A loss to call backward on: of a zero-volume tensor a zero without dims, whose gradient nothing feels."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor) -> torch.Tensor:
        ctx.shape = input.shape
        return input.clone() if input.numel() else input.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> torch.Tensor:
        return grad_output.clone() if ctx.shape.numel() else grad_output.new_empty(ctx.shape)


class Bunch(dict[str, Any]):
    """A dictionary whose entries are attributes too."""

    def __init__(self, *args: Any, **entries: Any) -> None:
        super().__init__(*args, **entries)
        self.__dict__ = self


class DummyContext:
    """A context of an autograd Function, to call its methods by hand."""

    def save_for_backward(self, *tensors: torch.Tensor) -> None:
        self.saved_tensors = tensors


def print_sequential(comm: Any, value: Any) -> None:
    """Print a value on every rank of a communicator or partition, one after the other."""
    comm = getattr(comm, "_comm", comm)
    for rank in range(comm.Get_size()):
        if rank == comm.Get_rank():
            print(f"rank = {rank}: {value}", flush=True)
        comm.Barrier()
