"""Programs in the manner of DistDL's own tests and examples, through its names: they compute what one device does."""

from __future__ import annotations

import copy
import importlib
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from distdl_lite.compat.distdl.backends.mpi.partition import MPIPartition
from distdl_lite.compat.distdl.utilities.slicing import assemble_slices, compute_start_index, compute_stop_index
from distdl_lite.compat.distdl.utilities.torch import zero_volume_tensor
from jobs import mpirun, run, torchrun
from ranks import on_ranks

import distdl_lite as dl
import distdl_lite.compat.distdl as distdl
import distdl_lite.nn as dnn
from distdl_lite.testing import adjoint_test, spmd

Case = Callable[[dl.Partition], None]
CASES: list[Case] = []


def case(body: Case) -> Case:
    """A program of four ranks."""
    CASES.append(body)
    return body


@pytest.mark.parametrize("body", CASES, ids=lambda body: body.__name__)
def test_of_threads(body: Case) -> None:
    spmd(4, body)


@on_ranks(4, mpi=True, threads=False)
def test_all_programs(world: dl.Partition) -> None:
    for body in CASES:
        torch.manual_seed(0)
        body(world)


def grid(shape: Any, first: int = 0) -> Any:
    """A grid over the ranks from the first one on, by DistDL's two steps."""
    P_world = MPIPartition(None)
    P_base = P_world.create_partition_inclusive(np.arange(first, first + np.prod(shape)))
    return P_base.create_cartesian_topology_partition(shape)


def block(x: torch.Tensor, P: Any) -> torch.Tensor:
    bounds = compute_start_index(P.shape, P.index, x.shape), compute_stop_index(P.shape, P.index, x.shape)
    return x[assemble_slices(*bounds)].detach().clone().requires_grad_()


def set_on_root(net: torch.nn.Module, serial: torch.nn.Module, is_root: bool) -> None:
    """Copy the weights on the root alone, as programs do whose other ranks hold none; the others have others."""
    for mine, theirs in zip(net.parameters(), serial.parameters(), strict=True):
        with torch.no_grad():
            mine.copy_(theirs) if is_root else mine.fill_(7.0)


def assert_gradients(net: torch.nn.Module, serial: torch.nn.Module) -> None:
    """The gradient of each block of a weight is the block of the serial one."""
    layers = [m for m in net.modules() if getattr(m, "_distdl_places", None)]
    twins = [m for m in serial.modules() if m._parameters]
    for mine, theirs in zip(layers, twins, strict=True):
        for name, whole in ((n, p) for n, p in theirs._parameters.items() if p is not None):
            box = mine._distdl_places[name].layout.box(dl.Partition().rank)
            if box is not None:
                expected = whole.grad[tuple(slice(*r) for r in box)]
                torch.testing.assert_close(mine._parameters[name].grad, expected, rtol=1e-10, atol=1e-10)


def assert_serial(net: Any, serial: Any, x: torch.Tensor, P_x: Any, P_y: Any) -> None:
    """Output, gradient of the input and those of the weights, for blocks over P_x and P_y."""
    x_serial = x.clone().requires_grad_()
    y_serial = serial(x_serial)
    g = torch.linspace(-1, 1, y_serial.numel()).to(y_serial).view_as(y_serial)
    y_serial.backward(g)
    x_local = block(x, P_x) if P_x.active else zero_volume_tensor(dtype=x.dtype, requires_grad=True)
    y = net(x_local)
    assert y.numel() or not P_y.active
    y.backward(block(g, P_y) if P_y.active else torch.zeros_like(y))
    if P_y.active:
        torch.testing.assert_close(y, block(y_serial, P_y), rtol=1e-10, atol=1e-10)
    if P_x.active:
        torch.testing.assert_close(x_local.grad, block(x_serial.grad, P_x), rtol=1e-10, atol=1e-10)
    assert_gradients(net, serial)


# ---- programs -------------------------------------------------------------------------------------------------------


