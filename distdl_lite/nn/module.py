"""The base Module: build once, agree, reuse."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from weakref import ref

import torch
from torch import Tensor, is_grad_enabled, strided
from torch._C import _are_functorch_transforms_active, _DisableFuncTorch, _is_any_autocast_enabled
from torch._C._autograd import _top_saved_tensors_default_hooks  # type: ignore[attr-defined]
from torch.nn.modules.module import _has_any_global_hook as _any_global_hook
from torch.utils.hooks import RemovableHandle

from distdl_lite.agreement import CALL, check_alike, check_present, raise_together
from distdl_lite.operator import ANCHOR, NOTHING, TRANSFORMS, Node
from distdl_lite.partition import Partition, check_same_world, union_of_ranks
from distdl_lite.structure import Structure, TensorStructure, autocast, hashable, hashed
from distdl_lite.transport import Transport, current
from distdl_lite.untraced import untraced

_CACHED_STRUCTURES = 64


@dataclass
class _Ride:
    """A composite module's agreement, which the layers it calls share while its forward runs."""

    key: Any
    team: frozenset[int]
    outer: _Ride | None
    owner: Module
    calls: dict[int, int] = field(default_factory=dict)

    def number(self, module: Module) -> int:
        """How often the module was called before in this forward."""
        number = self.calls.get(id(module), 0)
        self.calls[id(module)] = number + 1
        return number


