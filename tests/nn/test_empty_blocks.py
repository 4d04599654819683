"""What the ranks with empty blocks must do as the others do, where a layer computes block by block: graphs, dtypes, checkpoints.

That checkpoints of all layers run again on all ranks or on none is among what test_generated draws.
"""

from __future__ import annotations

import pytest
import torch
from ranks import on_ranks
from torch.utils.checkpoint import checkpoint
from twins import integers, with_integers

import distdl_lite as dl
import distdl_lite.nn as dnn

CONV = {"in_channels": 2, "out_channels": 2, "kernel_size": 3, "padding": 1, "dtype": torch.float64}
LAYERS = [
    ("Conv1d", CONV),
    ("ConvTranspose1d", CONV),
    ("MaxPool1d", {"kernel_size": 2}),
    ("AvgPool1d", {"kernel_size": 2}),
    ("AdaptiveMaxPool1d", {"output_size": 3}),
    ("AdaptiveAvgPool1d", {"output_size": 3}),
    ("AdaptiveAvgPool1d", {"output_size": 1}),
    ("Upsample", {"size": 9}),
    ("Upsample", {"size": 4, "mode": "area"}),
    ("Upsample", {"size": 1, "mode": "area"}),
    ("ReflectionPad1d", {"padding": 2}),
    ("LayerNorm", {"normalized_shape": 6, "dtype": torch.float64}),
    ("GroupNorm", {"num_groups": 1, "num_channels": 2, "dtype": torch.float64}),
    ("RMSNorm", {"normalized_shape": 6, "dtype": torch.float64}),
]


