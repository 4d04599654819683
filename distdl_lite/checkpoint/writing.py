"""Who writes which boxes, and a directory that stands under its name when it is complete."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from threading import Event, get_native_id
from typing import Any
from uuid import uuid4

import torch
from safetensors.torch import save_file

from distdl_lite.agreement import raise_together, raised_together
from distdl_lite.checkpoint.files import FORMAT, INDEX, VERSION, alike, hash_of, tensors_of, uncovered
from distdl_lite.grid import balanced
from distdl_lite.layout import Box, Shape, shape_of
from distdl_lite.transport import Team

_SHARED_FROM = 2**16  # bytes for each of several ranks that hold the same box: they write a part each
_PATIENCE = 600.0  # seconds in which no rank writes anything, after which the first one gives up


@dataclass(frozen=True)
class Held:
    """What a rank tells of its box of a tensor."""

    shape: Shape
    dtype: torch.dtype
    box: Box | None  # None also where it has no elements
    line: int  # the first rank of those that hold the whole tensor together
    values: int  # a hash of them where others may hold the same

    def without_pieces(self) -> dict[str, Any]:
        return {"shape": self.shape, "dtype": _word(self.dtype), "pieces": []}


def boxes_to_write(rank: int, told: Mapping[int, Mapping[str, Held]]) -> Iterator[tuple[str, Box]]:
    """The boxes that a rank writes: its own ones, or its share where others hold the same with the same values."""
    line: dict[str, int] = {}
    holders: dict[tuple[str, Box], list[tuple[int, Held]]] = {}
    for other, tensors in told.items():
        for name, held in tensors.items():
            if held.box is not None:
                line.setdefault(name, held.line)
                holders.setdefault((name, held.box), []).append((other, held))
    for number, ((name, box), among) in enumerate(holders.items()):
        first = next((held for _, held in among if held.line == line[name]), None)
        # Of lines that do not know of each other nothing says that they hold the same: there the first alone writes.
        ranks = [
            other
            for other, held in among
            if first is not None and held.values == first.values and (held.values or held.line == first.line)
        ]
        if first is not None and rank in ranks:
            yield from ((name, part) for part in _share(box, first.dtype, ranks.index(rank), len(ranks), number))


def _share(box: Box, dtype: torch.dtype, position: int, count: int, number: int) -> Iterator[Box]:
    """The part that one of several ranks writes of a box; all of a small one is written by one of them."""
    shape = shape_of(box)
    if math.prod(shape) * dtype.itemsize < count * _SHARED_FROM:
        if position == number % count:
            yield box
        return
    dim = max(range(len(shape)), key=shape.__getitem__)
    low, high = (box[dim][0] + cut for cut in balanced(shape[dim], count)[position : position + 2])
    if low < high:
        yield (*box[:dim], (low, high), *box[dim + 1 :])


@dataclass(frozen=True)
class Piece:
    """A box of a tensor that this rank writes."""

    name: str
    shape: Shape  # of the whole tensor
    box: Box
    values: torch.Tensor

    def told(self) -> dict[str, Any]:
        return {"name": self.name, "shape": self.shape, "dtype": _word(self.values.dtype), "box": self.box}


class Saving:
    """A checkpoint that is being written; made by `save`.

    Attributes
    ----------
    path : Path
        Where it stands when it is complete.

    Examples
    --------
    >>> import tempfile, torch
    >>> import distdl_lite as dl
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     def body(world):
    ...         saving = dl.save(f"{folder}/one", model=torch.nn.Linear(3, 2), wait=False)
    ...         saving.wait()
    ...         return saving.path.name
    ...     dl.testing.spmd(2, body)
    ['one', 'one']
    """

    def __init__(
        self,
        path: Path,
        team: Team,
        pieces: Sequence[Piece],
        index: Mapping[str, Any],
        keep: int | None,
        is_urgent: bool,
    ) -> None:
        self.path, self._team, self._pieces, self._index, self._keep = path, team, pieces, index, keep
        self._is_urgent = is_urgent
        self._position = team.index(team.world.rank)
        self._has_failed, self._error = Event(), None
        self._is_waited_for = False
        self._folder = self._made_folder()
        threads = ThreadPoolExecutor(1, "distdl_lite checkpoint", initializer=None if is_urgent else _give_way)
        work = (self._write, self._complete) if self._position == 0 else (self._write,)
        self._work: list[Future[None]] = [threads.submit(part) for part in work]
        threads.shutdown(wait=False)

    def wait(self) -> None:
        """Return when the checkpoint is complete; all ranks call this together.

        Raises
        ------
        RuntimeError
            On all ranks, if one could not write; the text names it and the file.
        """
        if not self._is_waited_for:
            self._is_waited_for = True
            try:
                for step in range(2):
                    raise_together(self._team, self._work[step].exception() if step < len(self._work) else None, "save")
            except Exception as error:
                self._error = error
                self._has_failed.set()
                wait(self._work)  # until what was written is gone
        if self._error is not None:
            raise self._error

    @property
    def is_done(self) -> bool:
        """Whether this rank has nothing more to do for it; others may have."""
        return all(work.done() for work in self._work)

    def _made_folder(self) -> Path:
        """The folder to write in, which the first rank makes; its name is of this call alone."""
        with raised_together(self._team, "save"):
            made = self._new_folder() if self._position == 0 else None
        folder: Path = self._team.world.gather_objects(self._team, made)[0]
        with raised_together(self._team, "save"):
            if not folder.is_dir():
                rank, first = self._team.world.rank, self._team[0]
                raise RuntimeError(f"rank {rank} does not see {folder}, which rank {first} has made")
        return folder

    def _new_folder(self) -> Path:
        name, parent = self.path.name, self.path.parent
        folder = self.path.with_name(f".{name}.{uuid4().hex[:8]}.partial")
        try:
            if self.path.exists():
                raise ValueError(f"{self.path} exists already")
            for left in parent.glob(f".{escape(name)}.*.partial"):  # by a job that has ended in the middle
                shutil.rmtree(left)
            folder.mkdir(parents=True)
        except OSError as error:
            raise RuntimeError(f"rank {self._team[0]} cannot make {folder}: {error}") from error
        return folder

    def _write(self) -> None:
        """Write this rank's file, then what is in it."""
        path = self._folder / f"{self._position}.safetensors"
        told: dict[str, Any] = {"pieces": [piece.told() for piece in self._pieces], "files": {}}
        try:
            if self._pieces:
                save_file(_unshared(self._pieces), path)
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
                told["files"][path.name] = {"bytes": path.stat().st_size, "xxh3_128": hash_of(path)}
            _write_json(self._folder / f"{self._position}.json", told)
        except Exception as error:
            with suppress(OSError):
                (self._folder / f"{self._position}.failed").touch()
            raise self._told(f"rank {self._team.world.rank} cannot write {path}: {error}") from error
        finally:
            self._pieces = ()

    def _complete(self) -> None:
        """Put the index together when all ranks have written, give the directory its name, and remove old ones."""
        try:
            tensors, files = dict(self._index["tensors"]), {}
            for position, told in enumerate(self._parts()):
                files |= told["files"]
                for piece in told["pieces"]:
                    tensor = tensors.setdefault(
                        piece["name"], {"shape": piece["shape"], "dtype": piece["dtype"], "pieces": []}
                    )
                    tensor["pieces"].append([piece["box"], f"{position}.safetensors"])
            if missing := uncovered(tensors_of(tensors)):
                raise RuntimeError("; ".join(missing))
            # Later than others, also where these were saved by a clock that is ahead.
            saved = max([time.time(), *(saved + 1e-3 for saved, _ in alike(self.path))])
            head = {"format": FORMAT, "version": VERSION, "saved": saved, "ranks": self._team.size}
            _write_json(self._folder / INDEX, {**head, **self._index, "tensors": tensors, "files": files})
            _flush_folder(self._folder)
            self._folder.rename(self.path)
            _flush_folder(self.path.parent)
        except BaseException as error:
            _remove(self._folder)
            raise self._told(f"rank {self._team[0]} cannot complete {self.path}: {error}") from error
        with suppress(FileNotFoundError):  # somebody else removes them
            for _, old in alike(self.path)[self._keep - 1 :] if self._keep else ():
                old.rename(old.with_name(f".{old.name}.{time.time_ns()}.removed"))
        for gone in self.path.parent.glob(".*.removed"):  # also of a job that was killed meanwhile
            shutil.rmtree(gone, ignore_errors=True)

    def _told(self, text: str) -> RuntimeError:
        """An error, printed where it may be that nobody waits for it."""
        if not self._is_urgent:
            print(f"distdl_lite.save: {text}", file=sys.stderr)
        return RuntimeError(text)

    def _parts(self) -> Iterator[dict[str, Any]]:
        """What each rank has written, which is waited for while any of them writes."""
        size, since = -1, time.monotonic()
        for position in range(self._team.size):
            path = self._folder / f"{position}.json"
            while not path.is_file():
                if self._has_failed.wait(0.01) or path.with_suffix(".failed").exists():
                    raise RuntimeError("another rank has failed")
                if time.monotonic() - since > _PATIENCE:
                    if (now := _bytes_in(self._folder)) == size:
                        raise RuntimeError(f"rank {self._team[position]} has written nothing for {_PATIENCE:.0f} s")
                    size, since = now, time.monotonic()
            yield json.loads(path.read_text())
            path.unlink()


