"""Dropout whose mask does not depend on the partition: a hash of one seed and the global index."""

from __future__ import annotations

import math
from typing import Any

import torch

from distdl_lite import layout as lay
from distdl_lite.layout import Box, Shape
from distdl_lite.nn.blocks import anchored, check_floating, own_box
from distdl_lite.nn.inputs import agreed_inputs
from distdl_lite.nn.module import Call, Module
from distdl_lite.nn.options import numbers, spatial_axes
from distdl_lite.partition import Partition

_HASHED_AT_ONCE = 2**16  # elements: the two int64 tensors of a hash then stay in the cache
_STEP, _FACTORS = 0x9E3779B97F4A7C15, ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def _signed(number: int) -> int:
    """The int64 of the same 64 bits."""
    return (number + 2**63) % 2**64 - 2**63


def _fold(z: torch.Tensor, shift: int) -> torch.Tensor:
    """``z ^ (z >> shift)`` of unsigned numbers, in place."""
    return z.bitwise_xor_((z >> shift).bitwise_and_((1 << (64 - shift)) - 1))


def mask_of(box: Box, global_shape: Shape, seed: int, p: float, device: torch.device | str = "cpu") -> torch.Tensor:
    """What dropout keeps of a box of a tensor: each point with probability 1 - p, by its global index alone.

    Point i in row-major order of `global_shape` gets the i-th number of splitmix64 started at 0, but for the last factor of its
    mix, in whose place stands an odd number, the first of splitmix64 started at `seed`, and for the shift after it. It is kept
    where that product, read as a signed number, is at least ``p * 2^64 - 2^63``, which is exact for every float p from 2^-12
    on, and to 2^-64 below. Splitmix64: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014,
    figure 17, with the constants of Stafford's mix 13, as in Vigna's splitmix64.c. Hashing by an odd factor: Dietzfelbinger,
    Hagerup, Katajainen and Penttonen, "A reliable randomized algorithm for the closest-pair problem", J. Algorithms 25, 1997.

    Parameters
    ----------
    box : tuple of (start, stop)
    global_shape : tuple of int
    seed : int
        64 bits.
    p : float
        Of [0, 1).
    device : torch.device or str

    Returns
    -------
    torch.Tensor
        bool, of the shape of the box.
    """
    mask = torch.empty(lay.shape_of(box), dtype=torch.bool, device=device)
    _fill(mask, [start for start, _ in box], global_shape, _factor(seed), _threshold(p))
    return mask


def _factor(seed: int) -> int:
    """The first number of splitmix64 started at a seed, made odd."""
    z = (seed + _STEP) % 2**64
    for shift, factor in _FACTORS:
        z = (z ^ (z >> shift)) * factor % 2**64
    return _signed((z ^ (z >> 31)) | 1)


def _threshold(p: float) -> int:
    return int(p * 2.0**64) - 2**63


def _fill(mask: torch.Tensor, starts: list[int], global_shape: Shape, factor: int, threshold: int) -> None:
    """Write the part of a mask that starts at the given point, in pieces of bounded size."""
    if mask.numel() > _HASHED_AT_ONCE:
        dim = max(range(mask.dim()), key=lambda d: mask.shape[d])
        half = mask.shape[dim] // 2
        middle = [start + half * (d == dim) for d, start in enumerate(starts)]
        _fill(mask.narrow(dim, 0, half), starts, global_shape, factor, threshold)
        _fill(mask.narrow(dim, half, mask.shape[dim] - half), middle, global_shape, factor, threshold)
        return
    torch.ge(_hashed(starts, mask.shape, global_shape, mask.device).mul_(factor), threshold, out=mask)


def _hashed(starts: list[int], shape: Shape, global_shape: Shape, device: torch.device) -> torch.Tensor:
    """What of the hash of a box's points does not depend on the seed."""
    steps = torch.full((1,) * len(shape), _signed(_STEP), device=device)
    for d, (start, n) in enumerate(zip(starts, shape, strict=True)):
        stride = _signed(_STEP * math.prod(global_shape[d + 1 :]))
        positions = torch.arange(start, start + n, device=device).mul_(stride)  # int64 wraps around
        steps = steps + positions.view(*(-1 if e == d else 1 for e in range(len(shape))))
    (first, factor), (second, _) = _FACTORS
    return _fold(_fold(steps, first).mul_(_signed(factor)), second)


