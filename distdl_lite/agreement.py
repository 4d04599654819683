"""How ranks agree: on being at the same place, on what a call is given, and on an error that all of them raise.

The structure of a call's arguments is all of them but the numbers in their tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from distdl_lite.layout import BlockShapes, Shape
from distdl_lite.partition import Partition
from distdl_lite.private import any_autocast_is_enabled, transforms_are_active
from distdl_lite.transport import Team

_CALL = "call of layer"


def vote_of(text: str) -> int:
    """A text as a number to vote with, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")


def is_unanimous(team: Team, vote: int) -> bool:
    """Whether all ranks of a team, which vote together, vote alike."""
    return team.world.agree(team, vote) == vote * team.size % 2**64


def check_met(team: Team, name: str, place: str, told: str | None = None) -> None:
    """Raise an error on all ranks of a team unless all of them are at the same place in the program.

    It is called wherever a vote was not unanimous: the ranks may then be in different calls, and would wait for each other.
    A place is a text such as "call of layer Conv number 3"; `told`, if given, says more of it in the error.

    Raises
    ------
    ValueError
        If the ranks are at different layers.
    RuntimeError
        If one of them is elsewhere, such as at the end of a backward.
    """
    if is_unanimous(team, vote_of(place)):
        return
    names, texts = zip(*team.world.gather_objects(team, (name, told or place)), strict=True)
    name, places = names[0], dict(zip(team, texts, strict=True))
    if all(other.startswith(_CALL) for other in places.values()):
        check_alike(_CALL, {rank: other.removeprefix(f"{_CALL} ") for rank, other in places.items()}, name)
    lines = "; ".join(f"rank {rank} is at {other}" for rank, other in places.items())
    raise RuntimeError(f"{name}: the ranks meet in different calls: {lines}")


def call_of(label: str, number: int) -> str:
    """The place of a rank that calls a layer."""
    return f"{_CALL} {label} number {number}"


def check_alike(what: str, values: Mapping[int, Any], name: str = "") -> None:
    """Raise ValueError, whose text begins with a name, unless all ranks have the same value; the minority is named."""
    found = list(values.values())
    if found.count(found[0]) == len(found):
        return
    usual = max(found, key=found.count)
    odd = [f"rank {rank}: {what} {value}" for rank, value in values.items() if value != usual]
    raise ValueError(f"{name and f'{name}: '}the ranks disagree: {', '.join(odd)}, others {usual}")


_PLAIN_ERRORS = (TypeError, ValueError, RuntimeError, NotImplementedError, IndexError, KeyError, AttributeError)


def raise_together(team: Team, error: Exception | None, name: str = "") -> None:
    """Raise on all ranks of the team if any of them has an error, with the same text, which begins with a name.

    The lowest rank's error goes first. One that is more than a text becomes a RuntimeError.
    """
    if not team.world.agree(team, int(error is not None)):
        return
    kind, text = next(found for found in team.world.gather_objects(team, as_raised(error, name)) if found is not None)
    # A refusal says all there is to say; the traceback of anything else may be of use.
    raise kind(text) from (None if isinstance(error, (TypeError, ValueError)) else error)


def same_arguments(team: Team, mine: Mapping[str, Any], name: str) -> None:
    """Raise ValueError on all ranks of a team, with a text that begins with a name, unless all pass the same arguments."""
    told = dict(zip(team, team.world.gather_objects(team, mine), strict=True))
    for what in mine:
        check_alike(what, {rank: one[what] for rank, one in told.items()}, name)


@contextmanager
def raised_together(team: Team, name: str) -> Iterator[None]:
    """Raise an error of the block on all ranks of a team, with the same text, which begins with a name.

    They come to it together, and in it communicate before anything may raise, or not at all.
    """
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    raise_together(team, error, name)


@contextmanager
def refused_together(P: Partition, name: str) -> Iterator[None]:
    """Raise an error of the block on all ranks of `P`, with the same text, which begins with a name.

    As `raised_together`; a rank outside is alone.
    """
    if P.active:
        with raised_together(P.team, name):
            yield
    else:
        yield


def as_raised(error: BaseException | None, name: str) -> tuple[type[Exception], str] | None:
    """The kind and the text with which all ranks raise an error of one of them; the text begins with a name."""
    if error is None:
        return None
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    kind = next((kind for kind in _PLAIN_ERRORS if kind is type(error)), RuntimeError)
    if kind is not type(error):
        text = f"{type(error).__name__}: {text}"
    return kind, text if text.startswith(name) else f"{name}: {text}"


