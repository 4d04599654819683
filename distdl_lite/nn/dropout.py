"""Dropout whose mask does not depend on the partition: a hash of one seed and the global index."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch

from distdl_lite import layout as lay
from distdl_lite.factors import Dims, length_of, uncut
from distdl_lite.layout import Box, Shape
from distdl_lite.nn.compiler import Compiler
from distdl_lite.nn.face import Face
from distdl_lite.nn.value import NoRule, Value, rule
from distdl_lite.transport import Team

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


class Points:
    """The points of a box, which get random numbers by their global index: of a tensor with one dim for each factor."""

    def __init__(self, c: Compiler, dims: Dims) -> None:
        factors = [factor for of_dim in dims for factor in of_dim]
        self.box, self.global_shape = tuple(map(c.range, factors)), tuple(map(length_of, factors))
        self.shape, self.device, self.known = c.local(dims), c.device, None
        if math.prod(self.shape) <= _HASHED_AT_ONCE:  # then that is the same in every call
            self.known = self._hashed()

    def _hashed(self) -> torch.Tensor:
        return _hashed([start for start, _ in self.box], lay.shape_of(self.box), self.global_shape, self.device)

    def mask(self, seed: int, p: float) -> torch.Tensor:
        """What is kept where each point is dropped with probability p."""
        if p >= 1:
            return torch.zeros(self.shape, dtype=torch.bool, device=self.device)
        if self.known is None:
            return mask_of(self.box, self.global_shape, seed, p, self.device).view(self.shape)
        return (self.known * _factor(seed) >= _threshold(p)).view(self.shape)

    def uniform(self, seed: int, dtype: torch.dtype) -> torch.Tensor:
        """Numbers of [0, 1), as many as torch's, with as many bits as the dtype has."""
        bits = 2 - math.frexp(torch.finfo(dtype).eps)[1]
        number = (self._hashed() if self.known is None else self.known) * _factor(seed)
        return ((number >> (64 - bits)).to(dtype) * 2.0**-bits + 0.5).view(self.shape)


def _seed_of(team: Team, root: int) -> torch.Tensor:
    """The number that the root's generator draws; all ranks draw one."""
    seed = torch.randint(2**63 - 1, (1,))
    team.world.broadcast(team, seed, root)
    return seed


def seeded(c: Compiler) -> tuple[Value, int]:
    """The seed of this run of the program, and which number of the sequence that starts at it comes next."""
    drawn = c.shared.setdefault("seed", [None, -1])
    if drawn[0] is None:
        drawn[0] = c.call(_seed_of, c.team(range(c.grid.dim)), c.grid.ranks[0], dims=(), dtype=torch.int64)
    drawn[1] += 1
    return drawn[0], drawn[1] * _STEP


def seed_of(c: Compiler) -> Value:
    """The next seed of the program, for `mask_of`."""
    seed, step = seeded(c)
    return c.call(lambda seed: torch.tensor(_signed((int(seed) + step) % 2**64)), seed, dims=(), dtype=torch.int64)


