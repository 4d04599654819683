"""Checkpoints as one process reads them: a directory of blocks with an index, one safetensors file, or a dict of tensors."""

from __future__ import annotations

import json
import math
import mmap
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open

from distdl_lite.layout import Box, Shape, shape_of

FORMAT, VERSION, INDEX = "distdl_lite checkpoint", 1, "index.json"


def box_of(shape: Sequence[int]) -> Box:
    """The box of a whole tensor."""
    return tuple((0, n) for n in shape)


def within(box: Box, start: Box) -> tuple[slice, ...]:
    """The slices of a box in the tensor of a box that holds it."""
    return tuple(slice(a - low, b - low) for (a, b), (low, _) in zip(box, start, strict=True))


def common(a: Box, b: Box) -> Box | None:
    """The points of two boxes, None if they share none."""
    both = tuple((max(p, r), min(q, s)) for (p, q), (r, s) in zip(a, b, strict=True))
    return both if all(low < high for low, high in both) else None


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint.

    Attributes
    ----------
    shape, dtype : tuple of int, torch.dtype
        Of the whole tensor.
    pieces : sequence of (box, file, name)
        Disjoint boxes that cover it, each the tensor of that name in a file.
    """

    shape: Shape
    dtype: torch.dtype
    pieces: Sequence[tuple[Box, str, str]] = ()


class Checkpoint(Mapping[str, torch.Tensor]):
    """Whole tensors by name, each read when it is asked for; made by `read_checkpoint`.

    Attributes
    ----------
    path : Path
    tensors : dict of Stored
        Shapes, dtypes and places, without reading anything.
    objects : dict
        What is kept beside tensors, as JSON.
    ranks : int
        That have saved it; 0 for a single file.
    contents : str
        The same on all ranks that read the same.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> checkpoint = dl.read_checkpoint(torch.nn.Linear(3, 2).state_dict())
    >>> {name: tuple(checkpoint[name].shape) for name in sorted(checkpoint)}
    {'bias': (2,), 'weight': (2, 3)}
    """

    path: Path | None = None
    ranks = 0
    kind = ""  # before the names of the model's tensors
    own: Checkpoint  # what was each rank's own

    def __init__(self, tensors: dict[str, Stored], objects: dict[str, Any] | None = None) -> None:
        self.tensors, self.objects = tensors, objects or {}
        self.files: dict[str, dict[str, Any]] = {}
        self.contents = str([(name, t.shape, t.dtype) for name, t in tensors.items()])
        self._open: dict[str, Any] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        stored = self.tensors[name]
        whole = torch.empty(stored.shape, dtype=stored.dtype)
        self.read(name, box_of(stored.shape), whole)
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def read(self, name: str, box: Box, into: torch.Tensor) -> None:
        """Copy a box of a tensor into another of its shape, on any device and of any dtype; only the box is read."""
        for piece, file, key in self.tensors[name].pieces:
            both = common(piece, box)
            if both is not None:
                into[within(both, box)].copy_(self._slice(file, key, within(both, piece), self.tensors[name].dtype))

    def of_model(self) -> Checkpoint:
        """The model's tensors alone, under the names of its ``state_dict()``."""
        kind = self.kind
        made = Checkpoint({name.removeprefix(kind): t for name, t in self.tensors.items() if name.startswith(kind)})
        made.path = self.path
        return made

    def _slice(self, file: str, key: str, where: tuple[slice, ...], dtype: torch.dtype) -> torch.Tensor:
        assert self.path is not None
        path = self.path / file if file else self.path
        try:
            if file not in self._open:
                self._open[file] = safe_open(path, "pt")
            part = self._open[file].get_slice(key)[where] if where else self._open[file].get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: {error}") from error
        return torch.view_as_complex(part) if dtype is torch.complex128 else part

    def __repr__(self) -> str:
        size = sum(math.prod(t.shape) * t.dtype.itemsize for t in self.tensors.values())
        saved = f", saved by {self.ranks} ranks" if self.ranks else ""
        return f"<checkpoint {self.path or 'in memory'}: {len(self)} tensors, {size:,} bytes{saved}>"