@dataclass(frozen=True)
class TensorStructure:
    """One tensor argument, as a rank tells the others of it; ``kind`` names an argument that is no tensor."""

    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    device: str = ""
    requires_grad: bool = False
    kind: str = "Tensor"

    @staticmethod
    def of(value: Any) -> TensorStructure:
        if not isinstance(value, torch.Tensor):
            return TensorStructure(kind=type(value).__name__)
        if not is_plain(value):
            return TensorStructure(kind="a nested tensor" if value.is_nested else f"a tensor of {value.layout}")
        return TensorStructure(tuple(value.shape), value.dtype, value.device.type, value.requires_grad)

    @property
    def size(self) -> int:
        return 0 if self.kind != "Tensor" else torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Structure:
    """The tensor arguments of a layer's ranks, as each of them learns of them.

    Attributes
    ----------
    rank : int
        This rank.
    mine : tuple of TensorStructure
        What it passed.
    alike : tuple of TensorStructure
        What is the same on all ranks of the input's partition: dtype, device and whether any rank's requires grad. Empty
        where something differs.
    shapes : Mapping from world rank to tuple of int
        Of the first argument, where these are blocks over the input's partition.
    passed : Mapping from world rank to tuple of TensorStructure
        Everything, where something differs: each rank is then told all.
    """

    rank: int
    mine: tuple[TensorStructure, ...]
    alike: tuple[TensorStructure, ...] = ()
    shapes: Mapping[int, Shape] | None = None
    passed: Mapping[int, tuple[TensorStructure, ...]] | None = None

    def shapes_over(self, P: Partition) -> Mapping[int, Shape]:
        """The shapes of the first argument on the ranks of its partition, which is the first one of the layer's."""
        assert isinstance(self.shapes, BlockShapes)
        grid = P.grid_of_ranks.padded(self.shapes.grid.dim)
        if grid != self.shapes.grid:
            raise ValueError(
                f"the input lies over the layer's first partition, of shape {self.shapes.grid.shape}, not over {P}"
            )
        return self.shapes

    @property
    def is_empty(self) -> bool:
        """Whether the first argument has no elements on any rank."""
        if self.passed is not None:
            return not any(tensors[0].size for tensors in self.passed.values())
        return isinstance(self.shapes, BlockShapes) and 0 in map(sum, self.shapes.lengths)

    @property
    def requires_grad(self) -> bool:
        """Whether any tensor of any rank does."""
        told = self.alike if self.passed is None else [t for tensors in self.passed.values() for t in tensors]
        return any(tensor.requires_grad for tensor in told)


_MOST_ARGUMENTS = 4
_MORE_DIMS = 8  # of a tensor, before those that the partition has axes for
UNSET = -(2**62)
_DTYPES = list(dict.fromkeys(v for _, v in sorted(vars(torch).items()) if isinstance(v, torch.dtype)))
_KINDS = list(product(_DTYPES, ["cpu", "cuda", "meta", "mps", "xpu"]))


def exchanged(
    team: Team, P: Partition | None, is_cut: bool, input: Sequence[Any], same: Mapping[str, Any], name: str
) -> Structure:
    """Exchange what the team's ranks pass to a call; `same` must be the same on all of them.

    Where the first argument `is_cut` in blocks over `P`, and all else goes together, each rank learns lengths along the grid's
    axes; elsewhere it learns everything of every rank.

    Raises
    ------
    ValueError
        On all ranks, if `same` differs; the text begins with a name.
    """
    mine = tuple(map(TensorStructure.of, input))
    # How many lengths there are follows from the partition, which is among what must be the same.
    are_same = is_unanimous(team, vote_of(str(same)))
    found = _by_axis(team, P, mine) if is_cut and are_same else None
    if found is not None:
        return found
    passed = dict(zip(team, team.world.gather_objects(team, (mine, same)), strict=True))
    for what in same:
        check_alike(what, {rank: told[what] for rank, (_, told) in passed.items()}, name)
    return Structure(team.world.rank, mine, passed={rank: tensors for rank, (tensors, _) in passed.items()})