class Module(torch.nn.Module):
    """Base class of distributed layers and of users' own distributed networks.

    A forward-pre hook reruns set-up when the **global** structure of the input changes: shape, dtype, device or
    ``requires_grad`` on any rank, grad mode, autocast or training mode. A rank cannot see this from its own block, so the
    ranks of the layer's partitions agree on it by the sum of one 64-bit hash each, which is also the key under which
    what set-up returned is kept: a structure seen before costs no rebuild.

    Parameters
    ----------
    *partitions : Partition or None
        The layer's partitions; their ranks, together, agree and set up. Without any, the ranks of all layers inside.

    Notes
    -----
    Override ``forward``, and where a plan is needed ``_distdl_module_setup(self, input)``, which returns what forward
    then finds as ``self._distdl_plan`` for this structure. If it returns None it runs again at every change, after
    ``_distdl_module_teardown(self, input)``. Set-up must not communicate; an error raised in it on any rank is raised on
    all of them.

    A class of one's own may override the ``forward`` of a layer and give ``super().forward`` other tensors than it got: the
    ranks then agree on these too, and set up for them.

    The layers inside a module's forward ride on its one agreement: their structure must follow from its tensor
    arguments, its numbers and strings, its parameters' ``requires_grad`` and the modes of the modules inside. Where it
    depends on data, call `agree_each_layer`.
    """

    _distdl_free = frozenset[str]()  # options that only forward reads, which may be changed
    _distdl_plan: Any
    _distdl_key: int | None
    _distdl_next_key: int
    _distdl_structure: Structure
    _distdl_kept: OrderedDict[int, tuple[Any, Structure, list[Any]]]
    _distdl_seen: list[Any] | None  # this rank's part of the structure, if forward may go ahead of the others' votes
    _distdl_mine: int  # its hash
    _distdl_rehearse: Callable[[], Any] | None
    _distdl_alone: tuple[Callable[..., Any], list[Any]] | None  # what calls come to on one rank, for which tensors
    _distdl_known_keys: dict[Any, int]
    _distdl_team: tuple[int, ...]
    _distdl_transport: Transport
    _distdl_is_inside: bool
    _distdl_hook: int | None  # the number of our hook

    def __init__(self, *partitions: Partition | None) -> None:
        super().__init__()
        given = tuple(P for P in partitions if P is not None)
        for P in given:
            if not isinstance(P, Partition):
                raise TypeError(f"{type(self).__name__}: a Partition is needed, not {P!r}")
        check_same_world(*given)
        self._distdl_partitions = given
        self._distdl_label = type(self).__name__  # in errors and counts
        self._distdl_number = _number(given)
        self._distdl_agrees_each = False
        self._distdl_is_static = False
        self._distdl_ends_rides = False
        self.__dict__.update(_unbuilt())
        self._distdl_hook = None
        self._distdl_hook = self.register_forward_pre_hook(type(self)._distdl_forward_pre_hook, with_kwargs=True).id

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let Python's errors about a constructor's arguments name no private base."""
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__.__qualname__ = f"{cls.__name__.lstrip('_')}.__init__"
        inherited = next((base for base in cls.__mro__[1:] if "forward" in vars(base)), Module)
        if "forward" in vars(cls) and _is_own(inherited) and not _is_own(cls):
            cls.__bases__ = (_Again, *cls.__bases__)

    @untraced
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's; a layer without hooks but ours is spared the 5 us in which torch goes through the lists of hooks."""
        if (
            self._modules
            or len(self._forward_pre_hooks) > 1
            or self._forward_hooks
            or self._backward_hooks
            or self._backward_pre_hooks
            or _any_global_hook()
        ):
            return super().__call__(*args, **kwargs)
        if self._distdl_alone is not None and not kwargs and "forward" not in self.__dict__:
            function, structure = self._distdl_alone
            if len(args) == len(structure):
                for x, known in zip(args, structure, strict=True):
                    if not isinstance(x, Tensor) or x.is_nested or (x.shape, x.dtype, x.device) != known:
                        break
                else:
                    return function(self, *args)
        seen = self._distdl_seen
        if (
            seen is not None
            and not kwargs
            and (self._distdl_transport.local.get("ride") is None or self._distdl_ride() is None)
            and self._distdl_local_parts(args) == seen
        ):
            if len(self._distdl_team) == 1:
                return self.forward(*args)
            if self._distdl_goes_ahead():
                return self._distdl_early_forward(args)
        args, kwargs = self._distdl_forward_pre_hook(args, kwargs)
        return self.forward(*args, **kwargs)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: a distributed layer runs as it is, also inside a network that torch.compile compiles."""

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """As torch's; ours stays the last, as it is about what forward gets."""
        handle = super().register_forward_pre_hook(*args, **kwargs)
        if self._distdl_hook is not None:
            self._forward_pre_hooks.move_to_end(self._distdl_hook)
        return handle

    def __setattr__(self, name: str, value: Any) -> None:
        """As torch's, but for options that plans and weights follow from: another value would not count, or count in part."""
        if name in self.__dict__ and name in _fixed_options(type(self)) and not _is_same(value, self.__dict__[name]):
            raise self._refuse(
                f"{name} is fixed by the constructor; make a new layer with {name}={value!r}", AttributeError
            )
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """Plans, requests and buffers are neither pickled nor copied."""
        return {**self.__dict__, **_unbuilt()}

    def _refuse(self, why: str, kind: type[Exception] = ValueError) -> Exception:
        """The error of a layer that cannot do what it is asked for."""
        return kind(f"{type(self).__name__}: {why}")

    # ---- who agrees --------------------------------------------------------------------------------------------------

    def _distdl_layers(self) -> list[Module]:
        """This module and the distributed ones inside it."""
        return [module for module in self.modules() if isinstance(module, Module)]

    def _distdl_resolve(self) -> tuple[int, ...]:
        """Find the sorted world ranks that agree and set up together, and their world."""
        given = [P for layer in self._distdl_layers() for P in layer._distdl_partitions]
        check_same_world(*given)
        self._distdl_transport = given[0].world_transport if given else current()
        self._distdl_team = union_of_ranks(*given)
        self._distdl_is_inside = self._distdl_transport.rank in self._distdl_team
        return self._distdl_team

    def agree_each_layer(self, on: bool = True) -> Module:
        """Let every layer inside agree for itself, for shapes that depend on data."""
        self._distdl_agrees_each = on
        return self

    def static_shapes(self, on: bool = True) -> Module:
        """Promise that local structure alone tells global structure, which drops the agreement.

        A rank whose block changes while another's does not then meets the others in different calls.
        """
        self._distdl_is_static = on
        return self

    # ---- moving before the votes are in ------------------------------------------------------------------------------

    def _distdl_rehearsal(self) -> Callable[[], Any] | None:
        """For layers whose forward has no side effects: what makes the calls that forward makes under the plan, with zeros.

        Such a layer runs forward while the votes of an agreement travel, if its own structure is that of the last plan, and
        drops the result if the votes say that another rank's has changed. A rank that does not run it early, because its
        structure has changed or it has hooks, then rehearses, so that all ranks have made the same calls.
        """
        return None

    def _distdl_serial(self) -> Callable[..., Any] | None:
        """For a layer that one rank has for itself: what a call comes to under the plan, in any mode; None: not that alone.

        It is given the layer, lest a layer that keeps it keeps itself, and the tensors, and is mostly torch's own function.
        Nothing but shapes, dtypes and devices of the tensors, none of which is empty, is looked at before.
        """
        return None

    def _distdl_goes_ahead(self) -> bool:
        """Whether forward may run on a structure seen before while the votes travel."""
        # A forward that somebody has put in place of the layer's may do more than move, and more than the rehearsal.
        # Something, such as a checkpoint, may count the tensors that are saved: nothing may then run twice.
        hooked = _top_saved_tensors_default_hooks(False) is not None
        return not (hooked or self._distdl_is_static or "forward" in self.__dict__)

    def _distdl_early_forward(self, input: tuple[Any, ...]) -> Any:
        self._distdl_transport.start_agreeing(self._distdl_team, self._distdl_mine)
        error: Exception | None = None
        try:
            result = self.forward(*input)
        except Exception as raised:  # which may be due to what the votes say
            error = raised
        agreed = self._distdl_transport.agreed(self._distdl_team)
        if agreed == self._distdl_key:
            if error is not None:
                raise error
            return result
        result = None
        self._distdl_next_key = agreed
        self._distdl_adopt(input, None)
        return self.forward(*input)

    # ---- the hook ----------------------------------------------------------------------------------------------------

    def _distdl_forward_pre_hook(self, input: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        """Agree on the structure of this call, and set up for it unless that was done before; returns forward's arguments."""
        if kwargs:
            input, kwargs = self._distdl_positional(input, kwargs)
        if self._distdl_team is None:
            self._distdl_resolve()
        if not self._distdl_is_inside:
            self._distdl_refuse_data(input)
            return input, kwargs
        if self._distdl_input_changed(input, kwargs):
            self._distdl_adopt(input, kwargs)
        if self._modules and not self._distdl_agrees_each:
            self._distdl_begin_ride()
        if is_grad_enabled() and _top_saved_tensors_default_hooks(False) is not None:
            input = self._distdl_recomputed(input)
        return input, kwargs

    def _distdl_recomputed(self, input: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments, so that a checkpoint around the layer runs it again, and lets it agree, on all ranks or on none.

        By itself a rank does so only where its block's function saves a tensor: none of an empty block, or of one without
        gradient, need do so although the others' do.
        """
        wanted = any(tensor.requires_grad for tensors in self._distdl_structure.values() for tensor in tensors)
        if not (wanted and self._distdl_partitions and len(self._distdl_team) > 1 and _has_gradients(input[0])):
            return input
        return _Saved.apply(input[0], None if input[0].requires_grad else ANCHOR), *input[1:]

    def _distdl_adopt(self, input: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> None:
        """Set up for the structure agreed on, or take what was kept of it."""
        self._distdl_rehearse = self._distdl_seen = self._distdl_alone = None
        if self._distdl_module_requires_reset(input):
            self._distdl_build(input, kwargs)
        key = self._distdl_key = self._distdl_next_key
        if key not in self._distdl_kept:
            return
        self._distdl_plan, self._distdl_structure, parts = self._distdl_kept[key]
        self._distdl_kept.move_to_end(key)
        alone = len(self._distdl_team) == 1
        # A forward of its own might do something else than what it inherits.
        if issubclass(_owner(self, "_distdl_serial" if alone else "_distdl_rehearsal"), _owner(self, "forward")):
            if not alone:
                self._distdl_rehearse = self._distdl_rehearsal()
            elif all(x.size for x in self._distdl_structure[self._distdl_team[0]]) and (
                function := self._distdl_serial()
            ):
                self._distdl_alone = function, [(x.shape, x.dtype, x.device) for x in input]
        if self._distdl_rehearse is not None or alone:
            self._distdl_seen, self._distdl_mine = parts, hashed(parts)

    def _distdl_positional(
        self, input: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """The arguments as forward takes them: positional ones first, also where the caller named them."""
        try:
            bound = inspect.signature(self.forward).bind(*input, **kwargs)
        except TypeError:  # forward itself will say what is wrong
            return input, kwargs
        return bound.args, bound.kwargs

    def _distdl_input_changed(self, input: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> bool:
        """Whether the global structure differs from the one set up for; the layer's ranks agree on it."""
        key = self._distdl_agreed_key(input, kwargs)
        if key == self._distdl_key:
            return False
        self._distdl_next_key = key
        return True

    def _distdl_module_requires_reset(self, input: tuple[Any, ...]) -> bool:
        """Whether the structure agreed on last is not among those whose set-up is kept."""
        return self._distdl_next_key not in self._distdl_kept

    def _distdl_module_setup(self, input: tuple[Any, ...]) -> Any:
        """Build what forward needs for this structure; see the class."""
        return ()

    def _distdl_check_weights(self) -> None:
        """Raise ValueError if this rank's weights have not the shapes that set-up counts on."""

    def _distdl_module_teardown(self, input: tuple[Any, ...]) -> None:
        """Undo a set-up that returned None."""

    def _distdl_build(self, input: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> None:
        """Exchange structures, set up, and agree that it went well on every rank."""
        if self._distdl_key is not None and self._distdl_plan is None:
            self._distdl_module_teardown(input)
        self._distdl_key = self._distdl_plan = None
        self._distdl_exchange_and_set_up(input, kwargs)
        if self._distdl_plan is not None:
            parts = self._distdl_local_parts(input, kwargs)
            self._distdl_kept[self._distdl_next_key] = (self._distdl_plan, self._distdl_structure, parts)
            if len(self._distdl_kept) > _CACHED_STRUCTURES:
                self._distdl_kept.popitem(last=False)

    def _distdl_exchange_and_set_up(self, input: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> None:
        team, transport = self._distdl_team, self._distdl_transport
        mine = {
            "tensors": tuple(TensorStructure.of(value) for value in input),
            CALL: f"{self._distdl_label} number {self._distdl_number}",
            "options": self._distdl_options(),
            "mode": self._distdl_mode(),
            "number of arguments": len(input),
            "keywords": list(kwargs or ()),
        }
        passed = dict(zip(team, transport.gather_objects(team, mine), strict=True))
        check_present(passed, self._distdl_label)
        self._distdl_structure = {rank: told.get("tensors", ()) for rank, told in passed.items()}
        error = None
        try:
            for what in [*mine][1:]:
                check_alike(what, {rank: told.get(what) for rank, told in passed.items()})
            if len(team) > 1 and _are_functorch_transforms_active():
                raise RuntimeError(TRANSFORMS)
            self._distdl_check_weights()
            # Tensors made in inference mode could not be used outside it.
            with torch.inference_mode(False), torch.set_grad_enabled(torch.is_grad_enabled()):
                self._distdl_plan = self._distdl_module_setup(input)
        except Exception as raised:
            error = raised
        raise_together(transport, team, error, self._distdl_label)

    def _distdl_options(self) -> str:
        """What the ranks gave the constructor, of the library's own layers; a user's may print what differs."""
        is_own = _owner(self, "extra_repr").__module__.startswith("distdl_lite.")
        return self.extra_repr() if is_own else ""

    def _distdl_mode(self) -> str:
        """What else must be the same on all ranks, in words."""
        words = ["training" if self.training else "evaluation"]
        words += [] if torch.is_grad_enabled() else ["no grad"]
        words += [f"autocast on {kind}" for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
        words += ["torch.func"] if _are_functorch_transforms_active() else []
        frozen = [
            name
            for name, parameter in self._parameters.items()
            if parameter is not None and not parameter.requires_grad
        ]
        return ", ".join(words + [f"{name} frozen" for name in frozen])

    def _distdl_refuse_data(self, input: tuple[Any, ...]) -> None:
        """Raise if this rank, which is outside the partitions, passes data."""
        for value in input if self._distdl_partitions else ():
            if isinstance(value, torch.Tensor) and value.numel() and value.dim():
                raise ValueError(
                    f"{type(self).__name__}: rank {self._distdl_transport.rank} passed a tensor of shape "
                    f"{tuple(value.shape)}, but is outside {', '.join(dict.fromkeys(map(repr, self._distdl_partitions)))}, "
                    f"where P.block(shape) is None and dl.zero_volume_tensor() is passed"
                )

    def _distdl_begin_ride(self) -> None:
        """Let the layers inside share this agreement until forward ends."""
        if not self._distdl_ends_rides:
            self.register_forward_hook(_end_ride, always_call=True)
            self._distdl_ends_rides = True
        local = self._distdl_transport.local
        local["ride"] = _Ride(self._distdl_key, frozenset(self._distdl_team), local.get("ride"), self)

    # ---- the agreement -----------------------------------------------------------------------------------------------

    def _distdl_agreed_key(self, input: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> int:
        transport, ride = self._distdl_transport, self._distdl_ride()
        if ride is not None:
            known: Any = (ride.key, ref(ride.owner), ride.number(self))  # alike modules may share a layer
        elif self._distdl_is_static:
            known = self._distdl_local_key(input, kwargs)
        else:
            agreed = transport.agree(self._distdl_team, self._distdl_local_key(input, kwargs))
            if agreed != self._distdl_key and self._distdl_rehearse is not None:
                with _DisableFuncTorch():  # in whose transforms a new tensor has no storage
                    self._distdl_rehearse()
            return agreed
        if known not in self._distdl_known_keys:
            if len(self._distdl_known_keys) >= 16 * _CACHED_STRUCTURES:
                self._distdl_known_keys.clear()
            agreed = transport.agree(self._distdl_team, self._distdl_local_key(input, kwargs))
            self._distdl_known_keys[known] = agreed
        return self._distdl_known_keys[known]

    def _distdl_ride(self) -> _Ride | None:
        """The agreement of a module around this layer, of all its ranks, if there is one and not just one rank."""
        if self._distdl_agrees_each or len(self._distdl_team) == 1:
            return None
        ride = self._distdl_transport.local.get("ride")
        return ride if ride is not None and ride.team.issuperset(self._distdl_team) else None

    def _distdl_local_key(self, input: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> int:
        return hashed(self._distdl_local_parts(input, kwargs))

    def _distdl_local_parts(self, input: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> list[Any]:
        """All that this rank's structure consists of.

        Every call of a layer asks for it; where the caches are cold, each name that is looked up takes 0.5 us.
        """
        casts = _is_any_autocast_enabled() and autocast()
        parts: list[Any] = [
            self._distdl_transport.rank,
            self._distdl_number,
            is_grad_enabled(),
            casts,
            _are_functorch_transforms_active(),
        ]
        for value in input:
            if isinstance(value, Tensor) and value.layout is strided and not value.is_nested:
                parts += (value.shape, value.dtype, value.device, value.requires_grad)
            else:
                parts.append(hashable(value))
        if kwargs:
            parts.append(hashable(kwargs))
        for module in self.modules() if self._modules else (self,):
            parts.append(module.training)
            for p in module._parameters.values():
                parts += (None,) if p is None else (p.shape, p.dtype, p.requires_grad)
            for b in module._buffers.values():
                parts += (None,) if b is None else (b.shape, b.dtype)
        return parts


class _Again:
    """What stands between a layer and a user's class whose forward takes its place.

    That may give the layer other tensors than the call's, so that the call's plan does not fit: the ranks agree once more.
    """

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        forward = super().forward  # type: ignore[misc]
        if kwargs:
            args = inspect.signature(forward).bind(*args, **kwargs).args
        if not self._distdl_is_inside:
            self._distdl_refuse_data(args)
        elif self._distdl_input_changed(args):
            self._distdl_adopt(args, None)
        if self._distdl_is_inside and is_grad_enabled() and _top_saved_tensors_default_hooks(False) is not None:
            args = self._distdl_recomputed(args)
        return forward(*args)


def _is_own(kind: type) -> bool:
    """Whether a class is one of the library's layers."""
    return kind.__module__.startswith("distdl_lite.") and issubclass(kind, Module) and kind is not Module


class _Saved(Node):
    """The identity with a saved tensor; its output may be overwritten like its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor | None) -> Tensor:
        ctx.save_for_backward(NOTHING)
        return x.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        _ = ctx.saved_tensors
        return gradient if ctx.needs_input_grad[0] else None, None


def _has_gradients(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _end_ride(module: Module, args: tuple[Any, ...], output: Any) -> None:
    ride = module._distdl_transport and module._distdl_transport.local.get("ride")
    if ride is not None and ride.owner is module:
        module._distdl_transport.local["ride"] = ride.outer


def _unbuilt() -> dict[str, Any]:
    """The attributes of a module that has not been set up."""
    return {
        "_distdl_plan": None,
        "_distdl_key": None,
        "_distdl_next_key": None,
        "_distdl_structure": {},
        "_distdl_kept": OrderedDict(),
        "_distdl_known_keys": {},
        "_distdl_mine": 0,
        "_distdl_seen": None,
        "_distdl_rehearse": None,
        "_distdl_alone": None,
        "_distdl_team": None,
        "_distdl_transport": None,
        "_distdl_is_inside": False,
    }


def _number(partitions: Sequence[Partition]) -> int:
    """How many modules these ranks have made together, the same on all of them: tells two alike layers apart."""
    if not partitions:
        return 0
    made, team = partitions[0].world_transport.local.setdefault("modules", {}), union_of_ranks(*partitions)
    made[team] = made.get(team, 0) + 1
    return made[team]


def _owner(module: Module, name: str) -> type:
    """The class that a method comes from."""
    return next(kind for kind in type(module).__mro__ if name in kind.__dict__)


@cache
def _fixed_options(kind: type) -> frozenset[str]:
    """The arguments of the constructors of the library's own layers that this is one of, but for the free ones."""
    own = [base for base in kind.__mro__ if base.__module__.startswith("distdl_lite.nn.") and "__init__" in vars(base)]
    given = [parameter for base in own for parameter in inspect.signature(base).parameters.values()]
    return frozenset(p.name for p in given if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)) - kind._distdl_free


def _is_same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and bool(one == other))
