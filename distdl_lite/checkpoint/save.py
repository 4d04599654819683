"""Saving: what ranks hold of a program is told, and each box written once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from distdl_lite.agreement import check_alike, raise_together
from distdl_lite.checkpoint.files import box_of, within
from distdl_lite.checkpoint.plain import encoded
from distdl_lite.checkpoint.state import Part, generators, merged, named, parts_of_model, state_of_optimizer
from distdl_lite.checkpoint.writing import Held, Piece, Saving, boxes_to_write
from distdl_lite.layout import Box
from distdl_lite.model.replicas import checksum
from distdl_lite.optim.local_sgd import LocalSGD
from distdl_lite.partition import partition_of


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
        sampler or loader of `distdl_lite.data`. Of these, the model and the optimizer a dict gives several, by name.
    extra
        Numbers, texts, None, and lists, tuples and dicts of such, the same on all ranks.
    P : Partition or communicator, optional
        The ranks that call this together, those of the model among them. None is the ambient world.
    keep : int, optional
        How many checkpoints beside this one, whose names differ from its in numbers alone, to leave, this one counted: when
        it is complete the oldest others are removed.
    wait : bool
        Whether to return when the checkpoint is complete. Else tensors are copied, and written while the program goes on;
        the next `save` waits for it, and so does the end of the program.

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
    if pending := transport.local.pop("saving", None):
        pending.wait()
    mine, error = _Kept(), None
    try:
        mine = _Kept.of(rank, model, optimizer, {"scheduler": scheduler, "scaler": scaler, "data": data}, extra)
        mine.arguments = {"path": os.fspath(path), "keep": _checked(keep), "wait": bool(wait), "tied": mine.tied}
    except Exception as raised:
        error = raised
    raise_together(team, error, "save")
    generator = checksum(mine.own[f"rank.{rank}.random.cpu"])
    told = dict(
        zip(team, transport.gather_objects(team, (mine.arguments, mine.held, mine.plain, generator)), strict=True)
    )
    for what in mine.arguments:
        check_alike(what, {other: arguments[what] for other, (arguments, *_) in told.items()}, "save")
    held = {other: tensors for other, (_, tensors, *_) in told.items()}
    pieces = [mine.piece(name, box, not wait) for name, box in boxes_to_write(rank, held)]
    pieces += [Piece(name, tuple(x.shape), box_of(x.shape), x.cpu()) for name, x in mine.own.items()]
    is_alike = len({checked for *_, checked in told.values()}) == 1
    empty = {name: one for tensors in held.values() for name, one in tensors.items() if 0 in one.shape}
    index = {
        "objects": merged({other: plain for other, (_, _, plain, _) in told.items()}) | {"random": is_alike},
        "tied": mine.tied,
        "tensors": {name: one.empty() for name, one in empty.items()},
    }
    saving = Saving(Path(path), team, pieces, index, keep, wait)
    transport.local["saving"] = saving
    if wait:
        saving.wait()
    return saving


def _checked(keep: Any) -> Any:
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
        raise ValueError(f"keep={keep!r} is no number of checkpoints, 1 or more")
    return keep


@dataclass
class _Kept:
    """What this rank has to save."""

    parts: dict[str, Part] = field(default_factory=dict)
    held: dict[str, Held] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)  # a tensor's other names, each with the first
    plain: dict[str, Any] = field(default_factory=dict)  # for JSON
    own: dict[str, torch.Tensor] = field(default_factory=dict)  # of this rank alone
    arguments: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(rank: int, model: Any, optimizer: Any, others: Mapping[str, Any], extra: Any) -> _Kept:
        optimizers = dict(named("optimizer", optimizer))
        averaged = {name: one for name, one in optimizers.items() if isinstance(one, LocalSGD)}
        for one in averaged.values():
            one.make_equal()
        kept = _Kept(plain={"extra": encoded(extra, "extra")})
        parts = [part for name, module in named("model", model) for part in parts_of_model(name, module)]
        for name, one in optimizers.items():
            if name not in averaged:
                states, plain = state_of_optimizer(name, one, parts)
                kept.plain |= plain
                kept._add(states)
        kept._add(parts)
        for kind, things in others.items():
            kept.plain |= {name: encoded(thing.state_dict(), name) for name, thing in named(kind, things)}
        own = {name: one.state_dict() for name, one in averaged.items()} | {"random": generators()}
        kept.plain[f"rank.{rank}"] = encoded(own, f"rank.{rank}", kept.own)
        return kept

    def _add(self, parts: Sequence[Part]) -> None:
        first: dict[int, str] = {}
        for part in parts:
            name = first.setdefault(id(part.tensor), part.name)
            if name != part.name:
                self.tied[part.name] = name
                continue
            box = part.box if part.tensor.numel() else None
            values = checksum(part.tensor) if part.may_be_elsewhere else 0
            self.parts[name] = part
            self.held[name] = Held(part.shape, part.tensor.dtype, box, part.line, values)

    def piece(self, name: str, box: Box, copied: bool) -> Piece:
        part = self.parts[name]
        assert part.box is not None
        values = part.tensor.detach().resolve_conj().resolve_neg()[within(box, part.box)]
        return Piece(name, part.shape, box, values.to("cpu", copy=copied).contiguous())
