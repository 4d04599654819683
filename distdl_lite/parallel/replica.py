"""The weights of a module whose replicas are on other ranks, and its settings, which are all else that it holds."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType

import torch

from distdl_lite.nn.module import TensorStructure
from distdl_lite.operator import Operator
from distdl_lite.parallel.orders import Pickler
from distdl_lite.parallel.rows import refusal


@dataclass(frozen=True)
class Weight:
    """A parameter or buffer, under all the names it has."""

    names: tuple[str, ...]
    structure: TensorStructure
    is_buffer: bool


@dataclass(frozen=True)
class News:
    """What has changed since the weights were last sent.

    Attributes
    ----------
    weights : tuple of Weight, or None
        All of them, if names, shapes, dtypes, devices or requires_grad have changed.
    training : tuple of bool
        Of all modules inside.
    groups : tuple of int
        Which groups are sent.
    """

    weights: tuple[Weight, ...] | None
    training: tuple[bool, ...]
    groups: tuple[int, ...]


class Weights:
    """What was last sent, as views of one flat tensor per group; a group is the parameters, or buffers, of a dtype.

    The root compares its module with it before each forward, bit by bit: version counters miss what fused optimizers, writes
    through ``.data`` and inference mode change.
    """

    def __init__(self) -> None:
        self.weights: tuple[Weight, ...] = ()
        self._values: list[torch.Tensor] = []
        self._parameters: list[torch.Tensor] = []
        self._is_installed = False

    def news(self, module: torch.nn.Module) -> tuple[News, list[torch.Tensor]]:
        """On the root, what the others must be told and sent, and the module's tensors."""
        weights, tensors = _described(module)
        known = weights == self.weights
        groups = [
            number
            for number, members in enumerate(_groups(weights))
            if not (known and all(_same_bits(tensors[i], self._values[i]) for i in members))
        ]
        training = tuple(inner.training for inner in module.modules())
        return News(None if known else weights, training, tuple(groups)), tensors

    def send(self, news: News, tensors: Sequence[torch.Tensor] | None, operator: Callable[[int], Operator]) -> None:
        """Broadcast the groups that have changed; `tensors` are the root's, None elsewhere."""
        if news.weights is not None:
            self.weights = news.weights
            self._values = self._parameters = [torch.empty(0)] * len(self.weights)
        groups = _groups(self.weights)
        for number in news.groups:
            members = [self.weights[i].structure for i in groups[number]]
            sizes = [member.size for member in members]
            if tensors is None:
                flat = torch.empty(0, dtype=members[0].dtype, device=members[0].device)
            else:
                flat = torch.cat([tensors[i].detach().reshape(-1) for i in groups[number]])
            with torch.inference_mode(False):  # they are used outside it too
                parts = operator(sum(sizes)).apply(flat).split(sizes)
            for i, part, member in zip(groups[number], parts, members, strict=True):
                self._values[i] = part.view(member.shape)
            self._is_installed = False

    def install(self, module: torch.nn.Module, training: Sequence[bool]) -> list[torch.Tensor]:
        """Make a module on another rank a replica; its tensors in the order of the weights.

        Parameters stay what they are until others come, as graphs and checkpoints inside the module may need them again.
        Buffers are fresh at each forward, which may change them.

        Raises
        ------
        ValueError
            If the module is not built as the root's.
        """
        inner = list(module.modules())
        if not self._is_installed:
            self._check(module, len(inner) == len(training))
            self._parameters = [
                torch.nn.Parameter(value, weight.structure.requires_grad)
                for weight, value in zip(self.weights, self._values, strict=True)
            ]
        tensors = []
        for weight, value, tensor in zip(self.weights, self._values, self._parameters, strict=True):
            if weight.is_buffer:
                tensor = value.clone().requires_grad_(weight.structure.requires_grad)
            if weight.is_buffer or not self._is_installed:
                _put(module, weight, tensor)
            tensors.append(tensor)
        for one, flag in zip(inner, training, strict=True):
            one.training = flag
        self._is_installed = True
        return tensors

    def adapt(self, module: torch.nn.Module, changes: bytes) -> torch.nn.Module:
        """Make on another rank the root's changes of settings; returns the module, which may be another one."""
        self._is_installed = False
        module, changed = _Unpickler(changes, module).load()
        for inner, values, gone in changed:
            inner.__class__ = values.pop("__class__", inner.__class__)
            inner.__dict__.update(values)
            for name in gone:
                inner.__dict__.pop(name, None)
        return module

    def _check(self, module: torch.nn.Module, as_many_modules: bool) -> None:
        wanted = {name: weight.structure.shape for weight in self.weights for name in weight.names}
        own = {name: tuple(tensor.shape) for name, tensor, _ in _named(module)}
        odd = sorted(name for name in {*wanted, *own} if wanted.get(name) != own.get(name))
        if odd or not as_many_modules:
            texts = [f"{name} {own.get(name, 'missing')}, not {wanted.get(name, 'missing')}" for name in odd]
            raise ValueError(f"the module is not the root's: {'; '.join(texts) or 'another number of modules inside'}")


def _named(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Parameters, and buffers, under all their names."""
    for prefix, inner in module.named_modules(remove_duplicate=False):
        for is_buffer, own in enumerate((inner._parameters, inner._buffers)):
            for name, tensor in own.items():
                if tensor is not None:
                    yield (f"{prefix}.{name}" if prefix else name), tensor, bool(is_buffer)


def _described(module: torch.nn.Module) -> tuple[tuple[Weight, ...], list[torch.Tensor]]:
    """Parameters and buffers, each once."""
    found: dict[int, tuple[torch.Tensor, list[str], bool]] = {}
    for name, tensor, is_buffer in _named(module):
        found.setdefault(id(tensor), (tensor, [], is_buffer))[1].append(name)
    weights = []
    for tensor, names, is_buffer in found.values():
        structure = TensorStructure.of(tensor)
        error = refusal(structure, names[0])
        if error is not None:
            raise error
        weights.append(Weight(tuple(names), structure, is_buffer))
    return tuple(weights), [tensor for tensor, _, _ in found.values()]


def _groups(weights: Sequence[Weight]) -> list[list[int]]:
    """Positions of the weights that travel together."""
    groups: dict[Any, list[int]] = {}
    for i, weight in enumerate(weights):
        groups.setdefault((weight.is_buffer, weight.structure.dtype, weight.structure.device), []).append(i)
    return list(groups.values())


def _put(module: torch.nn.Module, weight: Weight, tensor: torch.Tensor) -> None:
    for name in weight.names:
        path, _, last = name.rpartition(".")
        owner = module.get_submodule(path)
        (owner._buffers if weight.is_buffer else owner._parameters)[last] = tensor


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors of a dtype and shape hold the same bits, also of NaN and -0."""
    return bool(torch.equal(_bits(left), _bits(right)))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.view(_BITS[tensor.element_size()])


# ---- settings --------------------------------------------------------------------------------------------------------


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
        """On the root, what `Weights.adapt` needs to make the others' the same; None where nothing has changed.

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


class _Pickler(Pickler):
    """Writes paths for the modules that the other ranks have, and shapes for the weights of those that they do not."""

    def __init__(self, file: io.BytesIO, module: torch.nn.Module, paths: Mapping[int, str]) -> None:
        super().__init__(file)
        self._written: dict[int, Any] = {id(t): tuple(t.shape) for _, t, _ in _named(module)}
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
