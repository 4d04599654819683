"""Saving: what ranks hold of a program is told, and each box written once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from distdl_lite.agreement import check_alike, raised_together, same_arguments
from distdl_lite.checkpoint.files import box_of, within
from distdl_lite.checkpoint.plain import encoded
from distdl_lite.checkpoint.state import Part, Program, generators, merged, state_of_optimizer
from distdl_lite.checkpoint.writing import Held, Piece, Saving, boxes_to_write
from distdl_lite.layout import Box
from distdl_lite.model.replicas import checksum
from distdl_lite.partition import partition_of
from distdl_lite.transport import Team


def save(
    path: str | os.PathLike[str],
    *,
    model: Any = None,
    optimizer: Any = None,
    scheduler: Any = None,
    scaler: Any = None,
    data: Any = None,
    extra: Any = None,
    P: Any = None,
    keep: int | None = None,
    wait: bool = True,
) -> Saving:
    """Write a checkpoint that `load` reads on any grid and any number of ranks.

    Parameters
    ----------
    path : path
        Of a directory that all ranks see, which must not exist. It is written under another name beside it, and stands under
        its own when it is complete.
    model : torch.nn.Module
        Its tensors are kept under the names of the serial model's ``state_dict()``.
    optimizer : torch.optim.Optimizer, DataParallelOptimizer or LocalSGD
        Of parameters of the model. `LocalSGD` and `DASO` make the weights of all ranks equal first, if they are not.
    scheduler, scaler, data
        With a ``state_dict()`` of numbers, texts, lists and dicts, the same on all ranks: a scheduler of torch, a GradScaler, a
        loader of `distdl_lite.data`. Of these, the model and the optimizer a dict gives several, by name.
    extra
        Numbers, texts, None, and lists, tuples and dicts of such, the same on all ranks.
    P : Partition or communicator, optional
        The ranks that call this together, those of the model among them. None is the ambient world.
    keep : int, optional
        How many checkpoints beside this one, whose names differ from its in numbers alone, to leave, this one counted: when
        it is complete the oldest others are removed.
    wait : bool
        Whether to return when the checkpoint is complete. Else tensors are copied, and written while the program goes on;
        the next `save` waits for it, and raises its error; the end of the program waits, too.

    Returns
    -------
    Saving
        Its ``wait()`` returns when the checkpoint is complete.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        On all ranks with the same text, which names a rank and a file: if ranks pass different things, if something cannot be
        kept, if the directory exists or cannot be written. Earlier checkpoints then stay as they are.

    Notes
    -----
    A block that several ranks hold is written once; where its values differ between them, as those of buffers may, the first
    rank's are. Torch's generators are kept for each rank.

    Examples
    --------
    >>> import tempfile
    >>> import torch
    >>> from distdl_lite import load, nn, read_checkpoint, save
    >>> from distdl_lite.testing import spmd
    >>> folder = tempfile.TemporaryDirectory()
    >>> def net(world):
    ...     P = world.grid((1, 1, world.size))
    ...     return nn.DistributedConv1d(P, 4, 6, 3)
    >>> def saved(world):
    ...     save(f"{folder.name}/step_1", model=net(world), extra={"step": 1})
    >>> _ = spmd(2, saved)
    >>> spmd(3, lambda world: load(f"{folder.name}/step_1", model=net(world)).extra["step"])
    [1, 1, 1]
    >>> sorted(read_checkpoint(f"{folder.name}/step_1"))
    ['model.bias', 'model.weight']
    >>> folder.cleanup()
    """
    team = partition_of(P).team
    transport, rank = team.world, team.world.rank
    if rank not in team:
        raise ValueError(f"save: rank {rank} is outside ranks {list(team)}, which are to call it")
    pending: dict[Team, Saving] = transport.local.setdefault("saving", {})
    if team in pending:
        pending.pop(team).wait()
    with raised_together(team, "save"):
        arguments = {"path": os.fspath(path), "keep": _checked(keep), "wait": bool(wait)}
        program = Program.of(model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler, data=data)
        arguments["things to save"] = program.names
    same_arguments(team, arguments, "save")
    with raised_together(team, "save"):
        mine = _Kept(team, program, extra)
    told = dict(zip(team, transport.gather_objects(team, mine.told), strict=True))
    index = _index(told)
    with raised_together(team, "save"):
        pieces = mine.pieces(rank, told, not wait)
    saving = pending[team] = Saving(Path(path).absolute(), team, pieces, index, keep, wait)
    if wait:
        saving.wait()
    return saving


def _checked(keep: Any) -> Any:
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
        raise ValueError(f"keep={keep!r} is no number of checkpoints, 1 or more")
    return keep


@dataclass
class _Told:
    """What a rank tells the others of what it saves."""

    held: dict[str, Held] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)  # a tensor's other names, each with the first
    plain: dict[str, Any] = field(default_factory=dict)  # for JSON
    generator: int = 0  # a hash of its state


def _index(told: Mapping[int, _Told]) -> dict[str, Any]:
    """The index but for the pieces. Raises if the ranks disagree."""
    kinds = {name: held for one in reversed(told.values()) for name, held in one.held.items()}
    for name in kinds:
        found = {rank: one.held[name] for rank, one in told.items() if name in one.held}
        check_alike(f"shape and dtype of {name}", {rank: (h.shape, h.dtype) for rank, h in found.items()}, "save")
    return {
        "tensors": {name: held.without_pieces() for name, held in kinds.items()},
        "tied": {name: first for one in told.values() for name, first in one.tied.items()},
        "objects": merged({rank: one.plain for rank, one in told.items()})
        | {"random": len({one.generator for one in told.values()}) == 1},
    }


class _Kept:
    """What a rank saves. Raises if something cannot be."""

    def __init__(self, team: Team, program: Program, extra: Any) -> None:
        self.told = _Told()
        self.parts: dict[str, Part] = {}
        self.own: dict[str, torch.Tensor] = {}  # what no other rank has a part of
        own: dict[str, Any] = {"random": generators()}
        for name, optimizer in program.averaging:  # in which ranks communicate, before anything may raise
            optimizer.make_equal()
            own[name] = optimizer.state_dict()
        parts, plain = program.parts(team), self.told.plain
        for name, optimizer in program.optimizers:
            states, numbers = state_of_optimizer(name, optimizer, parts)
            parts += states
            plain |= numbers
        plain |= {name: encoded(state, name) for name, thing in program.others if (state := thing.state_dict())}
        place = f"rank.{team.index(team.world.rank)}"
        plain |= {"extra": encoded(extra, "extra"), place: encoded(own, place, self.own)}
        self.told.generator = checksum(own["random"]["cpu"])
        self._add(parts)

    def _add(self, parts: Sequence[Part]) -> None:
        first: dict[int, str] = {}
        for part in parts:
            name = first.setdefault(id(part.tensor), part.name)
            if name == part.name:
                values = checksum(part.tensor) if part.may_be_elsewhere and part.box is not None else 0
                self.parts[name] = part
                self.told.held[name] = Held(part.shape, part.tensor.dtype, part.box, part.line, values)
            else:
                self.told.tied[part.name] = name

    def pieces(self, rank: int, told: Mapping[int, _Told], copied: bool) -> list[Piece]:
        """What this rank writes."""
        chosen = boxes_to_write(rank, {other: one.held for other, one in told.items()})
        pieces = [_piece(self.parts[name], box) for name, box in chosen]
        pieces += [Piece(name, tuple(x.shape), box_of(x.shape), x) for name, x in self.own.items()]
        return [replace(piece, values=piece.values.to("cpu", copy=copied).contiguous()) for piece in pieces]


def _piece(part: Part, box: Box) -> Piece:
    assert part.box is not None
    values = part.tensor.detach().resolve_conj().resolve_neg()
    return Piece(part.name, part.shape, box, values[within(box, part.box)])