def _remove(folder: Path) -> None:
    """Remove a folder in which another rank may make a file in this moment, whose next one then fails."""
    for _ in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.01)


def _bytes_in(folder: Path) -> int:
    with suppress(FileNotFoundError):  # of a file that gets its name in this moment
        return sum(file.stat().st_size for file in folder.iterdir())
    return -1


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _give_way() -> None:
    """Let the program's own threads go first."""
    if sys.platform == "linux":  # where it is of a thread
        os.setpriority(os.PRIO_PROCESS, get_native_id(), 19)


def _unshared(pieces: Sequence[Piece]) -> dict[str, torch.Tensor]:
    """The pieces by name, in memory of their own, as files cannot hold others."""
    tensors: dict[str, torch.Tensor] = {}
    taken = 0  # up to this address
    for piece in sorted(pieces, key=lambda piece: piece.values.data_ptr()):
        values = piece.values.clone() if piece.values.data_ptr() < taken else piece.values
        taken = max(taken, piece.values.data_ptr() + piece.values.nbytes)
        tensors[piece.name] = torch.view_as_real(values) if values.dtype is torch.complex128 else values
    return tensors


def _write_json(path: Path, value: Any) -> None:
    """Write a file that is complete where it stands."""
    partial = path.with_suffix(".partial")
    with partial.open("w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def _flush_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