def dropped(c: Compiler, x: Value, p: float, leading: int | None = None, inplace: bool = False) -> Value:
    """The value, points of which are zeroed with probability p; so many leading dims have a mask of their own (None: all)."""
    if p == 0:
        return x
    if p == 1:
        return c.call(torch.Tensor.mul_ if inplace else torch.mul, x, 0, dims=x.dims, dtype=x.dtype)
    points, (seed, step) = Points(c, x.dims[:leading]), seeded(c)

    def drop(x: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
        mask = points.mask(int(seed) + step, p)
        # As torch's: one node, whose backward is one product.
        factor = mask.view(*mask.shape, *(1,) * (x.dim() - mask.dim())).to(x.dtype).mul_(1 / (1 - p))
        return x.mul_(factor) if inplace else x * factor

    return c.call(drop, x, seed, dims=x.dims, dtype=x.dtype)


@rule("dropout", "native_dropout")
def dropout(c: Compiler, op: Any, x: Value, p: float, train: bool | None = True) -> Any:
    y = dropped(c, x, p) if train is not False else x
    return y if op.is_one else [y, None]  # the mask, which only torch's own backward reads


def _of_points(c: Compiler, dims: Dims, dtype: torch.dtype, function: Callable[..., torch.Tensor], *more: Any) -> Value:
    """What a function makes of the points of a block, a seed, and others."""
    points, (seed, step) = Points(c, dims), seeded(c)

    def drawn(seed: torch.Tensor, *more: Any) -> torch.Tensor:
        return function(points, int(seed) + step, *more).to(dtype)

    return c.calls(drawn, seed, *more, dims=[dims], dtypes=[dtype], one=True, grad=False)[0]


@rule("bernoulli")
def bernoulli(c: Compiler, op: Any, x: Value, p: float | None = None, generator: Any = None) -> Value:
    if p is not None:
        return _of_points(c, x.dims, x.dtype, lambda points, seed: points.mask(seed, 1 - p))
    return _of_points(c, x.dims, x.dtype, lambda points, seed, x: points.uniform(seed, x.dtype) < x.detach(), x)


@rule("rand", "rand_like", "randn", "randn_like")
def random(c: Compiler, op: Any, x: Any, *args: Any, **options: Any) -> Value:
    if not op.dtype.is_floating_point or options.get("generator") is not None:
        raise NoRule
    # Whole where nothing says how it will be cut.
    dims = x.dims if isinstance(x, Value) else tuple((uncut(n),) for n in op.shape)

    def uniform(points: Points, seed: int) -> torch.Tensor:
        return points.uniform(seed, op.dtype)

    def normal(points: Points, seed: int) -> torch.Tensor:
        """Box and Muller, "A note on the generation of random normal deviates", 1958."""
        length, angle = points.uniform(seed, torch.float64), points.uniform(~seed, torch.float64)
        return (-2 * torch.log1p(-length)).sqrt() * torch.cos(2 * math.pi * angle)

    return _of_points(c, dims, op.dtype, normal if "randn" in op.name else uniform)


class DistributedDropout(Face, serial=torch.nn.Dropout):
    """Dropout over the tensor that the blocks over `P_x` form: the same mask on any partition, though not torch's.

    In training each point is zeroed with probability p and the others are multiplied by ``1 / (1 - p)``; in eval the input is
    returned. Input and output in the same blocks, of any sizes. Ranks outside `P_x` pass and get zero-volume tensors.

    Parameters
    ----------
    P_x : Partition
        One axis per dim of the input.
    p, inplace
        As in torch.nn.Dropout; p is met exactly.

    Raises
    ------
    ValueError
        If p is not in [0, 1]; at build if the blocks form no tensor product. On all ranks alike.
    TypeError
        At build, if points of integers are to be dropped.

    Notes
    -----
    The mask is a hash of the global index and of a seed, see `distdl_lite.nn.dropout.mask_of`. Every rank, also one outside
    `P_x`, draws one seed from torch's CPU generator in each forward that drops some points; that of the first rank of `P_x`
    counts, so that ranks with different generators agree. This takes one broadcast of 8 bytes in forward; backward
    communicates nothing. As the seed comes from the generator, checkpointing recomputes the same mask.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     torch.manual_seed(1)
    ...     P = world.grid((world.size,))
    ...     return dl.nn.DistributedDropout(P)(P.cut(torch.ones(6))).tolist()
    >>> dl.testing.spmd(1, body), dl.testing.spmd(2, body)
    ([[2.0, 0.0, 0.0, 0.0, 2.0, 2.0]], [[2.0, 0.0, 0.0], [0.0, 2.0, 2.0]])
    """

    _distdl_free = frozenset({"p", "inplace"})
    keeps_blocks = True
    for_one_point: ClassVar[Mapping[str, Any]] = {"training": False}  # where nothing is drawn

    @property
    def overwrites(self) -> bool:
        return self.inplace

    @property
    def needs_floating(self) -> bool:
        """Whether some points are dropped."""
        return self.training and 0 < self.p < 1

    def rule(self, c: Compiler, x: Value, **held: Value) -> Value:
        # A mask of all points, or of channels.
        return dropped(c, x, self.p, 2 if self.has_channels else None, self.inplace) if self.training else x

    def _distdl_outside(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and 0 < self.p < 1:
            torch.randint(2**63 - 1, (1,))  # as the others' seed
        return x


class _ChannelDropout(DistributedDropout):
    """Dropout of whole channels of the tensor ``(N, C, *space)`` that the blocks over `P_x` form, any dim of which may be cut.

    The mask is that of `DistributedDropout` for a tensor ``(N, C)``, whose description holds for the rest.

    Parameters
    ----------
    P_x : Partition
        ``[P_b, P_c, *P_space]``.
    p, inplace
        As of `DistributedDropout`.

    Raises
    ------
    ValueError, TypeError
        As there; also in the constructor if `P_x` has another number of axes.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     torch.manual_seed(1)
    ...     P = world.grid((1, 1, 2))
    ...     return dl.nn.DistributedDropout1d(P)(P.cut(torch.ones(1, 4, 3))).tolist()
    >>> dl.testing.spmd(2, body)
    [[[[2.0, 2.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]], [[[2.0], [0.0], [0.0], [0.0]]]]
    """

    has_channels = True


class DistributedDropout1d(_ChannelDropout, serial=torch.nn.Dropout1d): ...


class DistributedDropout2d(_ChannelDropout, serial=torch.nn.Dropout2d): ...


class DistributedDropout3d(_ChannelDropout, serial=torch.nn.Dropout3d): ...
