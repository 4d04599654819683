"""The weights of a module whose replicas are on other ranks: what of them is sent again, and where it is put."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from distdl_lite.agreement import TensorStructure
from distdl_lite.buckets import grouped
from distdl_lite.operator import Operator
from distdl_lite.parallel.root.batch import check_movable


@dataclass(frozen=True)
class Weight:
    """A parameter or buffer, under all the names it has."""

    names: tuple[str, ...]
    structure: TensorStructure
    is_buffer: bool


@dataclass(frozen=True)
class News:
    """All that has changed since the weights were last sent."""

    weights: tuple[Weight, ...] | None  # all, if names, shapes, dtypes, devices or requires_grad have changed
    layers: dict[str, str] | None  # kinds and options by name: all, if one has changed
    training: tuple[bool, ...]  # of all modules inside
    groups: tuple[int, ...]  # the numbers of those that are sent


class Weights:
    """The weights that were last sent: views of one flat tensor per group, the parameters, or buffers, of a dtype.

    The root compares its module with it before each forward, bit by bit: version counters miss what fused optimizers, writes
    through ``.data`` and inference mode change.
    """

    def __init__(self) -> None:
        self.weights: tuple[Weight, ...] = ()
        self._layers: dict[str, str] = {}
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
        training, layers = tuple(inner.training for inner in module.modules()), _layers(module)
        changed = None if layers == self._layers else layers
        return News(None if known else weights, changed, training, tuple(groups)), tensors

    def send(self, news: News, tensors: Sequence[torch.Tensor] | None, operator: Callable[[int], Operator]) -> None:
        """Broadcast the groups that have changed; `tensors` are the root's, None elsewhere."""
        if news.weights is not None:
            self.weights = news.weights
            self._values = self._parameters = [torch.empty(0)] * len(self.weights)
        if news.layers is not None:
            self._layers, self._is_installed = news.layers, False
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
        Buffers are fresh at each forward, which may change them. ValueError if the module is not built as the root's.
        """
        if not self._is_installed:
            self._check(module)
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
        for inner, flag in zip(module.modules(), training, strict=True):
            inner.training = flag
        self._is_installed = True
        return tensors

    def _check(self, module: torch.nn.Module) -> None:
        shapes = {name: weight.structure.shape for weight in self.weights for name in weight.names}
        own_shapes = {name: tuple(tensor.shape) for name, tensor, _ in _named(module)}
        for wanted, own in ((shapes, own_shapes), (self._layers, _layers(module))):
            odd = sorted(name for name in {*wanted, *own} if wanted.get(name) != own.get(name))
            if odd:
                texts = [f"{name} {own.get(name, 'missing')}, not {wanted.get(name, 'missing')}" for name in odd]
                raise ValueError(
                    f"the module is not the root's: {'; '.join(texts)}; change it on all ranks, before serve()"
                )


def _named(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Parameters, and buffers, under all their names; also those that a module's own `named_parameters` leaves out."""
    of = torch.nn.Module
    yield from ((name, p, False) for name, p in of.named_parameters(module, remove_duplicate=False))
    yield from ((name, b, True) for name, b in of.named_buffers(module, remove_duplicate=False))


def _layers(module: torch.nn.Module) -> dict[str, str]:
    """The kinds of all modules inside, and the options of torch's own; a user's may print what forward changes."""
    layers = {}
    for path, inner in module.named_modules():
        is_torchs = type(inner).extra_repr.__module__.startswith("torch.nn.modules.")
        prints_tensors = isinstance(inner, (torch.nn.ParameterList, torch.nn.ParameterDict))
        options = inner.extra_repr() if is_torchs and not prints_tensors else ""
        layers[f"layer {path or 'itself'}"] = f"{type(inner).__name__}({options})"
    return layers


def _described(module: torch.nn.Module) -> tuple[tuple[Weight, ...], list[torch.Tensor]]:
    """Parameters and buffers, each once."""
    found: dict[int, tuple[torch.Tensor, list[str], bool]] = {}
    for name, tensor, is_buffer in _named(module):
        found.setdefault(id(tensor), (tensor, [], is_buffer))[1].append(name)
    weights = []
    for tensor, names, is_buffer in found.values():
        structure = TensorStructure.of(tensor)
        check_movable(structure, names[0])
        weights.append(Weight(tuple(names), structure, is_buffer))
    return tuple(weights), [tensor for tensor, _, _ in found.values()]


def _groups(weights: Sequence[Weight]) -> list[list[int]]:
    """Positions of the weights that travel together."""
    kinds = [(weight.is_buffer, weight.structure.dtype, weight.structure.device) for weight in weights]
    return grouped(range(len(weights)), kinds.__getitem__)


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
