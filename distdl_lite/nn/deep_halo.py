"""Runs of convolutions that exchange one deep halo in place of one halo a layer.

The outputs of a run's last layer are followed backwards to the inputs that they read through all layers. One operator fetches
these, and each rank computes alone, layer by layer, from the box that it holds to one that holds what later layers read. What
neighbours compute too gives each of them a share of its gradients, which the operator's adjoint and the sums over replicas
add up.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _has_any_global_hook as _any_global_hook

from distdl_lite import layout as lay
from distdl_lite.layout import Layout
from distdl_lite.nn.conv import DistributedConv1d, DistributedConv2d, DistributedConv3d
from distdl_lite.nn.convolution import Convolution
from distdl_lite.nn.deep_geometry import Deep, Link, Spans, begins_with_relu, deepest, lengths_of, outputs
from distdl_lite.nn.module import Module
from distdl_lite.nn.movement import agreed_inputs
from distdl_lite.nn.options import numbers
from distdl_lite.operator import NOTHING, Node, Operator
from distdl_lite.plan import plan
from distdl_lite.reducer import Reducer, Replicas, reducer_of

_CONVOLUTIONS = frozenset({DistributedConv1d, DistributedConv2d, DistributedConv3d})
_POINTWISE = frozenset({
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardtanh,
    nn.Hardsigmoid, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Softplus, nn.Softsign, nn.Sigmoid, nn.LogSigmoid,
    nn.Tanh, nn.Threshold, nn.Identity,
})  # fmt: skip

Call = Callable[[torch.Tensor], torch.Tensor]


class DeepHalo(Module):
    """Layers one after the other, in which runs of convolutions exchange one deep halo in place of one halo a layer.

    Input, output and weights are those of ``torch.nn.Sequential(*layers)``, by the same names. Layers of a run wait for the
    other ranks once in forward and once in backward; what they read beyond their blocks is computed again on each rank that
    needs it.

    Parameters
    ----------
    *layers : torch.nn.Module
        Of any kind, or one OrderedDict of them.
    most : float
        How much a run may compute beyond its outputs: the points that a rank computes in all its layers over those of its
        blocks, less one, on the rank where that is most. A run that would need more is cut in shorter ones; 0 leaves those
        that compute nothing twice.

    Raises
    ------
    TypeError
        If `most` is no number.
    ValueError
        If it is negative; at build, if the ranks disagree about layers or hooks. On all ranks alike.

    Notes
    -----
    A run is two or more ``DistributedConv1d/2d/3d`` and the pointwise activations of torch between and behind them. The
    convolutions have zero padding and are cut along batch and space alone, all over the same ranks. All other layers are called
    as they stand: so are convolutions and activations with hooks or a forward of their own, and all where a rank has an empty
    block, autocast is on or input and weights differ in dtype.

    Forward and backward of a run send one exchange each, of as many points as all its layers reach; gradients of
    weights are summed as ever. A run keeps one copy of its input with the halo. The ranks agree once a call, also
    inside a module that rides on one agreement, since hooks may change.
    Source: Demmel, Hoemmen, Mohiyuddin and Yelick, "Avoiding communication in sparse matrix computations", IPDPS 2008.
    """

    def __init__(self, *layers: Any, most: float = 0.1) -> None:
        super().__init__()
        numbers(self, most=most)
        if not most >= 0:
            raise self._refuse(f"most={most} must not be negative")
        self.most = most
        is_named = len(layers) == 1 and isinstance(layers[0], OrderedDict)
        for name, layer in layers[0].items() if is_named else zip(map(str, count()), layers, strict=False):
            self.add_module(name, layer)

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._modules.values())

    def __getitem__(self, which: int | slice) -> Any:
        """A layer, or a container of some of them, as of torch.nn.Sequential."""
        if isinstance(which, slice):
            return DeepHalo(OrderedDict(list(self._modules.items())[which]), most=self.most)
        return list(self)[which]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for step in self if self._distdl_plan is None else self._distdl_plan:
            x = step(x)
        return x

    def extra_repr(self) -> str:
        return f"most={self.most}"

    # ---- what the ranks agree on -------------------------------------------------------------------------------------

    def _distdl_ride(self) -> None:
        """A module around this one does not know of the hooks on its layers."""

    def _distdl_local_parts(self, input: tuple[Any, ...], kwargs: Any = None) -> list[Any]:
        return [*super()._distdl_local_parts(input, kwargs), *self, *self._hooked()]

    def _distdl_options(self) -> str:
        """A layer in a run does not compare its options itself."""
        known = (f"{name}: {layer}" for name, layer in self._modules.items() if _may_run(layer))
        return "; ".join([super()._distdl_options(), *known])

    def _distdl_mode(self) -> str:
        words = [super()._distdl_mode(), *(f"hooks on {name}" for name in self._hooked())]
        for name, layer in self._modules.items():
            if type(layer) in _CONVOLUTIONS:
                words += (f"{name}.{n} {_kind(p)}" for n, p in layer._parameters.items() if p is not None)
        return ", ".join(words)

    def _hooked(self) -> list[str]:
        """The layers that are called as they stand though they could be in a run."""
        if _any_global_hook():
            return ["all layers"]
        return [f"layer {name}" for name, layer in self._modules.items() if _may_run(layer) and _is_hooked(layer)]

    # ---- set-up ------------------------------------------------------------------------------------------------------

    def _distdl_module_setup(self, input: tuple[Any, ...]) -> list[Call]:
        """The steps of forward: layers, and runs of them."""
        steps: list[Call] = []
        for links in _runs(self):
            is_run = len(links) > 1 and self._distdl_transport.rank in links[0][0].P_x.ranks
            steps += [_Run(links, self.most)] if is_run else chain(*links)
        return steps


def _may_run(layer: Any) -> bool:
    return type(layer) in _CONVOLUTIONS or type(layer) in _POINTWISE


def _is_hooked(layer: Any) -> bool:
    """Whether a call of the layer may be more than its class's forward."""
    return bool(
        len(layer._forward_pre_hooks) > isinstance(layer, Module)
        or layer._forward_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or layer._compiled_call_impl is not None
        or "forward" in layer.__dict__
        or (isinstance(layer, Module) and type(layer).forward is not Convolution.forward)
    )


