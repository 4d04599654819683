"""Loading: each rank reads the boxes it holds now, whatever the grid that has saved them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import count
from typing import Any

import torch

from distdl_lite.agreement import raised_together, same_arguments, vote_of
from distdl_lite.checkpoint.files import Checkpoint, read_checkpoint
from distdl_lite.checkpoint.plain import decoded
from distdl_lite.checkpoint.state import Part, Program, groups_of, serial_name, set_generators
from distdl_lite.factors import feature_axes
from distdl_lite.model.distributed import Distributed
from distdl_lite.optim.local_sgd import LocalSGD
from distdl_lite.partition import partition_of
from distdl_lite.transport import Team

Rename = Mapping[str, str] | Callable[[str], str]


@dataclass(frozen=True)
class Loaded:
    """What `load` returns, the same on all ranks.

    Attributes
    ----------
    extra
        What `save` was given.
    missing, unexpected : tuple of str
        The model's tensors that the checkpoint has not, and the other way round; empty where `strict`.
    notes : tuple of str
        What could not go on as it was, also given as warnings.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> state = {"weight": torch.ones(2, 3)}
    >>> loaded = dl.testing.spmd(1, lambda world: dl.load(state, model=torch.nn.Linear(3, 2), strict=False))[0]
    >>> loaded.missing
    ('bias',)
    """

    extra: Any = None
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def load(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    model: Any = None,
    optimizer: Any = None,
    scheduler: Any = None,
    scaler: Any = None,
    data: Any = None,
    strict: bool = True,
    names: str | Sequence[str] | None = None,
    rename: Rename | None = None,
    dtype: torch.dtype | None = None,
    P: Any = None,
) -> Loaded:
    """Read a checkpoint on any grid and any number of ranks: each rank reads what it holds.

    Parameters
    ----------
    source : path or mapping
        A directory that `save` has written; a safetensors file of a whole model; or a serial ``state_dict()``, which all ranks
        pass, such as ``torch.load(file, mmap=True)``.
    model, optimizer, scheduler, scaler, data
        What is to go on, as in `save`; anything may be left out. An optimizer has its parameters in the groups that it had,
        in any order. Where there is one, torch's generators go on, too.
    strict : bool
        Whether the names of the model's tensors and the checkpoint's must be the same, and the optimizer of the same class.
    names : str or sequence of str, optional
        Patterns such as "encoder.*": of the model's tensors only those whose names match one are loaded.
    rename : mapping or callable, optional
        From a tensor's name in the checkpoint to its name in the model; names that a mapping lacks stay.
    dtype : torch.dtype, optional
        What floating-point tensors of the checkpoint are converted to. Without it dtypes must be the same.
    P : Partition or communicator, optional
        The ranks that call this together, as in `save`.

    Returns
    -------
    Loaded

    Raises
    ------
    ValueError, TypeError, RuntimeError
        On all ranks with the same text: if the checkpoint is torn or none, or names, shapes, dtypes or the optimizer's groups
        do not fit; the model is then as it was. If reading fails later, it is not.

    Notes
    -----
    What several ranks hold is read by one of them, and broadcast. On another number of ranks, generators and the inner states of
    `LocalSGD`, which are each rank's own, go on as those of rank ``r % n`` of the n ranks that saved; the dropout of distributed
    layers needs those of the first rank alone, so it goes on as before.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> serial = torch.nn.Conv1d(4, 6, 3)
    >>> def body(world):
    ...     net = dl.nn.DistributedConv1d(world.grid((1, 2, 1)), 4, 6, 3)
    ...     dl.load(serial.state_dict(), model=net)
    ...     return torch.equal(net.weight, serial.weight[3 * world.rank : 3 * world.rank + 3])
    >>> dl.testing.spmd(2, body)
    [True, True]
    """
    team = partition_of(P).team
    rank = team.world.rank
    if rank not in team:
        raise ValueError(f"load: rank {rank} is outside ranks {list(team)}, which are to call it")
    with raised_together(team, "load"):
        made = read_checkpoint(source)
        program = Program.of(model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler, data=data)
        chosen = _Names(made, strict, names, rename, dtype)
    arguments = {
        "checkpoint": f"{made!r} with hash {vote_of(made.contents)}",
        "things to load": program.names,
        "strict, names and dtype": (strict, names, dtype),
        "hash of new names": vote_of(str(list(chosen.found.items()))),
    }
    same_arguments(team, arguments, "load")
    with raised_together(team, "load"):
        parts = program.parts(team)
    told = team.world.gather_objects(team, [serial_name(part) for part in parts])
    with raised_together(team, "load"):
        if program.models:
            chosen.compare(dict.fromkeys(name for one in told for name in one))
        loading = _Loading(chosen, team, program, parts)
    with raised_together(team, f"load: {made.path}"):
        loading.read(rank)
    loading.broadcast()
    with raised_together(team, "load"):
        loading.finish()
    notes = tuple(loading.notes(team.size))
    for text in notes if rank == team[0] else ():
        warnings.warn(text, stacklevel=2)
    extra = decoded(made.objects.get("extra"))
    return Loaded(extra, tuple(chosen.missing), tuple(chosen.unexpected), notes)


class _Names:
    """Which tensors of a checkpoint are which of the program's. Raises if an argument is none."""

    def __init__(
        self, made: Checkpoint, strict: bool, patterns: Any, rename: Rename | None, dtype: torch.dtype | None
    ) -> None:
        self.made, self.strict, self.rename, self.dtype = made, strict, rename, dtype
        self.patterns = [patterns] if isinstance(patterns, str) else patterns
        if self.patterns is not None and not _are_texts(self.patterns):
            raise TypeError(f"names={patterns!r} must be a pattern or several")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype={dtype!r} is no floating-point dtype of torch")
        if rename is not None and not callable(rename) and not isinstance(rename, Mapping):
            raise TypeError(f"rename={rename!r} is neither a mapping nor callable")
        self.found: dict[str, str] = {}  # by name in the model, the name in the checkpoint
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        for name in made.tensors:
            if name.startswith(made.kind):
                new = self.new(name.removeprefix(made.kind))
                if self.found.setdefault(new, name) != name:
                    raise ValueError(f"rename makes {new!r} of both {self.found[new]} and {name}")

    def new(self, name: str) -> str:
        """A serial name as the model has it."""
        if self.rename is None:
            return name
        return str(self.rename(name)) if callable(self.rename) else self.rename.get(name, name)

    def compare(self, names: Collection[str]) -> None:
        """Compare with the names of all ranks' models. Raises if they do not fit."""
        wanted = [name for name in names if self._matches(name)]
        if names and not wanted:
            raise ValueError(f"no tensor of the model is named like {self.patterns!r}")
        self.missing = [name for name in wanted if name not in self.found]
        self.unexpected = [name for name in self.found if name not in wanted] if self.patterns is None else []
        if self.strict and (self.missing or self.unexpected):
            raise ValueError(
                f"the checkpoint does not fit the model: only the model has {_some(self.missing)}; "
                f"only the checkpoint has {_some(self.unexpected)}"
            )

    def of_model(self, parts: Sequence[Part]) -> list[tuple[Part, str]]:
        """The parts that are loaded, each with its name in the checkpoint. Raises if one does not fit."""
        names = [(part, serial_name(part)) for part in parts]
        pairs = [(part, self.found[name]) for part, name in names if self._matches(name) and name in self.found]
        for part, name in pairs:
            self.check(part, name)
        return pairs

    def _matches(self, name: str) -> bool:
        return self.patterns is None or any(fnmatchcase(name, pattern) for pattern in self.patterns)

    def check(self, part: Part, name: str) -> None:
        stored = self.made.tensors[name]
        if stored.shape != tuple(part.shape):
            raise ValueError(f"{name} has shape {stored.shape} in the checkpoint, {tuple(part.shape)} in the model")
        if self.dtype_of(name) != part.tensor.dtype:
            asked = f" and dtype={self.dtype}" if self.dtype else "; dtype= converts it"
            raise ValueError(f"{name} is {stored.dtype} in the checkpoint, {part.tensor.dtype} here{asked}")

    def dtype_of(self, name: str) -> torch.dtype:
        """What a tensor of the checkpoint is converted to."""
        stored = self.made.tensors[name].dtype
        return self.dtype if self.dtype and stored.is_floating_point else stored