class InMemory(Checkpoint):
    """A serial ``state_dict()`` as a checkpoint."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self._state = {name: t.detach() for name, t in state.items() if isinstance(t, torch.Tensor)}
        super().__init__({name: Stored(tuple(t.shape), t.dtype) for name, t in self._state.items()})

    def read(self, name: str, box: Box, into: torch.Tensor) -> None:
        into.copy_(self._state[name][tuple(slice(*r) for r in box)])


def read_checkpoint(source: str | os.PathLike[str] | Mapping[str, Any]) -> Checkpoint:
    """A checkpoint as a lazy mapping of whole tensors; one process reads it, whatever number of ranks has saved it.

    Parameters
    ----------
    source : path or mapping
        A directory that `save` has written, where names begin with "model." or "optimizer.state."; a safetensors file of a
        whole model; or a serial ``state_dict()``.

    Returns
    -------
    Checkpoint

    Raises
    ------
    ValueError
        If it is none of these, or a file of it is missing or torn.

    Examples
    --------
    >>> import tempfile, torch
    >>> import distdl_lite as dl
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = dl.testing.spmd(1, lambda world: dl.save(f"{folder}/one", model=torch.nn.Linear(3, 2)))
    ...     sorted(dl.read_checkpoint(f"{folder}/one"))
    ['model.bias', 'model.weight']
    """
    if isinstance(source, Mapping):
        return InMemory(source)
    if source is None:
        raise ValueError("there is no checkpoint: None is what latest_checkpoint returns of a folder without one")
    path = Path(source)
    if path.is_dir():
        return _of_directory(path)
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()
            found = {name: (tuple(file.get_slice(name).get_shape()), _dtype(file, name)) for name in names}
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} is no checkpoint directory and no safetensors file: {error}; of other files pass the state_dict"
        ) from error
    made = Checkpoint({name: Stored(*kind, [(box_of(kind[0]), "", name)]) for name, kind in found.items()})
    made.path = path
    return made


def _dtype(file: Any, name: str) -> torch.dtype:
    part = file.get_slice(name)
    return (part[:0] if part.get_shape() else file.get_tensor(name)).dtype  # type: ignore[no-any-return]


def _of_directory(path: Path) -> Checkpoint:
    try:
        text = (path / INDEX).read_text()
        index = json.loads(text)
    except (OSError, ValueError) as error:
        inside = [str(found) for _, found in _newest_first(path)]
        hint = f"; but these are: {', '.join(inside)}" if inside else ""
        raise ValueError(f"{path} is no checkpoint: its {INDEX} cannot be read: {error}{hint}") from error
    if not isinstance(index, dict) or (index.get("format"), index.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"{path / INDEX} is not of a {FORMAT} of version {VERSION}")
    for name, file in index["files"].items():
        size = (path / name).stat().st_size if (path / name).is_file() else None
        if size != file["bytes"]:
            has = "is missing" if size is None else f"has {size} bytes"
            raise ValueError(f"{path / name} {has}, the checkpoint's index says {file['bytes']} bytes")
    tensors = tensors_of(index["tensors"])
    tensors |= {name: tensors[first] for name, first in index["tied"].items()}
    own = {name: tensors.pop(name) for name in list(tensors) if name.startswith("rank.")}
    made = Checkpoint(tensors, index["objects"])
    made.own = Checkpoint(own)
    made.path = made.own.path = path
    made.files, made.ranks, made.kind = index["files"], index["ranks"], "model."
    made.contents = text
    return made


def tensors_of(told: Mapping[str, Any]) -> dict[str, Stored]:
    """The tensors of an index."""
    return {
        name: Stored(
            tuple(one["shape"]),
            getattr(torch, one["dtype"]),
            [(tuple((low, high) for low, high in box), file, name) for box, file in one["pieces"]],
        )
        for name, one in told.items()
    }


def hash_of(path: Path) -> str:
    """The XXH3 hash of a file, of 128 bits: a tenth of the time that SHA-256 takes, which for a GiB is that of writing it."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return xxhash.xxh3_128_hexdigest(content)


def faults(path: str | os.PathLike[str]) -> list[str]:
    """What is wrong with a checkpoint: files that are missing, torn or changed, boxes that do not cover their tensors."""
    try:
        made = read_checkpoint(path)
    except ValueError as error:
        return [str(error)]
    texts = [
        f"{made.path}/{name} has changed"
        for name, f in made.files.items()
        if hash_of(Path(path) / name) != f["xxh3_128"]
    ]
    return texts + uncovered(made.tensors | made.own.tensors)


def uncovered(tensors: Mapping[str, Stored]) -> list[str]:
    """The tensors whose pieces, which share no points, do not cover them."""
    points = {name: sum(math.prod(shape_of(box)) for box, _, _ in stored.pieces) for name, stored in tensors.items()}
    return [
        f"{name} of shape {stored.shape}: {points[name]} of {math.prod(stored.shape)} points are there"
        for name, stored in tensors.items()
        if points[name] != math.prod(stored.shape)
    ]


def latest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The complete checkpoint in a folder that was written last, whatever its number; None if there is none.

    Parameters
    ----------
    folder : path
        In which `save` has written checkpoints, each a folder of its own.

    Examples
    --------
    >>> latest_checkpoint("/no/such/folder") is None
    True
    """
    return next((path for _, path in _newest_first(Path(folder))), None)


def _newest_first(folder: Path) -> list[tuple[float, Path]]:
    found = []
    for index in folder.glob(f"*/{INDEX}") if folder.is_dir() else ():
        with suppress(OSError, ValueError, TypeError, KeyError):  # of others, or being removed
            told = json.loads(index.read_text())
            if told["format"] == FORMAT and index.parent.name[0] != ".":
                found.append((float(told["saved"]), index.parent))
    return sorted(found, reverse=True)


def alike(path: Path) -> list[tuple[float, Path]]:
    """The other checkpoints beside one whose names differ in numbers alone, newest first, with the time of each."""
    pattern = re.sub(r"\d+", "#", path.name)
    return [
        (saved, p) for saved, p in _newest_first(path.parent) if p != path and re.sub(r"\d+", "#", p.name) == pattern
    ]