def _kind(parameter: torch.Tensor) -> str:
    return f"{parameter.dtype}{'' if parameter.requires_grad else ' frozen'}"


def _runs(layers: Any) -> Iterator[Sequence[Link]]:
    """The layers in maximal runs; one that is in none comes alone."""
    links: list[list[Any]] = []
    for layer in layers:
        runs = _may_run(layer) and not (_any_global_hook() or _is_hooked(layer))
        if runs and type(layer) in _POINTWISE and links:
            links[-1].append(layer)
            continue
        runs = runs and type(layer) in _CONVOLUTIONS and _is_local(layer)
        if links and not (runs and layer.P_x.grid_of_ranks == links[0][0].P_x.grid_of_ranks):
            yield links
            links = []
        if runs:
            links.append([layer])
        else:
            yield [[layer]]
    if links:
        yield links


def _is_local(layer: Convolution) -> bool:
    """Whether a rank that has a convolution's halo computes its block of the output alone."""
    P, work = layer.P_x, layer._work
    batch, features, *space = P.shape
    return (
        layer.padding_mode == "zeros"
        and features == 1 < max(space)
        and P.grid_of_ranks == layer.P_y.grid_of_ranks
        and (work.shape, tuple(work.ranks)) == ((batch, 1, 1, *space), tuple(P.ranks))
    )


# ---- a run -----------------------------------------------------------------------------------------------------------


class _Run(Module):
    """Convolutions that may exchange one halo; it belongs to one structure of the container and holds none of the weights."""

    def __init__(self, links: Sequence[Link], most: float) -> None:
        super().__init__(links[0][0].P_x)
        self._distdl_label = DeepHalo.__name__
        self.links, self.most = links, most

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for step in self._distdl_plan:
            x = step(x)
        return x

    def _distdl_module_setup(self, input: tuple[Any, ...]) -> list[Call]:
        P, convs = self.links[0][0].P_x, [link[0] for link in self.links]
        try:
            inputs = agreed_inputs(self._distdl_label, self._distdl_structure, P)
            X = lay.blocks(P.grid_of_ranks, lay.cuts_from_shapes(P.grid_of_ranks, inputs.shapes))
            lengths_of(convs, X)
        except (TypeError, ValueError):  # the layer that the input does not fit will say so, on all ranks
            return [*chain(*self.links)]
        dtypes = {inputs.dtype, *(p.dtype for conv in convs for p in conv.parameters())}
        is_plain = inputs.dtype.is_floating_point and not torch.is_autocast_enabled(inputs.device)
        return self._steps(X, inputs.requires_grad) if is_plain and len(dtypes) == 1 else [*chain(*self.links)]

    def _steps(self, X: Layout, graph: bool) -> list[Call]:
        """The fewest exchanges: each run as long as it may be. `graph` tells whether any rank's input requires grad."""
        convs, steps = [link[0] for link in self.links], list[Call]()
        done = 0
        while done < len(convs):
            deep = deepest(self.links[done:], X, self.most)
            links = self.links[done : done + (1 if deep is None else len(deep.lengths) - 1)]
            steps += links[0] if deep is None else [self._fused(links, deep, X, graph)]
            graph = graph or any(p.requires_grad for conv, *_ in links for p in conv.parameters())
            X = outputs([link[0] for link in links], X)
            done += len(links)
        return steps

    def _fused(self, links: Sequence[Link], deep: Deep, X: Layout, graph: bool) -> Call:
        """One exchange, and each layer from what this rank holds."""
        transport = self._distdl_transport
        fetch = Operator(plan(X, deep.Z, transport.rank), transport, self._distdl_label, graph)
        index = X.grid.index(transport.rank)
        assert index is not None
        here = zip(*(dim[i] for dim, i in zip(deep.spans, index[2:], strict=True)), strict=True)
        steps = [_step(link, spans) for link, spans in zip(links, here, strict=True)]
        return _Fused(fetch, steps, reducer_of(transport))


