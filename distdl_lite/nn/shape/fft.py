"""Fourier transforms: the transformed dims are made whole, one set after the other, by moving the cuts to other dims."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, reduce
from typing import Any

import torch

from distdl_lite import layout as lay
from distdl_lite.grid import Grid, indices
from distdl_lite.layout import Dim, Shape
from distdl_lite.nn.blocks import Local, operator_between, torch_dtype
from distdl_lite.nn.inputs import agreed_inputs
from distdl_lite.nn.module import Call, Module
from distdl_lite.nn.options import different_dims, integers, listed
from distdl_lite.partition import Partition

_TRANSFORMS = {"fft": torch.fft.fftn, "ifft": torch.fft.ifftn, "rfft": torch.fft.rfftn, "irfft": torch.fft.irfftn}
_COMPLEX = {"fft": "fft", "ifft": "ifft", "rfft": "fft", "irfft": "ifft"}  # of the other dims


class DistributedFFT(Module):
    """A discrete Fourier transform of the tensor that the blocks over `P_x` form, equal to torch's up to rounding.

    Input in blocks of any sizes, cut along any dims; output in balanced blocks over `P_x`, whose ranks call it together.
    Ranks outside return what they pass. No rank ever holds the whole tensor: the ranks that cut a transformed dim go on to
    cut another one, which is not transformed at the same time and has most points to share, so that each still holds about
    its share of the tensor, or a larger one if that dim is shorter than its number of ranks.

    Parameters
    ----------
    P_x : Partition
        One axis per tensor dim.
    function : {"fft", "ifft", "rfft", "irfft"}
        Which of torch.fft's transforms, over any number of dims: torch.fft.fftn and so on.
    dim : int or sequence of int
        The transformed dims. The last of them is the halved one of a real transform.
    s : int or sequence of int, optional
        Per transformed dim its global length, to which the input (the output of irfft's last) is cut or padded with zeros;
        -1 leaves it.
    norm : {"forward", "backward", "ortho"}, optional
        As in torch.fft.

    Raises
    ------
    ValueError
        In the constructor for an unknown option or dims that do not exist; at build if torch refuses the lengths or the
        dtype, or if no other dim can be cut in place of a transformed one. On all ranks alike.

    Notes
    -----
    Steps: transform along the dims that are whole, move to a grid in which most of the others are, repeat, go home. So one
    transform takes no exchange where its dims are not cut, two where one grid leaves all of them whole, and one more for
    each grid more; backward the adjoint ones, with torch's own backward of the local transforms.
    """

    def __init__(
        self,
        P_x: Partition,
        function: str = "fft",
        dim: int | Sequence[int] = -1,
        s: int | Sequence[int] | None = None,
        norm: str | None = None,
    ) -> None:
        super().__init__(P_x)
        self.P_x, self.function, self.norm = P_x, function, norm
        self.dim = listed(dim)
        self.s = (-1,) * len(self.dim) if s is None else listed(s)
        for value in self.s:
            integers(self, s=value)
        if function not in _TRANSFORMS:
            raise self._refuse(f"function {function!r} is none of {', '.join(_TRANSFORMS)}")
        if norm not in (None, "forward", "backward", "ortho"):
            raise self._refuse(f"norm {norm!r} is none of forward, backward, ortho")
        self._dims = different_dims(self, P_x.dim, self.dim)
        if not self._dims:
            raise self._refuse("dim=() are no dims")
        if len(self.s) != len(self.dim):
            raise self._refuse(f"s={self.s} does not have a length for each of dim={self.dim}")

    def _distdl_module_setup(self, input: tuple[Any, ...]) -> Call:
        inputs = agreed_inputs(self, self.P_x)
        torch_dtype(self, inputs, 1, partial(_TRANSFORMS[self.function], s=(1,)))
        grid = self.P_x.grid_of_ranks
        here = lay.blocks(grid, lay.cuts_from_shapes(grid, inputs.shapes))
        sizes = self._sizes(lay.global_shape_of(here))
        steps: list[Local | None] = []
        left = self._dims
        while left:
            there, now = here, self._ready(here.grid, left)
            if not now:
                n = lay.global_shape_of(here)
                there = lay.balanced_blocks(self._freed(here.grid, n, left), n)
                now = self._ready(there.grid, left)
            move = operator_between(here, there, self, inputs.requires_grad)
            function = self.function if self._dims[-1] in now else _COMPLEX[self.function]
            box = there.box(self._distdl_transport.rank)
            steps += [move, self._transform(_TRANSFORMS[function], now, sizes, lay.shape_of(box or ()))]
            here = replace(there, dims=tuple(self._transformed(d, dim, now, sizes) for d, dim in enumerate(there.dims)))
            left = tuple(d for d in left if d not in now)
        Y = lay.balanced_blocks(grid, lay.global_shape_of(here))
        steps.append(operator_between(here, Y, self, inputs.requires_grad))
        return partial(_in_turn, [step for step in steps if step is not None])

    def _sizes(self, shape: Shape) -> dict[int, int]:
        """The length of the transform of each dim."""
        own = {d: shape[d] for d in self._dims}
        if self.function == "irfft":
            own[self._dims[-1]] = 2 * (own[self._dims[-1]] - 1)
        sizes = {d: own[d] if size == -1 else size for d, size in zip(self._dims, self.s, strict=True)}
        if min(sizes.values()) < 1:
            raise self._refuse(f"dim={self.dim} of a tensor of shape {shape} with s={self.s} has no points")
        return sizes

    def _ready(self, grid: Grid, left: tuple[int, ...]) -> tuple[int, ...]:
        """The dims to transform on a grid: a real transform begins, its inverse ends, with the halved dim."""
        now, halved = tuple(d for d in left if grid.shape[d] == 1), self._dims[-1]
        if self.function == "rfft" and halved in left and halved not in now:
            return ()
        return tuple(d for d in now if d != halved) if self.function == "irfft" and now != left else now

    def _freed(self, grid: Grid, n: Shape, left: tuple[int, ...]) -> Grid:
        """The grid in which all dims that are left are whole, or one, whichever keeps more ranks busy."""
        found = [made for made in (moved(grid, n, whole) for whole in (left, *((d,) for d in left))) if made]
        useful = [made for made in found if self._ready(made, left)]
        best = max(useful, key=lambda made: _parts(made, n), default=None)
        if best is None or _parts(best, n) == 1 < _parts(grid, n):
            raise self._refuse(
                f"no dim of a tensor of shape {n} can be cut in place of dims {left}, on a grid of shape {grid.shape}"
            )
        return best

    def _transformed(self, d: int, dim: Dim, now: tuple[int, ...], sizes: dict[int, int]) -> Dim:
        """A dim after a step."""
        if d not in now:
            return dim
        is_halved = self.function == "rfft" and d == self._dims[-1]
        return replace(dim, ranges=((0, sizes[d] // 2 + 1 if is_halved else sizes[d]),))

    def _transform(
        self, function: Callable[..., torch.Tensor], dims: tuple[int, ...], sizes: dict[int, int], shape: Shape
    ) -> Local:
        """What is done to a block of the given shape."""
        others = [d for d in range(len(shape)) if d not in dims]
        transform = partial(function, s=tuple(sizes[d] for d in dims), dim=dims, norm=self.norm)
        if all(shape[d] for d in others):
            return transform

        def nothing(x: torch.Tensor) -> torch.Tensor:
            y = transform(x.sum(others, keepdim=True))  # torch transforms no empty one
            return y.expand([y.shape[d] if d in dims else n for d, n in enumerate(x.shape)])

        return nothing

    def extra_repr(self) -> str:
        s = "" if set(self.s) == {-1} else f", s={self.s}"
        return f"function={self.function!r}, dim={self.dim}{s}, norm={self.norm!r}, P_x={self.P_x.shape}"


def _in_turn(steps: Sequence[Local], layer: Module, x: torch.Tensor) -> torch.Tensor:
    return reduce(lambda y, step: step(y), steps, x)


def moved(grid: Grid, shape: Shape, whole: Sequence[int]) -> Grid | None:
    """The ranks that cut some dims put to cut others, each dim's to the one with most points a part; None without others.

    >>> moved(Grid((1, 2, 3), range(6)), (4, 9, 9), whole=(1, 2)).shape
    (6, 1, 1)
    """
    others = [d for d in range(grid.dim) if d not in whole]
    for d in whole:
        if grid.shape[d] > 1 and others:
            grid = _merged(grid, d, max(others, key=lambda other: shape[other] / grid.shape[other]))
    return grid if others else None


def _merged(grid: Grid, source: int, target: int) -> Grid:
    """The ranks along one axis put side by side along another, so that with even blocks only they exchange."""
    p = grid.shape[source]
    factors = {source: 1, target: p * grid.shape[target]}
    shape = tuple(factors.get(axis, n) for axis, n in enumerate(grid.shape))
    ranks = []
    for index in map(list, indices(shape)):
        index[target], index[source] = divmod(index[target], p)
        ranks.append(grid.rank(index))
    return Grid(shape, tuple(ranks))


def _parts(grid: Grid, shape: Shape) -> int:
    """The number of ranks that hold anything."""
    return math.prod(map(min, shape, grid.shape))
