"""DistDL's layers: this library's, with DistDL's arguments, defaults and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import Parameter, Signature
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from distdl_lite import layout as lay
from distdl_lite import nn as dnn
from distdl_lite.agreement import check_met, raised_together, refused_together
from distdl_lite.compat.distdl.helpers import TensorStructure, assemble_slices, distdl_padding_to_torch_padding
from distdl_lite.compat.distdl.partitions import plain
from distdl_lite.nn.options import listed
from distdl_lite.nn.pool.spatial import View
from distdl_lite.nn.pool.upsample import Interpolation
from distdl_lite.partition import Partition

_OLD_NAMES = {"weight": ("sublinear.weight", "gamma"), "bias": ("sublinear.bias", "beta")}
_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


class Module(dnn.Module):
    """Base of a program's own modules: each rank sets up when it sees another input than before, as DistDL does.

    Set-up may communicate, and returns nothing. The layers inside agree by themselves.
    """

    def __init__(self, *partitions: Any) -> None:
        super().__init__(*map(plain, partitions))
        self._distdl_is_setup = False
        self._input_tensor_structure = TensorStructure()

    def _distdl_module_setup(self, input: tuple[Any, ...]) -> None:
        self._distdl_is_setup = True
        self._input_tensor_structure = TensorStructure(input[0])

    def _distdl_module_teardown(self, input: tuple[Any, ...]) -> None:
        self._distdl_is_setup = False
        self._input_tensor_structure = TensorStructure()

    def _distdl_input_changed(self, input: tuple[Any, ...]) -> bool:  # type: ignore[override]
        return self._input_tensor_structure != TensorStructure(input[0])

    def _distdl_forward_pre_hook(self, input: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        if self._distdl_is_setup and self._distdl_input_changed(input):
            self._distdl_module_teardown(input)
        if not self._distdl_is_setup:
            self._distdl_module_setup(input)
        return input, kwargs


class _Adapted:
    """What DistDL's layers do with weights: those set on the first rank alone count, and its checkpoints load."""

    _distdl_is_level = False  # whether replicas have been given the first holder's values

    def _distdl_forward_pre_hook(self: Any, input: Any, kwargs: Any) -> Any:
        if self._distdl_places and not self._distdl_is_level:
            self._distdl_level()
        return super()._distdl_forward_pre_hook(input, kwargs)  # type: ignore[misc]

    def _distdl_level(self: Any) -> None:
        if self._distdl_team is None:
            self._distdl_resolve()
        held = {**self._parameters, **self._buffers}
        pairs = [(held[name], place) for name, place in self._distdl_places.items() if held.get(name) is not None]
        if self._distdl_is_inside:
            team, label = self._distdl_team, self._distdl_label
            dtypes = ", ".join(str(tensor.dtype) for tensor, _ in pairs)
            check_met(team, label, f"new weights ({dtypes}) of {label} number {self._distdl_number}")
            with raised_together(team, label):
                self._distdl_check_weights()
        for tensor, place in pairs:
            if place.replicas.team.size > 1:
                values = tensor.detach().contiguous()
                self._distdl_transport.broadcast(place.replicas.team, values, _first(place))
                if self._distdl_transport.rank != _first(place):
                    with torch.no_grad():
                        tensor.copy_(values)
        self.__dict__["_distdl_is_level"] = True

    def _load_from_state_dict(self: Any, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Take DistDL's names and shapes. What only the first holder has, the others get at the next call."""
        rank = self._distdl_partitions[0].world_transport.rank
        for name, place in self._distdl_places.items():
            tensor = self._parameters.get(name, self._buffers.get(name))
            found = [old for n in (name, *_OLD_NAMES.get(name, ())) if (old := prefix + n) in state]
            value = state.pop(found[0]) if found else None
            if tensor is None:
                continue
            if (
                value is not None and tensor.dim() == 1 and value.squeeze().shape == tensor.squeeze().shape
            ):  # [1, C, 1, 1]
                value = value.reshape(tensor.shape)
            elif (value is None or not value.numel()) and (rank != _first(place) or name == "num_batches_tracked"):
                value = tensor.detach()
            if value is not None:  # torch says what is wrong
                state[prefix + name] = value
        self.__dict__["_distdl_is_level"] = False
        super()._load_from_state_dict(state, prefix, *rest)  # type: ignore[misc]

    # Where DistDL keeps the weight of a linear layer and of a convolution.
    sublinear = conv_layer = property(lambda self: self)


class _Moving:
    """What DistDL's movements do on ranks that get nothing, also on those outside: the batch stays, as flattening needs it."""

    def _distdl_outside(self: Any, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(len(x), 0) if self.preserve_batch and x.dim() == 1 else x


def _first(place: Any) -> int:
    """The rank of the grid's order that comes first among those that hold what this rank holds; -1 for none."""
    grid = place.layout.grid
    return min(place.replicas.team, key=grid.ranks.index, default=-1)


def _like(base: type, order: Any, convert: Callable[[dict[str, Any]], dict[str, Any]] = dict, **defaults: Any) -> Any:
    """A layer of this library with the arguments of DistDL's, in their order, or what `order` says of those given."""

    def init(self: Any, *args: Any, **options: Any) -> None:
        names = (order(args) if callable(order) else order).split()
        given = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        given.append(Parameter("options", Parameter.VAR_KEYWORD))
        taken = Signature(given).bind_partial(*args, **options).arguments
        found = {**defaults, **taken.pop("options", {}), **taken}
        found.pop("buffer_manager", None)
        base.__init__(self, **convert({name: plain(value) for name, value in found.items()}))  # type: ignore[misc]

    words = f"DistDL's name of `distdl_lite.nn.{base.__name__}`, with its arguments."
    adapted = _Adapted if issubclass(base, dnn.Layer) else _Moving
    return type(base.__name__, (adapted, base), {"__init__": init, "__module__": __name__, "__doc__": words})


def _by_partitions(args: tuple[Any, ...]) -> str:
    partitions = "P_x P_y P_w" if len(args) > 1 and isinstance(plain(args[1]), Partition) else "P_x"
    return f"{partitions} in_channels out_channels kernel_size stride padding padding_mode dilation groups bias buffer_manager"


def _average(options: dict[str, Any]) -> dict[str, Any]:
    if set(listed(options.pop("dilation", 1))) != {1}:
        raise ValueError("an average pool has no dilation")
    return options


def _upsample(options: dict[str, Any]) -> dict[str, Any]:
    dim = options["P_x"].dim
    for name in ("size", "scale_factor"):
        value = listed(options.get(name))
        options[name] = value[2:] if len(value) == dim else options.get(name)
    if options["mode"] == "linear":
        options["mode"] = _LINEAR[dim - 2]
    return {**options, "align_corners": None if "nearest" in options["mode"] else options["align_corners"]}


def _dims(name: str, order: Any, **given: Any) -> list[Any]:
    """The layers of one, two and three dims."""
    return [_like(getattr(dnn, f"{name}{n}d"), order, **given) for n in (1, 2, 3)]


_MOVES = "P_x P_y transpose_src transpose_dest preserve_batch"
_POOL = "P_x kernel_size stride padding dilation buffer_manager"
Broadcast, SumReduce = _like(dnn.Broadcast, _MOVES), _like(dnn.SumReduce, _MOVES)
AllSumReduce = _like(dnn.AllSumReduce, "P_x axes_reduce axes_keep")
Repartition = DistributedTranspose = _like(dnn.Repartition, "P_x P_y preserve_batch")
DistributedConv1d, DistributedConv2d, DistributedConv3d = _dims(
    "DistributedConv", _by_partitions, in_channels=1, out_channels=1, kernel_size=1
)
DistributedLinear = _like(dnn.DistributedLinear, "P_x P_y P_w in_features out_features bias")
DistributedMaxPool1d, DistributedMaxPool2d, DistributedMaxPool3d = _dims("DistributedMaxPool", _POOL, stride=1)
DistributedAvgPool1d, DistributedAvgPool2d, DistributedAvgPool3d = _dims(
    "DistributedAvgPool", _POOL, convert=_average, stride=1
)
DistributedBatchNorm = _like(dnn.DistributedBatchNorm, "P_x num_features eps momentum affine track_running_stats")
DistributedUpsample = _like(
    dnn.DistributedUpsample,
    "P_x buffer_manager size scale_factor mode align_corners",
    convert=_upsample,
    mode="linear",
    align_corners=False,
)
DistributedL1Loss, DistributedMSELoss, DistributedPoissonNLLLoss = (
    _like(getattr(dnn, f"Distributed{kind}Loss"), "P_x reduction") for kind in ("L1", "MSE", "PoissonNLL")
)
DistributedBCELoss, DistributedBCEWithLogitsLoss, DistributedKLDivLoss = (
    _like(getattr(dnn, f"Distributed{kind}Loss"), "P_x reduction") for kind in ("BCE", "BCEWithLogits", "KLDiv")
)


class PadNd(torch.nn.Module):
    """Each rank's own block, padded with a value by pairs of points for each dim."""

    def __init__(self, pad_width: Any, value: float = 0, partition: Any = None) -> None:
        super().__init__()
        self.is_inside = partition is None or partition.active
        self.pads, self.value = distdl_padding_to_torch_padding(pad_width) if self.is_inside else (), value

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.pad(input, self.pads, value=self.value) if self.is_inside else input


class UnpadNd(PadNd):
    """The block without such points."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.pad(input, [-n for n in self.pads]) if self.is_inside else input


class _Grown(dnn.Movement):
    """Blocks grown by what each rank receives of its neighbours, as pairs for each dim."""

    def __init__(self, P_x: Any, received: Any) -> None:
        super().__init__(P_x, P_x)
        told = P_x.allgather_data([[int(n) for n in pair] for pair in received] if P_x.active else None)
        self.received = dict(zip(P_x.ranks, told or (), strict=False))

    def layouts(self, shapes: Any) -> tuple[lay.Layout, lay.Layout]:
        X = lay.blocks_from_shapes(self.P_x.grid_of_ranks, shapes)
        found: list[dict[int, Any]] = [{} for _ in X.dims]
        for rank, pairs in self.received.items():
            for d, (i, pair) in enumerate(zip(X.grid.index(rank) or (), pairs, strict=True)):
                (start, stop), (_, end) = X.dims[d].ranges[i], X.dims[d].ranges[-1]
                if start < pair[0] or stop + pair[1] > end:
                    raise ValueError(f"rank {rank} holds {start, stop} of {end} points of dim {d}, and receives {pair}")
                if found[d].setdefault(i, pair) != pair:
                    raise ValueError(f"rank {rank} receives {pair} along dim {d}, others beside it {found[d][i]}")
        grown = (
            tuple((a - of[i][0], b + of[i][1]) for i, (a, b) in enumerate(dim.ranges))
            for dim, of in zip(X.dims, found, strict=True)
        )
        return X, lay.Layout(X.grid, tuple(lay.Dim(ranges, (d,)) for d, ranges in enumerate(grown)))


class HaloExchange(torch.nn.Module):
    """A block that is padded for its halo, with what its neighbours hold in the places that are received; a copy of it.

    The halo's other places keep what they hold. What each rank sends follows from what the others receive.
    """

    def __init__(
        self,
        P_x: Any,
        halo_shape: Any,
        recv_buffer_shape: Any,
        send_buffer_shape: Any = None,
        buffer_manager: Any = None,
    ) -> None:
        super().__init__()
        self.P_x, self.is_inside = plain(P_x), P_x.active
        with refused_together(self.P_x, "HaloExchange"):
            if self.is_inside:
                self.halo, self.edge = np.asarray(halo_shape), np.subtract(halo_shape, recv_buffer_shape)
                shapes = {np.shape(halo_shape), np.shape(recv_buffer_shape)}
                if shapes != {(P_x.dim, 2)} or self.halo.min() < 0 or self.edge.min() < 0:
                    raise ValueError(
                        f"a halo of {halo_shape} and what is received of it, {recv_buffer_shape}, are no pairs of {P_x.dim} dims"
                    )
        self.exchange = _Grown(self.P_x, recv_buffer_shape)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.is_inside:
            return input
        with refused_together(self.P_x, "HaloExchange"):
            if input.dim() != len(self.halo) or any(
                n < sum(pair) for n, pair in zip(input.shape, self.halo, strict=True)
            ):
                raise ValueError(
                    f"a block of shape {tuple(input.shape)} has no room for a halo of {self.halo.tolist()}"
                )
        output = input.clone()
        block, grown = (assemble_slices(of[:, 0], input.shape - of[:, 1]) for of in (self.halo, self.edge))
        output[grown] = self.exchange(input[block])
        return output


class Interpolate(torch.nn.Module):
    """This rank's outputs of the interpolation of a tensor, from a block of inputs: no rank is asked for more.

    Starts, stops and shapes are of all dims, those of batch and channels too.
    """

    def __init__(
        self,
        x_local_start: Any,
        x_local_stop: Any,
        x_global_shape: Any,
        y_local_start: Any,
        y_local_stop: Any,
        y_global_shape: Any,
        scale_factor: Any = None,
        mode: str = "linear",
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        space = len(x_global_shape) - 2
        self.boxes = [
            tuple(map(int, of_dim))
            for of_dim in zip(
                x_local_start, x_local_stop, x_global_shape, y_local_start, y_local_stop, y_global_shape, strict=True
            )
        ][2:]
        factors = None if scale_factor is None else tuple(map(float, listed(scale_factor, space)[-space:]))
        mode = _LINEAR[space] if mode == "linear" else mode
        self.kernel = Interpolation(space, mode, factors, None if "nearest" in mode else align_corners)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        wanted = tuple(stop - start for start, stop, *_ in self.boxes)
        if input.shape[2:] != wanted:
            raise ValueError(f"the block is of {tuple(input.shape[2:])} points, not {wanted}")
        views = []
        for d, (start, stop, length, first, last, outputs) in enumerate(self.boxes):
            geometry = self.kernel.geometry(d, length, outputs, input.dtype, input.device.type)
            low, high = geometry.reads(first, last)
            if not start <= low <= high <= stop:
                raise ValueError(f"outputs {first, last} of dim {d + 2} read {low, high}, the block is {start, stop}")
            views.append(View(geometry, length, (first, last), (start, stop), False))
        return self.kernel.part(views)(input)
