"""Fourier transforms: the transformed dims are made whole, one set after the other, by moving the cuts to other dims."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from distdl_lite.factors import Dims, axes_of, size_of, uncut
from distdl_lite.layout import Shape
from distdl_lite.nn.compiler import Compiler
from distdl_lite.nn.inputs import Inputs
from distdl_lite.nn.options import different_dims, integers, listed
from distdl_lite.nn.rule_layer import RuleLayer
from distdl_lite.nn.value import Value, rule
from distdl_lite.partition import Partition

_TRANSFORMS = {"fft": torch.fft.fftn, "ifft": torch.fft.ifftn, "rfft": torch.fft.rfftn, "irfft": torch.fft.irfftn}
_COMPLEX = {"fft": "fft", "ifft": "ifft", "rfft": "fft", "irfft": "ifft"}  # of the other dims


@rule("fft_fftn", "fft_ifftn", "fft_rfftn", "fft_irfftn", "fft_fft2", "fft_ifft2", "fft_rfft2", "fft_irfft2", "fft_fft",
      "fft_ifft", "fft_rfft", "fft_irfft")  # fmt: skip
def fft(c: Compiler, op: Any, x: Value, s: Any = None, dim: Any = None, norm: str | None = None) -> Value:
    name = op.name.removeprefix("fft_").rstrip("n2")
    lengths = None if s is None else listed(s)
    if dim is None:
        count = {"n": x.ndim if lengths is None else len(lengths), "2": 2}.get(op.name[-1], 1)
        dim = range(x.ndim - count, x.ndim)
    dims = tuple(d % x.ndim for d in listed(dim))
    return transformed(c, c.spread(x, dims), name, dims, lengths or [-1] * len(dims), norm)


@rule("fft_hfft", "fft_ihfft")
def hfft(c: Compiler, op: Any, x: Value, n: int | None = None, dim: int = -1, norm: str | None = None) -> Value:
    x = c.wholly(c.spread(x, [dim]), [dim])
    return c.apply(op, x, n, dim, norm, dims=x.with_dims({dim: uncut(op.shape[dim])}), everywhere=False, linear=True)


def transformed(
    c: Compiler,
    x: Value,
    name: str,
    dims: tuple[int, ...],
    s: Sequence[int],
    norm: str | None,
    gathers: bool = True,
) -> Value:
    """The transform of that name along dims, to lengths of which -1 leaves a dim's.

    It transforms along the dims that are whole, moves to a layout in which most of the others are, and so on. Raises ValueError
    if there are no points or, unless it `gathers` then, no other dims to cut in place of them.
    """
    sizes, left = _sizes(x.shape, name, dims, s), dims
    x = c.plain(x, dims)
    while left:
        now = _ready(x.dims, name, left)
        if not now:
            freed = _freed(c, x, name, left)
            if freed is None and not gathers:
                raise ValueError(
                    f"no dim of a tensor of shape {x.shape} can be cut in place of dims {left}, on a grid of shape {c.grid.shape}"
                )
            x = c.wholly(x, left, "gather", spread=False) if freed is None else c.move(x, freed, "recut")
            now = _ready(x.dims, name, left)
        function = _TRANSFORMS[name if dims[-1] in now else _COMPLEX[name]]
        ends = {d: sizes[d] // 2 + 1 if name == "rfft" and d == dims[-1] else sizes[d] for d in now}
        x = c.call(
            function, x, tuple(sizes[d] for d in now), now, norm,
            dims=x.with_dims({d: uncut(n) for d, n in ends.items()}),
            dtype=function(torch.zeros(1, dtype=x.dtype), s=(1,)).dtype,
            everywhere=False, linear=True,
        )  # fmt: skip
        left = tuple(d for d in left if d not in now)
    return x


def _sizes(shape: Shape, name: str, dims: tuple[int, ...], s: Sequence[int]) -> dict[int, int]:
    """The length of the transform of each dim."""
    own = {d: 2 * (shape[d] - 1) if name == "irfft" and d == dims[-1] else shape[d] for d in dims}
    sizes = {d: own[d] if size == -1 else size for d, size in zip(dims, s, strict=True)}
    if min(sizes.values()) < 1:
        raise ValueError(f"dim={dims} of a tensor of shape {shape} with s={tuple(s)} has no points")
    return sizes


def _ready(dims: Dims, name: str, left: tuple[int, ...]) -> tuple[int, ...]:
    """The dims to transform in a layout: a real transform begins, its inverse ends, with the halved dim, the last."""
    now, halved = tuple(d for d in left if not axes_of(dims[d])), left[-1]
    if name == "rfft" and halved not in now:
        return ()
    return tuple(d for d in now if d != halved) if name == "irfft" and now != left else now


def _freed(c: Compiler, x: Value, name: str, left: tuple[int, ...]) -> Dims | None:
    """The layout in which all dims that are left are whole, or one, whichever keeps more ranks busy; None if none does."""
    found = [_without(c, x, chosen) for chosen in (left, *((d,) for d in left))]
    best = max((dims for dims in found if _ready(dims, name, left)), key=lambda dims: _busy(c, dims))
    return None if _busy(c, best) == 1 < _busy(c, x.dims) else best


def _without(c: Compiler, x: Value, whole: tuple[int, ...]) -> Dims:
    """The layout with some dims whole; the axes that cut them go to cut others, home ones first."""
    dims = c.even(x.with_dims({d: uncut(x.shape[d]) for d in whole}))
    for axis in sorted(x.axes(*whole), key=lambda axis: axis in whole):
        dims = c.placed(dims, axis, whole, crowded=True)
    return dims


def _busy(c: Compiler, dims: Dims) -> int:
    """The number of parts that hold anything."""
    return math.prod(min(size_of(factors), c.parts(axes_of(factors))) for factors in dims)


class DistributedFFT(RuleLayer):
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

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     P = world.grid((1, 2))
    ...     return dl.nn.DistributedFFT(P, "rfft", dim=1)(P.cut(torch.ones(2, 6))).real.tolist()
    >>> dl.testing.spmd(2, body)
    [[[6.0, 0.0], [6.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]
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

    def result_dtype(self, inputs: Inputs, shape: Shape) -> torch.dtype:
        try:
            _TRANSFORMS[self.function](torch.zeros(1, dtype=inputs.dtype, device=inputs.device), s=(1,))
        except (RuntimeError, TypeError) as error:
            raise self._refuse(f"the input has dtype {inputs.dtype}: {error}", TypeError) from error
        return inputs.dtype

    def rule(self, c: Compiler, x: Value) -> Value:
        return transformed(c, x, self.function, self._dims, self.s, self.norm, gathers=False)

    def extra_repr(self) -> str:
        s = "" if set(self.s) == {-1} else f", s={self.s}"
        return f"function={self.function!r}, dim={self.dim}{s}, norm={self.norm!r}, P_x={self.P_x.shape}"