@case
def lenet(world: dl.Partition) -> None:
    """Convolutions over space, linear layers over features, transposes between them."""
    nn, double = distdl.nn, {"dtype": torch.float64}
    P_root, P_conv, P_channels = grid([1, 1, 1, 1]), grid([1, 1, 2, 2]), grid([1, 2, 1, 1])
    P_in, P_out, P_w, P_end = grid([1, 2]), grid([1, 2], 2), grid([2, 2]), grid([1, 1])
    net = torch.nn.Sequential(
        nn.repartition.Repartition(P_root, P_conv),
        nn.DistributedConv2d(P_conv, in_channels=1, out_channels=6, kernel_size=(5, 5), padding=(2, 2)),
        torch.nn.ReLU(),
        nn.DistributedMaxPool2d(P_conv, kernel_size=(2, 2), stride=(2, 2)),
        nn.DistributedConv2d(P_conv, 6, 16, (5, 5)),
        torch.nn.ReLU(),
        nn.DistributedMaxPool2d(P_conv, (2, 2), (2, 2)),
        nn.transpose.DistributedTranspose(P_conv, P_channels),
        torch.nn.Flatten(),
        nn.DistributedLinear(P_in, P_out, P_w, 400, 120),
        torch.nn.ReLU(),
        nn.DistributedLinear(P_out, P_in, P_w, 120, 84),
        torch.nn.ReLU(),
        nn.DistributedLinear(P_in, P_out, P_w, 84, 10),
        nn.DistributedTranspose(P_out, P_end),
    ).to(torch.float64)
    serial = torch.nn.Sequential(
        torch.nn.Conv2d(1, 6, 5, padding=2, **double),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(6, 16, 5, **double),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(400, 120, **double),
        torch.nn.ReLU(),
        torch.nn.Linear(120, 84, **double),
        torch.nn.ReLU(),
        torch.nn.Linear(84, 10, **double),
    )
    convs = [m for m in net if isinstance(m, nn.DistributedConv2d)]
    twins = [m for m in serial if isinstance(m, torch.nn.Conv2d)]
    for conv, twin in zip(convs, twins, strict=True):
        set_on_root(conv, twin, P_root.active)
    linears = [m for m in net if isinstance(m, nn.DistributedLinear)]
    for layer, twin in zip(linears, (m for m in serial if isinstance(m, torch.nn.Linear)), strict=True):
        with torch.no_grad():  # each rank of P_w and P_y its block
            if P_w.active:
                layer.sublinear.weight.copy_(block(twin.weight, P_w))
            if layer.P_y.active:
                layer.sublinear.bias.copy_(twin.bias[layer.P_y.block((1, len(twin.bias)))[1]])
    x = torch.rand(3, 1, 28, 28, **double)
    x = world.broadcast_data(x)
    assert_serial(net, serial, x, P_root, P_end)


class Spectral(distdl.nn.Module):
    """The heart of a Fourier neural operator in two dims: a transform along the dim that is whole, a transpose, the other.

    Its weights are each rank's own block of the modes; the channels are mixed by a matrix that the root alone holds.
    """

    def __init__(self, P_rows: Any, P_columns: Any, P_root: Any, weight: torch.Tensor, mix: torch.Tensor) -> None:
        super().__init__()
        self.there = distdl.nn.Repartition(P_rows, P_columns)
        self.back = distdl.nn.Repartition(P_columns, P_rows)
        self.spread = distdl.nn.Broadcast(P_root, P_rows)
        self.P_rows, self.P_columns, self.weight = P_rows, P_columns, weight
        self.mix = torch.nn.Parameter(mix if P_root.active else zero_volume_tensor(dtype=mix.dtype))

    def _distdl_module_setup(self, input: Any) -> None:
        """Each rank finds its part of the modes from the global structure, for which the ranks communicate."""
        self._distdl_is_setup = True
        self._input_tensor_structure = distdl.utilities.torch.TensorStructure(input[0])
        structure = distdl.backends.mpi.assemble_global_tensor_structure(
            self._input_tensor_structure, self.P_rows, self.P_columns
        )
        P = self.P_columns
        start = compute_start_index(P.shape, P.index, structure.shape)[3]
        stop = compute_stop_index(P.shape, P.index, structure.shape)[3]
        self.modes = torch.nn.Parameter(self.weight[..., start:stop].clone())

    def _distdl_input_changed(self, input: Any) -> bool:
        return self._input_tensor_structure.shape != input[0].shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.einsum("oi,bihw->bohw", self.spread(self.mix).squeeze(), x)
        spectrum = self.there(torch.fft.fft(x, dim=3))
        spectrum = torch.fft.fft(spectrum, dim=2) * self.modes
        x = self.back(torch.fft.ifft(spectrum, dim=2))
        return torch.fft.ifft(x, dim=3).real


@case
def fourier_neural_operator(world: dl.Partition) -> None:
    P_rows, P_columns, P_root = grid([1, 1, 4, 1]), grid([1, 1, 1, 4]), grid([1, 1, 1, 1])
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(2, 3, 9, 7, dtype=torch.float64, generator=generator)
    weight = torch.rand(3, 9, 7, dtype=torch.complex128, generator=generator)
    mix = torch.rand(3, 3, dtype=torch.float64, generator=generator)
    net = Spectral(P_rows, P_columns, P_root, weight, mix.view(1, 1, 3, 3))
    whole, w, m = (t.clone().requires_grad_() for t in (x, weight, mix))
    y = torch.fft.ifft2(torch.fft.fft2(torch.einsum("oi,bihw->bohw", m, whole)) * w).real
    y.pow(2).sum().backward()
    local = block(x, P_rows)
    mine = net(local)
    mine.pow(2).sum().backward()
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(mine, block(y, P_rows), **close)
    torch.testing.assert_close(local.grad, block(whole.grad, P_rows), **close)
    columns = slice(
        *(f(P_columns.shape, P_columns.index, x.shape)[3] for f in (compute_start_index, compute_stop_index))
    )
    torch.testing.assert_close(net.modes.grad, w.grad[..., columns], **close)
    if P_root.active:
        torch.testing.assert_close(net.mix.grad.view(3, 3), m.grad, **close)


