"""The base Module: build once, agree, reuse."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import Tensor, is_grad_enabled

from distdl_lite.agreement import Structure, call_of, check_met, exchanged, hashed, parts_of_call, raise_together
from distdl_lite.autograd import TRANSFORMS, may_recompute, saved_here
from distdl_lite.nn.network import Place, ride_of, riding
from distdl_lite.nn.options import fixed_options, is_same
from distdl_lite.partition import Partition, check_same_world, union_of_teams
from distdl_lite.private import gradients_leave_early, transforms_are_active, untraced
from distdl_lite.transport import Team, Transport, current

Call = Callable[..., Any]  # of a layer and its input: what set-up returns

_CACHED_STRUCTURES = 64


@dataclass
class _Built:
    """The result of set-up for one structure, and the keys that the layers inside have agreed on under it."""

    plan: Any
    structure: Structure
    keys: dict[Place, int] = field(default_factory=dict)


_NOTHING_BUILT = _Built(None, Structure(-1, ()))
_OF_SET_UP = {
    f"_distdl_{n}" for n in ["key", "next_key", "built", "kept", "parts", "vote", "team", "transport", "is_inside"]
}


def _agreed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a module, after its ranks have agreed on the structure of what it is given and set up for it."""

    @untraced
    @wraps(forward)
    def call(self: Module, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self._distdl_forward_pre_hook(args, kwargs)
        if not (self._modules and self._distdl_is_inside and self._distdl_team.size > 1) or self._distdl_agrees_each:
            return forward(self, *args, **kwargs)
        with riding(self._distdl_team, self._distdl_built.keys):
            return forward(self, *args, **kwargs)

    return call


class Module(torch.nn.Module):
    """Base class of distributed layers and of users' own distributed networks.

    Before its forward runs, a hook reruns set-up if the **global** structure of the input has changed: shape, dtype, device
    or ``requires_grad`` on any rank, grad mode, autocast or training mode. A rank cannot see this from its own block, so the
    ranks of the layer's partitions agree on it by the sum of one 64-bit hash each, which is also the key under which
    what set-up returned is kept: a structure seen before costs no rebuild.

    Parameters
    ----------
    *partitions : Partition or None
        The layer's partitions, that of the input first; their ranks, together, agree and set up. Without any, the ranks of
        all layers inside.

    Raises
    ------
    TypeError
        If something else than a partition is given for one.

    Notes
    -----
    Override ``_distdl_module_setup(self, input)``, which returns the call for this structure: a function of the layer and its
    input. Or override ``forward`` too, which finds what set-up returned as ``self._distdl_plan``; if that is None, set-up
    runs again at every change, after ``_distdl_module_teardown(self, input)``. Set-up must not communicate; an error raised
    in it on any rank is raised on all of them.

    Every forward agrees on what it is given: also one of a class of one's own that gives ``super().forward`` other tensors
    than it got.

    The layers inside a module's forward ride on its one agreement: their structure must follow from its tensor
    arguments, its numbers and strings, its parameters' ``requires_grad`` and the modes of the modules inside. Where it
    depends on data, call `agree_each_layer`.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> class Total(dl.nn.Module):
    ...     def __init__(self, P_x):
    ...         super().__init__(P_x)
    ...         self.over_ranks = dl.nn.AllSumReduce(P_x, axes_keep=())
    ...
    ...     def _distdl_module_setup(self, input):
    ...         return lambda layer, x: layer.over_ranks(x.sum().view(1))
    >>> dl.testing.spmd(2, lambda world: Total(world.grid((2,)))(torch.ones(3)).item())
    [6.0, 6.0]
    """

    _distdl_is_cut = True  # whether the first argument is in blocks over the first partition, one axis for each dim
    _distdl_is_numbered = True
    _distdl_free = frozenset[str]()  # options that only forward reads, which may be changed
    # What set-up leaves, which is neither pickled nor copied.
    _distdl_key: int | None = None  # of the structure set up for
    _distdl_next_key = 0  # of that agreed on
    _distdl_built = _NOTHING_BUILT
    _distdl_kept: OrderedDict[int, _Built]
    _distdl_parts: list[Any] | None = None  # this rank's part of the structure at its last vote
    _distdl_vote = 0
    _distdl_team: Team = None  # type: ignore[assignment]
    _distdl_transport: Transport
    _distdl_is_inside = False
    _distdl_sums_at_once = False  # in the middle of backward, where torch's DDP or FSDP2 takes the gradients

    def __init__(self, *partitions: Partition | None) -> None:
        super().__init__()
        given = tuple(P for P in partitions if P is not None)
        for P in (*partitions[:1], *given):
            if not isinstance(P, Partition):
                raise TypeError(f"{type(self).__name__}: a Partition is needed, not {P!r}")
        check_same_world(*given)
        self._distdl_partitions = given
        self._distdl_label = type(self).__name__  # in errors and counts
        self._distdl_number = 0  # how many modules these ranks have made together: tells two alike layers apart
        if given and self._distdl_is_numbered:
            made = union_of_teams(*given).made
            made["modules"] += 1
            self._distdl_number = made["modules"]
        self._distdl_agrees_each = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "forward" in vars(cls):
            cls.forward = _agreed(vars(cls)["forward"])  # type: ignore[method-assign]

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: a distributed layer runs as it is, also inside a network that torch.compile compiles."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute. Options that plans and weights follow from are refused: a new value would not count everywhere."""
        if name in self.__dict__ and name in fixed_options(type(self)) and not is_same(value, self.__dict__[name]):
            raise self._refuse(
                f"{name} is fixed by the constructor; make a new layer with {name}={value!r}", AttributeError
            )
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """Plans, requests and buffers are neither pickled nor copied."""
        return {name: value for name, value in self.__dict__.items() if name not in _OF_SET_UP}

    def _refuse(self, why: str, kind: type[Exception] = ValueError) -> Exception:
        """The error of a layer that cannot do what it is asked for."""
        return kind(f"{type(self).__name__}: {why}")

    def agree_each_layer(self, on: bool = True) -> Module:
        """Let every layer inside agree for itself, for shapes that depend on data."""
        self._distdl_agrees_each = on
        return self

    @_agreed
    def forward(self, x: Any) -> Any:
        """Run what set-up returned."""
        return self._distdl_run(x)

    def _distdl_run(self, *input: Any) -> Any:
        return self._distdl_built.plan(self, *input) if self._distdl_is_inside else self._distdl_outside(*input)

    def _distdl_outside(self, x: Any) -> Any:
        """Return what a rank outside the partitions gets: its own argument, unless a subclass says otherwise."""
        return x

    @property
    def _distdl_plan(self) -> Any:
        """The value that set-up returned for this structure; None outside the partitions and before set-up."""
        return self._distdl_built.plan

    @property
    def _distdl_structure(self) -> Structure:
        """The structure of what the ranks passed, as far as each of them must know."""
        return self._distdl_built.structure

    def _distdl_forward_pre_hook(self, input: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        """Agree on the structure of this call, and set up for it unless that was done before; returns forward's arguments."""
        if kwargs:  # positional ones first, also where the caller named them
            with suppress(TypeError):  # forward itself will say what is wrong
                bound = inspect.signature(self.forward).bind(*input, **kwargs)
                input, kwargs = bound.args, bound.kwargs
        if self._distdl_team is None:
            self._distdl_resolve()
        if not self._distdl_is_inside:
            self._distdl_refuse_data(input)
            return input, kwargs
        if not self._distdl_sums_at_once and gradients_leave_early(self):
            self.__dict__["_distdl_sums_at_once"] = True
        if self._distdl_input_changed(input, kwargs):
            if self._distdl_module_requires_reset(input):
                self._distdl_build(input, kwargs)
            elif (kept := self._distdl_kept.get(self._distdl_next_key)) is not None:
                self._distdl_kept.move_to_end(self._distdl_next_key)
                self.__dict__["_distdl_built"] = kept
            self.__dict__["_distdl_key"] = self._distdl_next_key
        return (self._distdl_recomputed(input) if may_recompute() else input), kwargs

    def _distdl_resolve(self) -> None:
        """Find the ranks that agree and set up together: those of this module's partitions and of the layers' inside."""
        layers = [module for module in self.modules() if isinstance(module, Module)]
        given = [P for layer in layers for P in layer._distdl_partitions]
        check_same_world(*given)
        world = given[0].world_transport if given else current()
        self._distdl_transport, self._distdl_kept = world, OrderedDict()
        self._distdl_team = union_of_teams(*given) if given else world.team(())
        self._distdl_is_inside = world.rank in self._distdl_team

    def _distdl_refuse_data(self, input: tuple[Any, ...]) -> None:
        """Raise if this rank, which is outside the partitions, passes data."""
        for value in input if self._distdl_partitions else ():
            if isinstance(value, Tensor) and value.numel() and value.dim():
                raise ValueError(
                    f"{type(self).__name__}: rank {self._distdl_transport.rank} passed a tensor of shape "
                    f"{tuple(value.shape)}, but is outside {', '.join(dict.fromkeys(map(repr, self._distdl_partitions)))}, "
                    f"where P.block(shape) is None and dl.zero_volume_tensor() is passed"
                )

    def _distdl_input_changed(self, input: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> bool:
        """Whether the global structure differs from the one set up for; the layer's ranks agree on it."""
        team = self._distdl_team
        ride = None if team.size == 1 or self._distdl_agrees_each else ride_of(team)
        place = None if ride is None else ride.place(self)
        key = None if ride is None else ride.keys.get(place)  # type: ignore[arg-type]
        if key is None:
            parts = parts_of_call(self, self._distdl_number, self._distdl_transport.rank, input, kwargs)
            if parts != self._distdl_parts:
                self.__dict__.update(_distdl_parts=parts, _distdl_vote=hashed(parts))
            key = self._distdl_transport.agree(team, self._distdl_vote)
            if ride is not None:
                ride.keys[place] = key  # type: ignore[index]
        self.__dict__["_distdl_next_key"] = key
        return key != self._distdl_key

    def _distdl_module_requires_reset(self, input: tuple[Any, ...]) -> bool:
        """Whether the structure agreed on last is not among those whose set-up is kept."""
        return self._distdl_next_key not in self._distdl_kept

    def _distdl_module_setup(self, input: tuple[Any, ...]) -> Any:
        """Build what forward needs for this structure; see the class."""
        return _no_forward

    def _distdl_check_weights(self) -> None:
        """Raise ValueError if this rank's weights have not the shapes that set-up counts on."""

    def _distdl_module_teardown(self, input: tuple[Any, ...]) -> None:
        """Undo a set-up that returned None."""

    def _distdl_build(self, input: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> None:
        """Exchange structures, set up, and agree that it went well on every rank."""
        if self._distdl_key is not None and self._distdl_plan is None:
            self._distdl_module_teardown(input)
        team, label = self._distdl_team, self._distdl_label
        self.__dict__.update(_distdl_key=None, _distdl_built=_NOTHING_BUILT)
        check_met(team, label, call_of(label, self._distdl_number))
        P_x = self._distdl_partitions[0] if self._distdl_partitions else None
        structure = exchanged(team, P_x, self._distdl_is_cut, input, self._distdl_same(input, kwargs), label)
        built = self.__dict__["_distdl_built"] = _Built(None, structure)
        error = None
        try:
            if team.size > 1 and transforms_are_active():
                raise RuntimeError(TRANSFORMS)
            self._distdl_check_weights()
            # Tensors made in inference mode could not be used outside it.
            with torch.inference_mode(False), torch.set_grad_enabled(is_grad_enabled()):
                built.plan = self._distdl_module_setup(input)
        except Exception as raised:
            error = raised
        raise_together(team, error, label)
        if built.plan is not None:
            self._distdl_kept[self._distdl_next_key] = built
            if len(self._distdl_kept) > _CACHED_STRUCTURES:
                self._distdl_kept.popitem(last=False)

    def _distdl_options(self) -> str:
        """The options of the library's layers, which ranks gave the constructor; what a user's prints may differ."""
        return self.extra_repr() if type(self).extra_repr.__module__.startswith("distdl_lite.") else ""

    def _distdl_same(self, input: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
        """The properties of a call that must be the same on all ranks, in words for errors."""
        words = ["training" if self.training else "evaluation"]
        words += [] if is_grad_enabled() else ["no grad"]
        words += [f"autocast on {kind}" for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
        words += ["torch.func"] if transforms_are_active() else []
        words += [f"{name} frozen" for name, p in self._parameters.items() if p is not None and not p.requires_grad]
        return {
            "options": self._distdl_options(),
            "partitions": "; ".join(P._members for P in self._distdl_partitions),
            "mode": ", ".join(words),
            "number of arguments": len(input),
            "keywords": list(kwargs or ()),
        }

    def _distdl_recomputed(self, input: tuple[Any, ...]) -> tuple[Any, ...]:
        """Make every rank save a tensor here, where a checkpoint is around the layer.

        A checkpoint recomputes only where a tensor was saved; a rank with an empty block, or one without gradient, may save
        none, would not recompute, and the others would wait for it in the layer's agreement.
        """
        wanted = self._distdl_structure.requires_grad
        has_gradients = isinstance(input[0], Tensor) and (input[0].is_floating_point() or input[0].is_complex())
        if not (wanted and self._distdl_partitions and self._distdl_team.size > 1 and has_gradients):
            return input
        return saved_here(input[0]), *input[1:]


def _no_forward(layer: Module, *input: Any) -> Any:
    raise NotImplementedError(f"{type(layer).__name__} has neither a forward nor a set-up that returns a call")