@on_ranks(3)
def test_second_gradients(world: dl.Partition) -> None:
    """Of a sum, which has a gradient without graph: after a halo exchange, through a layer of which two ranks have nothing."""
    P, Q = world.grid((1, 1, 3)), world.grid((3, 1, 1))
    x = integers(1, 2, 6)
    for name, options in LAYERS:
        first = with_integers(torch.nn.Conv1d(**CONV))
        serial = torch.nn.Sequential(first, getattr(torch.nn, name)(**options))
        layers = [
            dnn.DistributedConv1d(P, **CONV),
            dnn.Repartition(P, Q),
            getattr(dnn, f"Distributed{name}")(Q, **options),
        ]
        dl.load_serial_state_dict(layers[0], serial[0].state_dict())
        dl.load_serial_state_dict(layers[2], serial[1].state_dict())
        found = []
        for net, start in ((torch.nn.Sequential(*layers), x[P.block(x.shape)]), (serial, x)):
            leaf = start.clone().requires_grad_()
            (g,) = torch.autograd.grad(net(leaf).sum(), leaf, create_graph=True)
            (g.square() * leaf.detach()).sum().backward()
            found.append([g, *(torch.zeros_like(p) if p.grad is None else p.grad for p in (leaf, *net.parameters()))])
        wanted = [g[P.block(x.shape)] for g in found[1][:2]] + found[1][2:]
        for a, b in zip(found[0], wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@on_ranks(2, mpi=True)
def test_checkpoints(world: dl.Partition) -> None:
    """One rank has nothing to save, or no gradient: both run the layer again."""
    Q = world.grid((2, 1, 1))
    for name, options in LAYERS:
        serial, layer = getattr(torch.nn, name)(**options), getattr(dnn, f"Distributed{name}")(Q, **options)
        dl.load_serial_state_dict(layer, serial.state_dict())
        for batch, wanted in ((1, (0, 1)), (2, (0,)), (2, (1,))):
            x = integers(batch, 2, 6)
            block = Q.cut(x).requires_grad_(world.rank in wanted)
            whole = x.clone().requires_grad_()
            checkpoint(layer, block, use_reentrant=False).square().sum().backward()
            serial(whole).square().sum().backward()
            if world.rank in wanted:
                torch.testing.assert_close(block.grad, whole.grad[Q.block(x.shape)], rtol=1e-9, atol=1e-9)


@on_ranks(2)
def test_dropout_in_place_in_a_checkpoint(world: dl.Partition) -> None:
    """The node that lets all ranks run it again does not stand in the way."""
    layer = dnn.DistributedDropout(world.grid((2, 1)), 0.5, inplace=True)
    x = torch.ones(3, 4).requires_grad_(world.rank == 1)
    y = checkpoint(lambda x: layer(x * 1).exp(), x, use_reentrant=False)
    assert set(y.detach().log().round().unique().tolist()) == {0.0, 2.0}
    y.sum().backward()
    assert (x.grad is not None) == (world.rank == 1)
    assert world.rank == 0 or torch.allclose(x.grad, torch.where(y > 1, 2 * y, 0))


LINEAR = {"in_features": 6, "out_features": 3}


@pytest.mark.parametrize(("name", "options"), [*LAYERS[:2], ("Linear", LINEAR), ("ReplicationPad1d", {"padding": 2})])
def test_autocast_leaves_what_torch_leaves(name: str, options: dict) -> None:
    """float64 and complex numbers as they are, a pad in float32; on ranks with empty blocks too."""

    @on_ranks(3)
    def test(world: dl.Partition) -> None:
        for dtype in (torch.float32, torch.float64, torch.complex64):
            x = integers(1, 2, 6, dtype=dtype)
            own = {**options, "dtype": dtype} if "padding" not in options or "kernel_size" in options else options
            for shape in ((3, 1, 1), (1, 1, 3)):
                P = world.grid(shape)
                layer = dnn.DistributedLinear(P, None, None, **own) if name == "Linear" else None
                layer = layer or getattr(dnn, f"Distributed{name}")(P, **own)
                with torch.autocast("cpu", torch.bfloat16):
                    wanted, y = getattr(torch.nn, name)(**own)(x), layer(x[P.block(x.shape)])
                assert y.dtype is wanted.dtype, (name, dtype, shape)
                assert y.shape == wanted[P.block(wanted.shape)].shape

    test("threads")


@on_ranks(4)
def test_ranks_without_output_keep_the_batch(world: dl.Partition) -> None:
    """A rank of the layer that gets nothing gets (batch, 0) like that of a primitive; with a graph, where others have one."""
    P_x, P_y = world.grid((1, 1, 1, 2)), world.grid((1, 1, 1, 2), [2, 3])
    line_x, line_y = world.grid((1, 2)), world.grid((1, 2), [2, 3])
    layers = {
        "repartition": (dnn.Repartition(P_x, P_y), P_x, (3, 4, 5, 6)),
        "convolution": (dnn.DistributedConv2d(P_x, 4, 2, 3, P_y=P_y), P_x, (3, 4, 5, 6)),
        "no channels": (dnn.DistributedConv2d(P_x, 0, 2, 3, P_y=P_y), P_x, (3, 0, 5, 6)),
        "work": (dnn.DistributedConv2d(P_x, 4, 2, 3, P_y=P_y, P_w=world.grid((1, 1, 1, 2), [1, 2])), P_x, (3, 4, 5, 6)),
        "transposed": (dnn.DistributedConvTranspose2d(P_x, 4, 2, 3, P_y=P_y), P_x, (3, 4, 5, 6)),
        "linear": (dnn.DistributedLinear(line_x, line_y, None, 5, 3), line_x, (3, 5)),
        "flatten": (dnn.DistributedFlatten(P_x, P_y=line_y), P_x, (3, 4, 5, 6)),
    }
    for name, (layer, P, shape) in layers.items():
        for batch in (3, 1):
            held = P.block((batch, *shape[1:]))
            x = dl.zero_volume_tensor(batch) if held is None else torch.rand(batch, *shape[1:])[held]
            y = layer(x.requires_grad_())
            assert y.requires_grad, name
            if world.rank in (0, 1):
                assert y.shape == (batch, 0), (name, y.shape)
            y.sum().backward()
            assert x.grad.shape == x.shape, name