def _by_axis(team: Team, P: Partition | None, mine: tuple[TensorStructure, ...]) -> Structure | None:
    """The structure that the team's ranks agree on, by one maximum over O(sum of the grid's sides) numbers.

    The first argument is in blocks over `P`: its ranks with the same index along an axis have the same length there, and so
    each needs to learn one number for each index of each axis. A number and its negative show by their maxima whether all
    ranks have the same one.

    Returns
    -------
    Structure or None
        None on all ranks where that is not so, or something else differs.
    """
    is_usual = len(mine) <= _MOST_ARGUMENTS and all((t.dtype, t.device) in _KINDS for t in mine)
    numbers = [UNSET] * _MOST_ARGUMENTS
    lengths: list[list[int]] = []
    if P is not None:
        lengths = [[UNSET] * n for n in ((1,) * _MORE_DIMS + P.shape)]
        here = P.grid_of_ranks.index(team.world.rank)  # whatever has become of the partition
        if here is not None and is_usual and mine:
            numbers[: len(mine)] = [64 * _KINDS.index((t.dtype, t.device)) + len(t.shape) for t in mine]
            shape = mine[0].shape
            is_usual = 0 <= len(shape) - P.dim <= _MORE_DIMS
            index = (0,) * _MORE_DIMS + here
            for axis in range(1, len(shape) + 1) if is_usual else ():
                lengths[-axis][index[-axis]] = shape[-axis]
    numbers += [n for length in lengths for n in length]
    flags = [not is_usual, *(i < len(mine) and mine[i].requires_grad for i in range(_MOST_ARGUMENTS))]
    negatives = [n if n == UNSET else -n for n in numbers]
    found = team.world.maxima(team, [*flags, *numbers, *negatives])
    flags, values = found[: len(flags)], found[len(flags) :]
    values, negatives = values[: len(negatives)], values[len(negatives) :]
    if flags[0] or any(a != (b if b == UNSET else -b) for a, b in zip(values, negatives, strict=True)):
        return None
    codes = [divmod(code, 64) for code in values[:_MOST_ARGUMENTS] if code != UNSET]
    alike = tuple(
        TensorStructure((0,) * dims, *_KINDS[kind], bool(wanted))
        for (kind, dims), wanted in zip(codes, flags[1:], strict=False)
    )
    if P is None or not alike:
        return Structure(team.world.rank, mine, alike)
    dims = len(alike[0].shape)
    grid = P.grid_of_ranks.padded(dims)
    rest = iter(values[_MOST_ARGUMENTS:])
    by_axis = [[next(rest) for _ in length] for length in lengths][-dims:] if dims else []
    return Structure(team.world.rank, mine, alike, BlockShapes(grid, tuple(map(tuple, by_axis))))


def parts_of_call(
    module: torch.nn.Module, number: int, rank: int, input: Sequence[Any], kwargs: Mapping[str, Any] | None
) -> list[Any]:
    """The parts of this rank's share of the structure of a module's call.

    Every call of a layer asks for it; where the caches are cold, each name that is looked up takes 0.5 us.
    """
    casts = any_autocast_is_enabled() and autocast()
    parts: list[Any] = [rank, number, torch.is_grad_enabled(), casts, transforms_are_active()]
    for value in input:
        if isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_nested:
            parts += (value.shape, value.dtype, value.device, value.requires_grad)
        else:
            parts.append(hashable(value))
    if kwargs:
        parts.append(hashable(kwargs))
    for inner in module.modules() if module._modules else (module,):
        parts += (id(inner), inner.training)  # another one in its place may do something else
        parts += [inner.__dict__.get(option) for option in getattr(type(inner), "_distdl_free", ())]
        for p in inner._parameters.values():
            parts += (None,) if p is None else (p.shape, p.dtype, p.requires_grad)
        for b in inner._buffers.values():
            parts += (None,) if b is None else (b.shape, b.dtype)
    return parts


def hashed(parts: list[Any]) -> int:
    """A hash of 64 bits, this rank's own: that of a string is another in each process.

    A tuple's hash is nearly a sum of its items' hashes: of two ranks that swap shapes the sum would often stay the same.
    """
    return hash(hash(tuple(parts)).to_bytes(8, "little", signed=True)) % 2**64


def hashable(value: Any) -> Any:
    """A value's part in the structure: tensors by structure, plain values by value, anything else by type."""
    if isinstance(value, torch.Tensor):
        return (value.shape if is_plain(value) else None), value.dtype, value.device, value.requires_grad
    if isinstance(value, (bool, int, float, complex)):
        return type(value), repr(value)  # 1, 1.0 and True are equal, and -1 and -2 have one hash
    if isinstance(value, (str, bytes, torch.dtype, torch.device, type(None))):
        return value
    if isinstance(value, Mapping):
        return tuple((key, hashable(item)) for key, item in value.items())
    if isinstance(value, Sequence):
        return tuple(map(hashable, value))
    return type(value)


AUTOCAST_KINDS = "cpu", "cuda"


def autocast() -> tuple[Any, ...]:
    """The dtypes that autocast is on with, False where it is off, by kind of device."""
    return tuple(torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) for kind in AUTOCAST_KINDS)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a dense block of numbers."""
    return tensor.layout is torch.strided and not tensor.is_nested