class DistributedDropout(Module):
    """Dropout over the tensor that the blocks over `P_x` form: the same mask on any partition, though not torch's.

    In training each point is zeroed with probability p and the others are multiplied by ``1 / (1 - p)``; in eval the input is
    returned. Input and output in the same blocks, of any sizes. Ranks outside `P_x` pass and get zero-volume tensors.

    Parameters
    ----------
    P_x : Partition
        One axis per dim of the input.
    p : float
        Of [0, 1]; it is met exactly.
    inplace : bool
        Whether the input is overwritten.

    Raises
    ------
    ValueError
        In the constructor if p is not in [0, 1]; at build if the blocks form no tensor product. On all ranks alike.
    TypeError
        At build, if points of integers are to be dropped.

    Notes
    -----
    The mask is a hash of the global index and of a seed, see `distdl_lite.nn.dropout.mask_of`. Every rank, also one outside
    `P_x`, draws one seed from torch's CPU generator in each forward that drops some points; that of the first rank of `P_x`
    counts, so that ranks with different generators agree. This takes one broadcast of 8 bytes in forward; backward
    communicates nothing. As the seed comes from the generator, checkpointing recomputes the same mask.
    """

    _distdl_free = frozenset({"p", "inplace"})
    _masked: int | None = None  # leading dims that have a mask of their own: all

    def __init__(self, P_x: Partition, p: float = 0.5, inplace: bool = False) -> None:
        super().__init__(P_x)
        self.P_x, self.p, self.inplace = P_x, p, inplace
        self._check_p()

    def _check_p(self) -> None:
        numbers(self, p=self.p)
        if not 0.0 <= self.p <= 1.0:
            raise self._refuse(f"p={self.p} is not in [0, 1]")

    def _distdl_module_setup(self, input: tuple[Any, ...]) -> Call:
        self._check_p()  # which may have changed
        inputs = agreed_inputs(self, self.P_x)
        X = lay.blocks(self.P_x.grid_of_ranks, lay.cuts_from_shapes(self.P_x.grid_of_ranks, inputs.shapes))
        if self.training and 0 < self.p < 1 and not inputs.dtype.is_complex:
            check_floating(self, inputs)
        box, global_shape, hashed = own_box(self, X)[: self._masked], lay.global_shape_of(X)[: self._masked], None
        if math.prod(lay.shape_of(box)) <= _HASHED_AT_ONCE:  # then that is the same in every call
            hashed = _hashed([start for start, _ in box], lay.shape_of(box), global_shape, input[0].device)
        team, root, graph = self._distdl_team, self.P_x.ranks[0], inputs.requires_grad

        def run(layer: DistributedDropout, x: torch.Tensor) -> torch.Tensor:
            if not layer.training or layer.p == 0:
                return x
            if layer.p == 1:
                return x.mul_(0) if layer.inplace else x * 0
            seed = torch.randint(2**63 - 1, (1,))
            team.world.broadcast(team, seed, root)
            number, p = int(seed), layer.p
            if not layer.inplace:  # with a graph node everywhere, all ranks recompute a checkpoint
                x = anchored(x, graph)
            if hashed is None:
                mask = mask_of(box, global_shape, number, p, x.device)
            else:
                mask = hashed * _factor(number) >= _threshold(p)
            mask = mask.view(*mask.shape, *(1,) * (x.dim() - mask.dim()))
            factor = mask.to(x.dtype).mul_(1 / (1 - p))  # as torch's: one node, whose backward is one product
            return x.mul_(factor) if layer.inplace else x * factor

        return run

    def _distdl_outside(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and 0 < self.p < 1:
            torch.randint(2**63 - 1, (1,))  # as the others' seed
        return x

    def extra_repr(self) -> str:
        return f"p={self.p}, inplace={self.inplace}, P_x={self.P_x.shape}"


class _ChannelDropout(DistributedDropout):
    """Dropout of whole channels of the tensor ``(N, C, *space)`` that the blocks over `P_x` form, any dim of which may be cut.

    The mask is that of `DistributedDropout` for a tensor ``(N, C)``, whose description holds for the rest. A ValueError in the
    constructor says if `P_x` has another number of axes.
    """

    _masked = 2
    _dims: int

    def __init__(self, P_x: Partition, p: float = 0.5, inplace: bool = False) -> None:
        super().__init__(P_x, p, inplace)
        spatial_axes(self, "P_x", P_x, self._dims)


class DistributedDropout1d(_ChannelDropout):
    _dims = 1


class DistributedDropout2d(_ChannelDropout):
    _dims = 2


class DistributedDropout3d(_ChannelDropout):
    _dims = 3
