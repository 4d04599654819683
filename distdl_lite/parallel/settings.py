"""What the root of a `RootDataParallel` has changed in its module beside the tensors."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict, deque
from collections.abc import Mapping
from typing import Any
from weakref import ReferenceType

import torch

from distdl_lite.parallel.orders import Pickler


class Settings:
    """What the other ranks know of the modules inside beside their tensors: types, attributes, hooks, and children.

    Attributes that are or hold tensors are left out, as are those that matter to no forward or backward. Containers are
    compared by what is in them, if that is not much, other objects by identity.
    """

    def __init__(self) -> None:
        self._known: _Known | None = None

    @property
    def is_known(self) -> bool:
        return self._known is not None

    def note(self, module: torch.nn.Module) -> None:
        """Take the other ranks' to be what the root's are now."""
        self._known = _settings(module)

    def changes(self, module: torch.nn.Module) -> bytes | None:
        """On the root, what `adapted` needs to make the others' the same; None where nothing has changed.

        Raises
        ------
        RuntimeError
            If that cannot be pickled.
        """
        now, known = _settings(module), self._known
        if known is None or now == known:
            return None
        paths = {id(inner): path for path, (inner, _) in known.items()}
        changed, what = [], [] if id(module) in paths else ["module"]
        for inner, attributes in now.values():
            if id(inner) not in paths:  # goes with what it is in
                continue
            path = paths[id(inner)]
            before = known[path][1]
            values = {name: getattr(inner, name) for name in attributes if before.get(name) != attributes[name]}
            gone = [name for name in before if name not in attributes]
            if values or gone:
                changed.append((inner, values, gone))
                what += [f"{path}.{name}".lstrip(".") for name in (*values, *gone)]
        try:
            file = io.BytesIO()
            _Pickler(file, module, paths).dump((module, changed))
            return file.getvalue()
        except Exception as error:
            raise RuntimeError(
                f"the script has changed {', '.join(what)}, which cannot be sent to the other ranks "
                f"({type(error).__name__}: {error}): change it on all ranks before serve()"
            ) from error


def adapted(module: torch.nn.Module, changes: bytes) -> torch.nn.Module:
    """The root's module on another rank, from the one that was there."""
    module, changed = _Unpickler(changes, module).load()
    for inner, values, gone in changed:
        inner.__class__ = values.pop("__class__", inner.__class__)
        inner.__dict__.update(values)
        for name in gone:
            inner.__dict__.pop(name, None)
    return module


class _Pickler(Pickler):
    """Writes paths for the modules that the other ranks have, and shapes for the weights of those that they do not."""

    def __init__(self, file: io.BytesIO, module: torch.nn.Module, paths: Mapping[int, str]) -> None:
        super().__init__(file)
        self._written: dict[int, Any] = {id(t): tuple(t.shape) for t in (*module.parameters(), *module.buffers())}
        self._written.update(paths)

    def persistent_id(self, value: Any) -> Any:
        known = self._written.get(id(value))
        return super().persistent_id(value) if known is None else known


class _Unpickler(pickle.Unpickler):
    def __init__(self, changes: bytes, module: torch.nn.Module) -> None:
        super().__init__(io.BytesIO(changes))
        self._module = module

    def persistent_load(self, known: Any) -> Any:
        if isinstance(known, str):
            return self._module.get_submodule(known)
        return torch.nn.Parameter(torch.empty(known, device="meta"), False)  # until the weights are installed


_Known = dict[str, tuple[torch.nn.Module, dict[str, Any]]]  # by path

# What else torch keeps in a module, and hooks that no forward or backward runs.
_LEFT_OUT = {"training", "_parameters", "_buffers", "_modules", "_compiled_call_impl", "_non_persistent_buffers_set"}
_LEFT_OUT |= {"_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"}


def _settings(module: torch.nn.Module) -> _Known:
    found: _Known = {}
    for path, inner in module.named_modules():
        attributes = {name: _frozen(value) for name, value in inner.__dict__.items() if name not in _LEFT_OUT}
        attributes["__class__"], attributes["_modules"] = type(inner), tuple(inner._modules.items())
        found[path] = inner, attributes
    return found


class _Same:
    """Equal to what stands for the same object, which it keeps alive, so that no other gets its id."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


_TENSOR = "holds tensors"
_MANY = 100
_CONTAINERS = {list, tuple, set, frozenset, dict, OrderedDict, deque}
_VALUES = {bool, int, str, bytes, type(None), torch.dtype, torch.device, torch.Size}


def _frozen(value: Any) -> Any:
    """What an attribute is compared by."""
    kind = type(value)
    if kind in _CONTAINERS:
        if not value:
            return kind
        if len(value) > _MANY:
            return _Same(value), len(value)
        items = [item for pair in value.items() for item in pair] if kind in (dict, OrderedDict) else value
        inner = (frozenset if kind in (set, frozenset) else tuple)(map(_frozen, items))
        return _TENSOR if _TENSOR in inner else (kind, inner)
    if kind in _VALUES:
        return kind, value
    if kind in (float, complex):
        return kind, repr(value)  # so that NaN is NaN, and -0 is not 0
    return _TENSOR if isinstance(value, (torch.Tensor, ReferenceType)) else _Same(value)