Crop = tuple[int, int, int]  # dim, start and length


def _step(link: Link, spans: Spans) -> _Step:
    """A layer on this rank, and those behind it."""
    conv, *behind = link
    crops = [(2 + d, s.kept[0] - s.made[0], s.kept[1] - s.kept[0]) for d, s in enumerate(spans) if s.made != s.kept]
    if crops and begins_with_relu(behind):
        behind[0] = partial(_CroppedReLU.apply, crops)
    elif crops:
        behind.insert(0, partial(_cropped, crops))
    blanks = [(2 + d, start, stop - start) for d, s in enumerate(spans) for start, stop in s.blank]
    if blanks:
        behind.insert(0, partial(_blanked, blanks))
    return _Step(conv, getattr(F, f"conv{conv.dims}d"), tuple(span.padding for span in spans), behind)


def _cropped(crops: Sequence[Crop], x: torch.Tensor) -> torch.Tensor:
    for crop in crops:
        x = x.narrow(*crop)
    return x


def _blanked(blanks: Sequence[Crop], x: torch.Tensor) -> torch.Tensor:
    """A convolution's output with zeros in some places, which backward need not know of: no gradient comes from there."""
    y = x.detach()
    for blank in blanks:
        y.narrow(*blank).zero_()
    return x


@dataclass(frozen=True)
class _Step:
    conv: Convolution
    function: Callable[..., torch.Tensor]
    padding: tuple[int, ...]
    behind: Sequence[Call]

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        x = self.function(x, weight, bias, self.conv.stride, self.padding, self.conv.dilation, self.conv.groups)
        for layer in self.behind:
            x = layer(x)
        return x


class _Fused:
    """Layers that exchange one halo, as one call."""

    def __init__(self, fetch: Operator, steps: Sequence[_Step], reducer: Reducer) -> None:
        self.fetch, self.steps, self.reducer = fetch, steps, reducer
        self.names = [(step.conv, name) for step in steps for name in ("weight", "bias")]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weights = iter(self._weights())
        x = self.fetch(x)
        for step in self.steps:
            x = step(x, next(weights), next(weights))
        return x.contiguous()

    def _weights(self) -> Sequence[Any]:
        """Weight and bias of each layer, whose gradients will be the sums over their replicas."""
        held = [conv.held(name) for conv, name in self.names]
        learned = [n for n, p in enumerate(held) if p is not None and p.requires_grad]
        if learned and torch.is_grad_enabled():
            replicas = [conv._distdl_places[name].replicas for conv, name in map(self.names.__getitem__, learned)]
            used = _Used.apply(self.reducer.token, self.reducer, replicas, *(held[n] for n in learned))
            for n, parameter in zip(learned, used, strict=True):
                held[n] = parameter
        return held


class _Used(Node):
    """The identity whose adjoint sums over the replicas: one node for all weights of a run, as each takes 0.1 ms."""

    @staticmethod
    def forward(
        ctx: Any, token: torch.Tensor, reducer: Reducer, replicas: Sequence[Replicas], *parameters: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.reducer, ctx.replicas, ctx.parameters = reducer, replicas, parameters
        ctx.save_for_backward(NOTHING)
        return tuple(p.view_as(p) for p in parameters)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        _ = ctx.saved_tensors
        found = zip(ctx.parameters, gradients, ctx.replicas, strict=True)
        return None, None, None, *(ctx.reducer.reduce(*each) for each in found)


class _CroppedReLU(Node):
    """The ReLU of a part of a tensor, whose backward writes into the whole's gradient: a crop by itself copies that."""

    @staticmethod
    def forward(ctx: Any, crops: Sequence[Crop], x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(_cropped(crops, x))
        ctx.crops, ctx.shape = crops, x.shape
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor]:
        (y,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            part = torch.ops.aten.threshold_backward(gradient, y, 0)
            for d, start, size in reversed(ctx.crops):
                part = F.pad(part, (*(0, 0) * (len(ctx.shape) - 1 - d), start, ctx.shape[d] - start - size))
            return None, part
        whole = gradient.new_empty(ctx.shape)
        for d, start, size in ctx.crops:
            whole.narrow(d, 0, start).zero_()
            whole.narrow(d, start + size, ctx.shape[d] - start - size).zero_()
        torch.ops.aten.threshold_backward.grad_input(gradient, y, 0, grad_input=_cropped(ctx.crops, whole))
        return None, whole