class UNet(torch.nn.Module):
    """One step down and up again with a skip; `layers` makes them for one device or for a grid."""

    def __init__(self, conv: Any, norm: Any, pool: Any, up: Any) -> None:
        super().__init__()
        self.first, self.norm, self.pool = conv(2, 4, 3, padding=1), norm(4), pool()
        self.deep, self.up, self.last = conv(4, 4, 3, padding=1), up(), conv(8, 1, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.last(torch.cat([x, self.up(self.deep(self.pool(x)))], dim=1))


@case
def unet(world: dl.Partition) -> None:
    """In two and three dims; sizes that do not divide."""
    nn = distdl.nn
    for dims, shape, size in ((2, [1, 1, 2, 2], (10, 14)), (3, [1, 1, 1, 2, 2], (6, 6, 10))):
        P, mode = grid(shape), {2: "bilinear", 3: "trilinear"}[dims]
        conv, pool = getattr(nn, f"DistributedConv{dims}d"), getattr(nn, f"DistributedMaxPool{dims}d")
        net = UNet(
            lambda *args, conv=conv, P=P, **options: conv(P, *args, **options, buffer_manager=None),
            lambda channels, P=P: nn.DistributedBatchNorm(P, num_features=channels),
            lambda pool=pool, P=P: pool(P, kernel_size=2, stride=2),
            lambda P=P, size=size: nn.DistributedUpsample(P, size=(2, 4, *size), mode="linear", align_corners=True),
        ).double()
        torch_conv, torch_norm = getattr(torch.nn, f"Conv{dims}d"), getattr(torch.nn, f"BatchNorm{dims}d")
        serial = UNet(
            torch_conv,
            torch_norm,
            lambda dims=dims: getattr(torch.nn, f"MaxPool{dims}d")(2),
            lambda mode=mode, size=size: torch.nn.Upsample(size, mode=mode, align_corners=True),
        ).double()
        set_on_root(net, serial, P.rank == 0)
        assert_serial(net, serial, torch.linspace(-1, 1, 4 * np.prod(size)).double().sin().view(2, 2, *size), P, P)
        torch.testing.assert_close(net.norm.running_var, serial.norm.running_var)
        assert net.norm.gamma is net.norm.weight


@case
def residual_block(world: dl.Partition) -> None:
    """With strides, and a grid that cuts the batch too."""

    class Block(torch.nn.Module):
        def __init__(self, conv: Any, norm: Any) -> None:
            super().__init__()
            self.one, self.norm, self.two = conv(3, 5, 3, stride=2, padding=1, bias=False), norm(5), conv(5, 5, 3, 1, 1)
            self.short = conv(3, 5, 1, stride=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.two(torch.relu(self.norm(self.one(x)))) + self.short(x))

    P = grid([2, 1, 2, 1])
    nn, options = distdl.nn, {"dtype": torch.float64}
    net = Block(
        lambda *args, **given: nn.DistributedConv2d(P, *args, **given).double(),
        lambda channels: nn.DistributedBatchNorm(P, channels).double(),
    )
    serial = Block(
        lambda *args, **given: torch.nn.Conv2d(*args, **given, **options), lambda n: torch.nn.BatchNorm2d(n, **options)
    )
    set_on_root(net, serial, P.rank == 0)
    assert_serial(net, serial, torch.linspace(-3, 3, 3 * 3 * 9 * 7).double().cos().view(3, 3, 9, 7), P, P)


@case
def convolutions_of_channels(world: dl.Partition) -> None:
    """Positional P_y and P_w, and padding_mode before dilation."""
    nn, double = distdl.nn, torch.float64
    x = torch.linspace(0, 5, 2 * 4 * 9 * 8).sin().to(double).view(2, 4, 9, 8)
    kinds = {
        nn.conv_channel.DistributedChannelConv2d: ([1, 2, 1, 1], [1, 2, 1, 1], [2, 2, 1, 1]),
        nn.conv_general.DistributedGeneralConv2d: ([1, 2, 2, 1], [1, 1, 2, 1], [1, 2, 2, 1]),
    }
    for kind, (of_x, of_y, of_w) in kinds.items():
        P_x, P_y, P_w = grid(of_x), grid(of_y, 2), grid(of_w)
        layer = kind(P_x, P_y, P_w, 4, 6, 3, 1, [2, 4], "circular", [1, 2], 1, True, None).to(double)
        serial = torch.nn.Conv2d(4, 6, 3, 1, (2, 4), (1, 2), padding_mode="circular", dtype=double)
        dl.load_serial_state_dict(layer, serial.state_dict())
        assert_serial(layer, serial, x, P_x, P_y)
    P = grid([1, 1, 2, 2])
    layer = nn.conv_feature.DistributedFeatureConv2d(P, 4, 6, 3, 1, 2, "reflect", 2).to(double)
    serial = torch.nn.Conv2d(4, 6, 3, 1, 2, 2, padding_mode="reflect", dtype=double)
    set_on_root(layer, serial, P.rank == 0)
    assert_serial(layer, serial, x, P, P)


@case
def pools_and_interpolation(world: dl.Partition) -> None:
    """The default stride is one; "linear" goes for any number of dims; nearest takes no align_corners."""
    nn, P = distdl.nn, grid([1, 1, 2, 2])
    x = torch.linspace(0, 9, 2 * 9 * 8).sin().double().view(1, 2, 9, 8)
    pairs = {
        nn.DistributedMaxPool2d(P, 3): torch.nn.MaxPool2d(3, 1),
        nn.DistributedAvgPool2d(P, [3, 2], 1, 1, 1): torch.nn.AvgPool2d((3, 2), 1, 1),
        nn.DistributedUpsample(P, scale_factor=2): torch.nn.Upsample(
            scale_factor=2, mode="bilinear", align_corners=False
        ),
        nn.DistributedUpsample(P, None, np.array([1, 2, 13, 5]), mode="nearest"): torch.nn.Upsample((13, 5)),
    }
    for layer, serial in pairs.items():
        assert_serial(layer, serial, x, P, P)
    with pytest.raises(ValueError, match="no dilation"):
        nn.DistributedAvgPool2d(P, 3, dilation=2)


@case
def interpolation_of_blocks(world: dl.Partition) -> None:
    """Each rank's part, from inputs with a halo."""
    P, x = grid([1, 1, 2, 2]), torch.linspace(0, 9, 2 * 9 * 8).sin().double().view(1, 2, 9, 8).requires_grad_()
    y = F.interpolate(x, (13, 11), mode="bilinear", align_corners=False)
    start, stop = (f(P.shape, P.index, y.shape) for f in (compute_start_index, compute_stop_index))
    low = np.maximum(compute_start_index(P.shape, P.index, x.shape) - [0, 0, 2, 2], 0)
    high = np.minimum(np.add(compute_stop_index(P.shape, P.index, x.shape), [0, 0, 2, 2]), x.shape)
    layer = distdl.nn.interpolate.Interpolate(low, high, x.shape, start, stop, y.shape, mode="linear")
    held = x.detach()[assemble_slices(low, high)].requires_grad_()
    mine = layer(held)
    torch.testing.assert_close(mine, y[assemble_slices(start, stop)])
    mine.sum().backward()
    y[assemble_slices(start, stop)].sum().backward()
    torch.testing.assert_close(held.grad, x.grad[assemble_slices(low, high)])
    with pytest.raises(ValueError, match="the block is"):
        distdl.nn.Interpolate(start, start + 1, x.shape, start, stop, y.shape)(held[..., :1, :1])


@case
def losses(world: dl.Partition) -> None:
    P, loss = grid([2, 1, 2]), distdl.nn.loss
    x, t = torch.rand(2, 5, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).unbind()
    cases = [
        (loss.DistributedL1Loss, torch.nn.L1Loss, ("mean",)),
        (loss.DistributedMSELoss, torch.nn.MSELoss, ("sum",)),
        (loss.DistributedPoissonNLLLoss, torch.nn.PoissonNLLLoss, ("mean",)),
        (loss.DistributedBCELoss, torch.nn.BCELoss, ("mean",)),
        (loss.DistributedBCEWithLogitsLoss, torch.nn.BCEWithLogitsLoss, ("sum",)),
        (loss.DistributedKLDivLoss, torch.nn.KLDivLoss, ("batchmean",)),
    ]
    for kind, serial, (reduction,) in cases:
        whole, local = x.clone().requires_grad_(), block(x, P)
        expected = serial(reduction=reduction)(whole, t)
        expected.backward()
        found = kind(P, reduction)(local, block(t, P).detach())
        distdl.utilities.torch.ZeroVolumeCorrectorFunction.apply(found).backward()
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(local.grad, block(whole.grad, P))


@case
def halos(world: dl.Partition) -> None:
    """A padded block in, the neighbours' points in its halo; edges of the tensor stay padded."""
    P, nn = grid([1, 2, 2]), distdl.nn
    x = torch.arange(2 * 7 * 5).double().view(2, 7, 5)
    received = np.array([[0, 0], [0, 1], [0, 2]])
    received = np.where((P.index == 0)[:, None], received, received[:, ::-1] + [[0, 0], [1, 0], [0, 0]])
    outer = np.array([[0, 0], [1, 0], [0, 0]]) if P.index[1] == 0 else np.array([[0, 0], [0, 1], [0, 0]])
    halo = received + outer
    start, stop = (f(P.shape, P.index, x.shape) for f in (compute_start_index, compute_stop_index))
    mine = nn.HaloExchange(P, halo, received, received)
    padded = nn.PadNd(halo, value=-1, partition=P)(x[assemble_slices(start, stop)])
    wanted = x[assemble_slices(start - received[:, 0], stop + received[:, 1])]
    torch.testing.assert_close(mine(padded), nn.PadNd(outer, value=-1)(wanted))
    torch.testing.assert_close(nn.UnpadNd(halo, 0, P)(padded), x[assemble_slices(start, stop)])
    assert adjoint_test(mine, padded, P=world) < 1e-12


def test_ranks_outside_all_partitions() -> None:
    """They go through the whole program, with tensors of nothing that can be flattened."""
    spmd(5, lenet)


def test_the_first_rank_is_that_of_the_grid() -> None:
    def body(world: dl.Partition) -> list[float]:
        P = MPIPartition(None).create_partition_inclusive([2, 0]).create_cartesian_topology_partition([1, 1, 2])
        layer = distdl.nn.DistributedConv1d(P, 1, 1, 1)
        layer.weight.data.fill_(5.0 if P.rank == 0 else 1.0)
        layer(torch.ones(1, 1, 2) if P.active else zero_volume_tensor())
        return layer.weight.flatten().tolist()

    assert spmd(3, body) == [[5.0], [], [5.0]]


# ---- partitions and helpers -----------------------------------------------------------------------------------------


@case
def partitions(world: dl.Partition) -> None:
    P_world, nobody = MPIPartition(None), MPIPartition()
    assert not nobody.active
    assert nobody._comm is None
    assert not nobody.create_partition_inclusive([0]).active
    P_world._comm.Barrier()
    assert P_world._comm.Get_rank() == P_world.rank == world.rank
    P = grid([2, 2])
    shape = P.shape.copy()
    shape[0] = 1
    assert (P.shape == [2, 2]).all()
    assert P.dim == 2
    assert (P.cartesian_index(3) == [1, 1]).all()
    assert (P.index == [world.rank // 2, world.rank % 2]).all()
    assert {P: 1}[copy.deepcopy(P)] == 1
    assert pickle.loads(pickle.dumps(P)) == P != nobody
    assert isinstance(P, distdl.backends.mpi.CartesianPartition)
    rows = P.create_allreduction_partition([0])
    assert (rows.shape == [2, 1]).all()
    assert rows.allreduce_data(P.rank) == 2 * P.index[1] + 2 - 2 * P.index[1] + 2 * P.index[1]
    assert P.allreduce_data(np.array([P.rank]), op="max") == [3]
    assert P.allgather_data(P.rank) == [0, 1, 2, 3]
    assert P.create_cartesian_subtopology_partition([True, False]).shape.tolist() == [2]
    union = grid([2]).create_partition_union(grid([1], 3))
    assert union.size == 3
    assert P.ours.cut(torch.zeros(2, 2)).shape == (1, 1)


@case
def partitions_of_copies(world: dl.Partition) -> None:
    """Who sends to whom in a broadcast, and in the sum that is its adjoint."""
    P_small, P_large = grid([1, 2]), grid([2, 2])
    send, receive = P_small.create_broadcast_partition_to(P_large)
    if P_small.active:
        assert send.rank == 0
    else:
        assert not send.active
    assert receive.broadcast_data(P_small.index[1] if receive.rank == 0 else None) == P_large.index[1]
    send, receive = P_large.create_reduction_partition_to(P_small)
    assert send.allreduce_data(1) == 2
    assert receive.active == P_small.active
    if receive.active:
        assert receive.rank == 0


@case
def helpers(world: dl.Partition) -> None:
    P, tools = grid([2, 2]), distdl.utilities
    local = tools.torch.TensorStructure(torch.zeros(4 - P.index[0], 3 - P.index[1], dtype=torch.float64))
    found = distdl.backends.mpi.tensor_comm.assemble_global_tensor_structure(local, P, grid([1]))
    assert found.shape == ((7, 5) if world.rank == 0 else None)
    whole = distdl.backends.common.assemble_global_tensor_structure(local, P)
    assert (whole.shape, whole.dtype, whole.requires_grad) == ((7, 5), torch.float64, False)
    assert tools.slicing.compute_subshape(P.shape, P.index, whole.shape).tolist() == list(local.shape)
    sl = tools.slicing
    index_filter = sl.assemble_index_filter([1, 2], [0])
    assert list(sl.filtered_range_index([3, 2], index_filter)) == [(1, 0), (1, 1)]
    assert list(sl.range_index([2, 1])) == [(0, 0), (1, 0)]
    assert sl.worker_layout([2, 2])[1, 0] == 2
    assert sl.compute_nd_slice_shape(assemble_slices([1, 2], [4, 6])).tolist() == [3, 4]
    assert [a.tolist() for a in sl.compute_intersection([0, 2], [3, 4], [1, 5], [9, 9])] == [[1, 5], [3, 4], [2, 0]]
    assert tools.index_tricks.cartesian_index_c([2, 3], 4) == (1, 1)
    assert tools.index_tricks.cartesian_index_f([2, 3], 4) == (0, 2)
    assert tools.misc.Bunch(a=1).a == 1
    tools.debug.print_sequential(P._comm, "here")


@case
def checkpoints(world: dl.Partition) -> None:
    """Each rank loads what DistDL saved on it: the weights on the first one, on the others nothing."""
    nn, P = distdl.nn, grid([1, 1, 2, 2])
    net = torch.nn.Sequential(nn.DistributedConv2d(P, 1, 2, 3, padding=1), nn.DistributedBatchNorm(P, 2)).double()
    serial = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3, padding=1), torch.nn.BatchNorm2d(2)).double()
    with torch.no_grad():
        serial[1].weight.copy_(torch.tensor([2.0, 3.0]))
    net(torch.ones(1, 1, 2, 2).double())  # a load counts also after the first call
    state = serial.state_dict()
    old = {"0.weight": state["0.weight"], "0.bias": state["0.bias"]}
    renamed = {
        "1.gamma": "1.weight",
        "1.beta": "1.bias",
        "1.running_mean": "1.running_mean",
        "1.running_var": "1.running_var",
    }
    old |= {name: state[of].view(1, 2, 1, 1) for name, of in renamed.items()}
    net.load_state_dict(old if world.rank == 0 else {name: torch.empty(0) for name in old})
    assert_serial(net, serial, torch.linspace(0, 3, 2 * 7 * 5).double().view(2, 1, 7, 5), P, P)
    linear = nn.DistributedLinear(grid([1, 2]), grid([1, 2]), grid([2, 2]), 5, 3)
    blocks = {"sublinear.weight": torch.full_like(linear.weight, world.rank)}
    linear.load_state_dict(blocks | ({"sublinear.bias": torch.ones_like(linear.bias)} if world.rank < 2 else {}))
    assert linear.weight.unique().tolist() == [world.rank]


def test_a_checkpoint_without_the_first_holders_weights_is_refused() -> None:
    def body(world: dl.Partition) -> None:
        layer = distdl.nn.DistributedConv1d(grid([1, 1, 2]), 1, 1, 3)
        nothing = {"weight": torch.empty(0), "bias": torch.empty(0)}
        if world.rank == 0:
            with pytest.raises(RuntimeError, match="size mismatch for weight"):
                layer.load_state_dict(nothing)
        else:
            layer.load_state_dict(nothing)

    spmd(2, body)


def test_a_load_on_one_rank_alone_is_an_error_on_all() -> None:
    def body(world: dl.Partition) -> None:
        layer, x = distdl.nn.DistributedConv1d(grid([1, 1, 2]), 1, 1, 1), torch.ones(1, 1, 2)
        layer(x)
        if world.rank == 0:
            layer.load_state_dict(layer.state_dict())
        layer(x)

    with pytest.raises(RuntimeError, match="meet in different calls"):
        spmd(2, body)


# ---- names and jobs -------------------------------------------------------------------------------------------------

LAYERS = [
    *["AllSumReduce", "Broadcast", "SumReduce", "Repartition", "DistributedTranspose", "HaloExchange", "Interpolate"],
    *["Module", "PadNd", "UnpadNd", "DistributedBatchNorm", "DistributedLinear", "DistributedUpsample"],
    *[f"Distributed{kind}Loss" for kind in ("L1", "MSE", "PoissonNLL", "BCE", "BCEWithLogits", "KLDiv")],
    *[f"Distributed{kind}{n}d" for n in (1, 2, 3) for kind in ("Conv", "FeatureConv", "ChannelConv", "GeneralConv")],
    *[f"Distributed{kind}Pool{n}d" for n in (1, 2, 3) for kind in ("Avg", "Max")],
]
PROMISED = {
    "backend": ["backend"],
    "backends.mpi": ["MPIPartition", "MPICartesianPartition", "Partition", "CartesianPartition"],
    "backends.mpi.partition": ["MPIPartition", "MPICartesianPartition"],
    "backends.mpi.tensor_comm": ["assemble_global_tensor_structure"],
    "backends.common.tensor_comm": ["assemble_global_tensor_structure"],
    "config": ["config"],
    "functional": ["ZeroVolumeCorrectorFunction"],
    "nn": LAYERS,
    "nn.all_sum_reduce": ["AllSumReduce"],
    "nn.batchnorm": ["DistributedBatchNorm"],
    "nn.broadcast": ["Broadcast"],
    "nn.conv": ["DistributedConv1d", "DistributedConv2d", "DistributedConv3d"],
    "nn.conv_channel": ["DistributedChannelConv1d", "DistributedChannelConv2d", "DistributedChannelConv3d"],
    "nn.conv_feature": ["DistributedFeatureConv1d", "DistributedFeatureConv2d", "DistributedFeatureConv3d"],
    "nn.conv_general": ["DistributedGeneralConv1d", "DistributedGeneralConv2d", "DistributedGeneralConv3d"],
    "nn.halo_exchange": ["HaloExchange"],
    "nn.interpolate": ["Interpolate"],
    "nn.linear": ["DistributedLinear"],
    "nn.loss": [name for name in LAYERS if name.endswith("Loss")],
    "nn.module": ["Module"],
    "nn.padnd": ["PadNd"],
    "nn.pooling": [name for name in LAYERS if "Pool" in name],
    "nn.repartition": ["Repartition"],
    "nn.sum_reduce": ["SumReduce"],
    "nn.transpose": ["DistributedTranspose"],
    "nn.unpadnd": ["UnpadNd"],
    "nn.upsampling": ["DistributedUpsample"],
    "utilities.debug": ["print_sequential"],
    "utilities.index_tricks": ["cartesian_index_c", "cartesian_index_f"],
    "utilities.misc": ["Bunch", "DummyContext"],
    "utilities.slicing": [
        *[
            "assemble_index_filter",
            "assemble_slices",
            "compute_intersection",
            "compute_nd_slice_shape",
            "worker_layout",
        ],
        *["compute_start_index", "compute_stop_index", "compute_subshape", "filtered_range_index", "range_index"],
    ],
    "utilities.torch": [
        *["NoneTensor", "TensorStructure", "ZeroVolumeCorrectorFunction", "zero_volume_tensor"],
        "distdl_padding_to_torch_padding",
    ],
}


@pytest.fixture
def installed() -> Iterator[None]:
    before = dict(sys.modules)
    distdl.install()
    yield
    for name in sys.modules.keys() - before.keys():
        del sys.modules[name]


@pytest.mark.parametrize("path", PROMISED)
def test_every_module_and_name(path: str, installed: None) -> None:
    ours, theirs = (importlib.import_module(f"{package}.{path}") for package in (distdl.__name__, "distdl"))
    assert ours is theirs
    assert [name for name in PROMISED[path] if not hasattr(ours, name)] == []


def test_the_page_names_them_all() -> None:
    page = (Path(__file__).parents[1] / "docs/moving/distdl.rst").read_text()
    missing = [
        n for path, names in PROMISED.items() for n in (path, *names) if f"{n}``" not in page and f"``{n}" not in page
    ]
    assert missing == []


def test_what_is_left_out_is_not_found(installed: None) -> None:
    with pytest.raises(ModuleNotFoundError, match=r"distdl\.nn\.mixins"):
        importlib.import_module("distdl.nn.mixins")


def test_another_distdl_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distdl", pytest)
    with pytest.raises(RuntimeError, match="another distdl"):
        distdl.install()


def test_the_library_does_not_import_these_names() -> None:
    done = run(
        sys.executable,
        "-c",
        "import sys, distdl_lite; assert not [n for n in sys.modules if 'compat' in n and 'distdl' in n]",
    )
    assert done.returncode == 0, done.stderr


def test_classes_are_found_by_pickle() -> None:
    def body(world: dl.Partition) -> None:
        P = grid([1, 1, 2, 2])
        for layer in (distdl.nn.DistributedConv2d(P, 1, 1, 3), distdl.nn.Repartition(P, P)):
            assert type(pickle.loads(pickle.dumps(layer))) is type(layer)

    spmd(4, body)


def test_what_does_not_fit_is_refused_on_all_ranks() -> None:
    def body(world: dl.Partition) -> None:
        P, nn, r = grid([2]), distdl.nn, world.rank
        alone = [[0, r], [0, 1 - r]]  # a wrong halo on one rank alone
        x = torch.arange(4.0 + r)
        for halo, received, text in [
            ([[1, 1]], [[1, 1]], "of 5 points of dim 0, and receives"),
            ([[0, 1 - r]], [[0, 1 - r]] if r else [0, 1], "are no pairs of 1 dims"),
            (alone[: 1 + r], [[0, 1 - r]], "are no pairs of 1 dims"),
            ([[0, 1 - r]], [[0, 1 + r]], "are no pairs of 1 dims"),
            ([[9 * r, 1 - r]], [[0, 1 - r]], "has no room for a halo"),
        ]:
            with pytest.raises(ValueError, match=text):
                nn.HaloExchange(P, halo, received)(x)
        conv = nn.DistributedConv1d(grid([1, 1, 2]), 2, 3, 3, padding=1).double()
        with pytest.raises(RuntimeError, match="size mismatch for weight"):
            conv.load_state_dict({"weight": torch.zeros(2, 3, 3), "bias": torch.zeros(3)})
        if r == 0:
            conv.weight.data = torch.ones((), dtype=torch.float64).expand(3, 2, 3)  # copies share one number
        serial = torch.nn.Conv1d(2, 3, 3, padding=1).double()
        torch.nn.init.ones_(serial.weight)
        assert conv(torch.ones(1, 2, 3).double()).shape == (1, 3, 3)
        torch.testing.assert_close(conv.weight, serial.weight)
        enlarged = nn.Interpolate([0, 0, 2], [1, 1, 7], [1, 1, 8], [0, 0, 6], [1, 1, 9], [1, 1, 16])
        with pytest.raises(ValueError, match="points, not"):
            enlarged(torch.ones(1, 1, 8))

    spmd(2, body)


def test_wrong_arguments() -> None:
    def body(world: dl.Partition) -> None:
        P = grid([1, 1, 1])
        for wrong in ((P, 1, 1, 3, 1, 1, "zeros", 1, 1, True, None, "more"), (P, 1, 1, 3, 1, "zeros", 1, 1)):
            with pytest.raises((TypeError, ValueError)):
                distdl.nn.DistributedConv1d(*wrong)
        with pytest.raises(TypeError, match="multiple values"):
            distdl.nn.DistributedMaxPool1d(P, 2, kernel_size=2)
        with pytest.raises((TypeError, ValueError)):
            distdl.nn.DistributedPoissonNLLLoss(P, True)(torch.ones(1, 1, 1), torch.ones(1, 1, 1))
        with pytest.raises(TypeError, match="a Partition is needed, not MPICartesianPartition of"):
            dnn.DistributedMaxPool1d(P, 2)

    spmd(1, body)


PROGRAM = """
import sys

import numpy as np
import torch
from mpi4py import MPI

import distdl
from distdl.backends.mpi.partition import MPIPartition
from distdl.nn.repartition import Repartition
from distdl.utilities.torch import zero_volume_tensor

P_world = MPIPartition(MPI.COMM_WORLD)
P_world._comm.Barrier()
rows = int(sys.argv[1])
P_base = P_world.create_partition_inclusive(np.arange(rows))
P_x = P_base.create_cartesian_topology_partition([1, 1, rows])
P_root = P_world.create_partition_inclusive([0]).create_cartesian_topology_partition([1, 1, 1])
conv = distdl.nn.DistributedConv1d(P_x, in_channels=1, out_channels=1, kernel_size=3, padding=1)
serial = torch.nn.Conv1d(1, 1, 3, padding=1)
if P_root.active:
    conv.weight.data.copy_(serial.weight.data)
    conv.bias.data.copy_(serial.bias.data)
x = torch.arange(11.0).view(1, 1, 11) if P_root.active else zero_volume_tensor()
y = Repartition(P_x, P_root)(conv(Repartition(P_root, P_x)(x)))
y.sum().backward()
if P_root.active:
    assert torch.allclose(y, serial(x))
    serial(x).sum().backward()
    assert torch.allclose(conv.weight.grad, serial.weight.grad)
    print("equal on", MPI.COMM_WORLD.Get_size(), "ranks", __name__)
"""


def test_the_runner(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    for words in ([str(tmp_path / "program.py")], ["-m", "program"]):
        done = run(sys.executable, "-m", distdl.__name__, *words, "1", cwd=tmp_path)
        assert done.stdout == "equal on 1 ranks __main__\n", done.stderr
    assert run(sys.executable, "-m", distdl.__name__).returncode == 1


@pytest.mark.jobs
@pytest.mark.parametrize("launch", [mpirun, torchrun])
def test_the_runner_on_ranks(tmp_path: Path, launch: Callable[..., Any]) -> None:
    """Under torchrun there is no MPI at all."""
    (tmp_path / "program.py").write_text(PROGRAM)
    variables = {"MPI4PY_LIBMPI": "/no/such/libmpi.so"} if launch is torchrun else {}
    done = launch(4, "-m", distdl.__name__, str(tmp_path / "program.py"), "4", **variables)
    assert "equal on 4 ranks __main__\n" in done.stdout, done.stderr
    (tmp_path / "fails.py").write_text(PROGRAM + "assert P_world.rank != 2\nP_world._comm.Barrier()\n")
    done = launch(4, "-m", distdl.__name__, str(tmp_path / "fails.py"), "4", **variables)
    assert done.returncode != 0
    assert "AssertionError" in done.stderr
