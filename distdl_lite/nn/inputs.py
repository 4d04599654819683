"""The tensors that a layer is given, checked to agree, and zero-volume tensors of ranks that have none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from distdl_lite.agreement import TensorStructure, check_alike
from distdl_lite.layout import Shape
from distdl_lite.nn.module import Module
from distdl_lite.partition import Partition


def zero_volume_tensor(
    batch: int | None = None, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> torch.Tensor:
    """The tensor of a rank without data: of shape ``(0,)``, or ``(batch, 0)``.

    Parameters
    ----------
    batch : int, optional
        The length of the first dim.
    dtype, device : optional
        As of ``torch.empty``.

    Examples
    --------
    >>> zero_volume_tensor(3).shape
    torch.Size([3, 0])
    """
    return torch.empty((0,) if batch is None else (batch, 0), dtype=dtype, device=device)


@dataclass(frozen=True)
class Inputs:
    """One argument of a layer on the ranks of its input's partition, checked to agree.

    Attributes
    ----------
    shapes : Mapping from world rank to tuple of int
        Of the first argument those of all ranks; of another one maybe this rank's alone.
    dtype : torch.dtype
    device : str
        Its type.
    requires_grad : bool
        Whether any rank's input requires grad.
    """

    shapes: Mapping[int, Shape]
    dtype: torch.dtype
    device: str
    requires_grad: bool


def agreed_inputs(layer: Module, P_x: Partition, position: int = 0) -> Inputs:
    """The `position`-th tensor argument of a layer's call, on the ranks of `P_x`; for its set-up.

    Parameters
    ----------
    layer : Module
        Whose call it is.
    P_x : Partition
        The argument's, with an axis for each of its dims.
    position : int
        Among the tensors of the call.

    Raises
    ------
    TypeError
        If a rank passed no tensor, or one that cannot be moved: sparse, nested, float8, without data.
    ValueError
        If dtypes, devices or numbers of dims differ between the ranks, or a rank outside `P_x` passed data. The text
        names the rank.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> class Shapes(dl.nn.Module):
    ...     def __init__(self, P_x):
    ...         super().__init__(P_x)
    ...         self.P_x = P_x
    ...
    ...     def _distdl_module_setup(self, input):
    ...         shapes = dict(dl.nn.agreed_inputs(self, self.P_x).shapes)
    ...         return lambda layer, x: shapes
    >>> dl.testing.spmd(2, lambda world: Shapes(world.grid((2,)))(torch.ones(2 - world.rank)))
    [{0: (2,), 1: (1,)}, {0: (2,), 1: (1,)}]
    """
    name, structure = layer._distdl_label, layer._distdl_structure
    missing = TensorStructure(kind="nothing")
    passed = {structure.rank: structure.mine} if structure.passed is None else structure.passed
    tensors = {rank: told[position] if position < len(told) else missing for rank, told in passed.items()}
    for rank, tensor in tensors.items():
        if tensor.kind != "Tensor":
            raise TypeError(
                f"{name}: rank {rank} passed {tensor.kind}, a tensor is needed (dl.zero_volume_tensor() for none)"
            )
        if tensor.size and tensor.shape and P_x.grid_of_ranks.position(rank) is None:
            raise ValueError(
                f"{name}: rank {rank} passed a tensor of shape {tensor.shape}, but is outside the partition of shape "
                f"{P_x.shape} over ranks {list(P_x.ranks)}, where P.block(shape) is None and dl.zero_volume_tensor() is passed"
            )
    if structure.passed is None:
        first = structure.alike[position]
        own = {structure.rank: tensors[structure.rank].shape}
        shapes, requires_grad = own if position else structure.shapes_over(P_x), first.requires_grad
    else:
        inside = {rank: tensors[rank] for rank in P_x.ranks}
        check_alike("dtype", {rank: tensor.dtype for rank, tensor in inside.items()})
        check_alike("device", {rank: tensor.device for rank, tensor in inside.items()})
        check_alike("number of dims", {rank: len(tensor.shape) for rank, tensor in inside.items()})
        first, shapes = next(iter(inside.values())), {rank: tensor.shape for rank, tensor in inside.items()}
        requires_grad = any(tensor.requires_grad for tensor in tensors.values())
    assert first.dtype is not None
    if first.device == "meta" or (first.dtype.is_floating_point and first.dtype.itemsize == 1):
        raise TypeError(f"{name}: tensors of {first.dtype} on device {first.device} cannot be moved")
    return Inputs(shapes, first.dtype, first.device, requires_grad)


def whose_blocks(parts: int) -> str:
    """A hint for an error about the length of a dim in that many parts: a frequent mistake is to pass all of it everywhere."""
    return f": each of the {parts} ranks along this dim passes its block of it" if parts > 1 else ""


def computing_dtype(name: str, inputs: Inputs, weight: torch.dtype | None) -> torch.dtype:
    """The dtype of what a layer computes: that of input and weight, which must be one, as autocast leaves them.

    Raises
    ------
    TypeError
        If they differ.
    """
    mine, held = (_autocast(dtype, inputs.device) for dtype in (inputs.dtype, weight))
    if mine is not held:
        raise TypeError(f"{name}: the input has dtype {inputs.dtype}, the weight {weight}")
    return held


def weight_dtype(layer: Any, name: str = "weight") -> torch.dtype | None:
    """The dtype of a layer's weight, or another of its tensors, None if it has none.

    A parametrization is not asked to make it: it may count its calls, as torch's spectral norm does, and what it saves is not for
    a checkpoint around the layer to count, which runs the layer again without its set-up.
    """
    made = getattr(layer, "parametrizations", {})
    if name in made:
        return (made[name].original if made[name].is_tensor else made[name].original0).dtype
    held = getattr(layer, name, None)
    return None if held is None else held.dtype


def _autocast(dtype: torch.dtype, device: str) -> torch.dtype:
    """The dtype that autocast makes of one: it leaves float64 and complex numbers alone."""
    casts = torch.is_autocast_enabled(device) and dtype.is_floating_point and dtype is not torch.float64
    return torch.get_autocast_dtype(device) if casts else dtype