def _are_texts(values: Any) -> bool:
    return isinstance(values, Collection) and all(isinstance(value, str) for value in values)


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}" or "nothing"


class _Loading:
    """What is read of a checkpoint on this rank, and then told to whom. Raises if something does not fit."""

    def __init__(self, names: _Names, team: Team, program: Program, parts: Sequence[Part]) -> None:
        self.made, self.names = names.made, names
        self.tensors = names.of_model(parts)
        self.states: list[tuple[Any, Any]] = []  # objects, each with what it will load
        self.own: Any = None
        if program.optimizers or program.averaging:
            for _, model in program.models:
                _check_cut(model)
            position = team.index(team.world.rank) % max(self.made.ranks, 1)
            own = self.made.objects.get(f"rank.{position}")
            self.own = own and decoded(own, self.made.own)
        for name, optimizer in program.averaging:
            self.states.append((optimizer, self._own_of(name, optimizer)))
        for name, optimizer in program.optimizers:
            self._prepare_optimizer(name, optimizer, parts)
        self.states += [(thing, decoded(self._object(name))) for name, thing in program.others]

    def _object(self, name: str) -> Any:
        if name not in self.made.objects:
            raise ValueError(f"the checkpoint has no {name.removesuffix('.groups').removesuffix('.type')}")
        return self.made.objects[name]

    def _own_of(self, name: str, optimizer: LocalSGD) -> Any:
        state = (self.own or {}).get(name)
        if state is None:
            raise ValueError(f"the checkpoint has no {name} that averages weights")
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for number, values in state["state"].items():
            for key, value in values.items():
                if isinstance(value, torch.Tensor) and value.dim() and value.shape != parameters[number].shape:
                    raise ValueError(f"{key} of {name} is of weights that were cut over another grid")
        return state

    def _prepare_optimizer(self, prefix: str, optimizer: torch.optim.Optimizer, parts: Sequence[Part]) -> None:
        saved = [
            {**group, "params": [self.names.new(name) for name in group["params"]]}
            for group in decoded(self._object(f"{prefix}.groups"))
        ]
        if (kind := self._object(f"{prefix}.type")) != type(optimizer).__name__ and self.names.strict:
            raise ValueError(f"{prefix} was {kind} when it was saved, here it is {type(optimizer).__name__}")
        groups = groups_of(optimizer, parts)
        mine = [sorted(serial_name(part) for _, part in group) for group in groups]
        if mine != [sorted(group["params"]) for group in saved]:
            raise ValueError(
                f"{prefix} has groups of {_some([n for g in mine for n in g])}, the checkpoint of "
                f"{_some([n for g in saved for n in g['params']])}, in {len(mine)} and {len(saved)} groups"
            )
        known, numbers, states = self._states(f"{prefix}.state."), count(), {}
        for group in groups:
            for parameter, part in group:
                states[next(numbers)] = {
                    key: self._state(part, parameter, name) for key, name in known.get(serial_name(part), {}).items()
                }
        numbers = count()
        for group in saved:
            group["params"] = [next(numbers) for _ in group["params"]]
        self.states.append((optimizer, {"state": {n: s for n, s in states.items() if s}, "param_groups": saved}))

    def _states(self, prefix: str) -> dict[str, dict[str, str]]:
        """The names of states by weight and key."""
        found: dict[str, dict[str, str]] = {}
        for name in (*self.made.tensors, *self.made.objects):
            if name.startswith(prefix):
                weight, _, key = name.removeprefix(prefix).rpartition(".")
                found.setdefault(self.names.new(weight), {})[key] = name
        return found

    def _state(self, part: Part, parameter: torch.Tensor, name: str) -> Any:
        if name in self.made.objects:
            return decoded(self.made.objects[name])
        state = torch.empty_like(parameter, dtype=self.names.dtype_of(name), requires_grad=False)
        self.names.check(part.like(name, state), name)
        self.tensors.append((part.like(name, state), name))
        return state

    def _readers(self) -> list[tuple[Part, str, int]]:
        """The parts that are not empty, in an order that all ranks share, each with the rank that reads it."""
        order = {name: number for number, name in enumerate(self.made.tensors)}
        pairs = sorted(self.tensors, key=lambda pair: order[pair[1]])
        return [(part, name, part.team[order[name] % part.team.size]) for part, name in pairs if part.box is not None]

    @torch.no_grad()
    def read(self, rank: int) -> None:
        for part, name, reader in self._readers():
            if rank == reader:
                assert part.box is not None
                self.made.read(name, part.box, part.tensor)

    @torch.no_grad()
    def broadcast(self) -> None:
        """Tell those that hold the same what one of them has read."""
        for part, _, reader in self._readers():
            if part.team.size > 1:
                values = part.tensor.detach().contiguous()
                part.team.world.broadcast(part.team, values.view(-1).view(torch.uint8), reader)
                part.tensor.copy_(values)

    def finish(self) -> None:
        for thing, state in self.states:
            thing.load_state_dict(state)
        if self.own:
            set_generators(self.own["random"])

    def notes(self, size: int) -> list[str]:
        if not self.own or size == self.made.ranks or self.made.objects["random"]:
            return []
        return [
            f"load: {self.made.ranks} ranks had torch's generators in different states, {size} ranks go on: "
            f"rank r with the state of rank r % {self.made.ranks}"
        ]


def _check_cut(module: Any) -> None:
    for inner in module.modules():
        if isinstance(inner, Distributed) and feature_axes(inner.P.grid_of_ranks) and inner._distdl_plan is None:
            raise ValueError(
                f"{inner._distdl_label}: call the network once before the state of its optimizer is loaded: "
                "its weights are cut at the first call"
            )
