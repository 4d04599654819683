"""Random numbers in graphs: the same on every grid, of one seed a forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from ranks import on_ranks
from torch.utils.checkpoint import checkpoint

import distdl_lite as dl
from distdl_lite.model.capture import capture
from distdl_lite.nn.dropout import _STEP, mask_of

SHAPE = (2, 4, 6, 10)
ALPHA = 1.7580993408473766  # of alpha dropout
GRIDS = [(1, 1, 2, 2), (1, 4, 1, 1), (1, 1, 1, 1)]


def masks(seed: int, p: float, *shapes: tuple[int, ...]) -> Iterator[torch.Tensor]:
    """Those of the operations of a forward, in order."""
    for number, shape in enumerate(shapes):
        mask = mask_of(tuple((0, n) for n in shape), shape, seed + number * _STEP, p)
        yield mask.double() / (1 - p)


CAPTURED: dict[str, Any] = {}


def distributed(function: Callable[..., Any], P: dl.Partition, **options: Any) -> Any:
    """A function over a grid; ranks, which are threads, and grids share what is captured."""

    def once(*given: Any) -> Any:
        key = f"{function.__name__}{given[1:]}"
        CAPTURED[key] = CAPTURED.get(key) or capture(*given)
        return CAPTURED[key]

    net = dl.distribute(function, P, **options)
    net.__dict__["_capture"] = once
    return net


def several(x: torch.Tensor) -> torch.Tensor:
    y = F.dropout(x.sin(), 0.3) + F.dropout(x.flatten(2), 0.3).view(x.shape)
    y = y * F.dropout2d(x, 0.3) + F.dropout(x[0] * 1, 0.3, inplace=True)
    return (
        F.dropout(F.dropout(y, 0.0), 0.5, training=False) + F.dropout(x, 1.0) + F.alpha_dropout(x, 0.3, training=True)
    )


def serial(x: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    shapes = SHAPE, (2, 4, 60), (2, 4, 1, 1), SHAPE[1:], SHAPE
    a, b, c, d, e = masks(seed, 0.3, *shapes)
    y = (x.sin() * a + x * b.view(x.shape)) * x * c + x[0] * d
    return y, e


@on_ranks(4)
def test_dropout(world: dl.Partition) -> None:
    """Values and gradients of a serial twin with the library's mask: of tensors, channels, factored dims, slices."""
    whole = torch.rand(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for grid in GRIDS:
        P = world.grid(grid, range(4) if max(grid) > 1 else [2])
        if not P.active:
            continue
        net = distributed(several, P)
        torch.manual_seed(5)
        seed = int(torch.randint(2**63 - 1, (1,)))
        torch.manual_seed(5 if world.rank == P.ranks[0] else world.rank)
        x, x_whole = whole[P.block(SHAPE)].requires_grad_(), whole.detach().requires_grad_()
        y = net(x)
        wanted, kept = serial(x_whole, seed)
        kept, scale = kept * 0.7, (0.7 * (1 + 0.3 * ALPHA**2)) ** -0.5
        wanted = wanted + (x_whole * kept - (1 - kept) * ALPHA) * scale + 0.3 * scale * ALPHA
        torch.testing.assert_close(y, wanted[P.block(SHAPE)])
        wanted.square().sum().backward()
        y.square().sum().backward()
        torch.testing.assert_close(x.grad, x_whole.grad[P.block(SHAPE)])
        torch.manual_seed(5)
        assert torch.equal(net(x), y)
        assert net.code().count("seed_of(") == 1
        assert not torch.equal(net(x), y)  # the next seed


@on_ranks(4)
def test_numbers(world: dl.Partition) -> None:
    """Uniform, normal and Bernoulli's, the same on every grid and in a checkpoint; the right statistics."""

    def noisy(x: torch.Tensor) -> Any:
        y = x + torch.randn_like(x) * torch.rand(x.shape[2:], dtype=x.dtype)
        return y, torch.bernoulli(x), torch.rand_like(x.flatten(2)).view(x.shape), torch.randn(3, 5)

    shape, found = (4, 8, 32, 32), []
    whole = torch.rand(shape, generator=torch.Generator().manual_seed(3))
    for grid in GRIDS[:2]:
        P = world.grid(grid)
        net = distributed(noisy, P, out_axes=[None] * 3 + [(None, None)])
        torch.manual_seed(1)
        made = net(whole[P.block(shape)])
        found.append([*(dl.gather(y, P) for y in made[:3]), made[3]])
        x = whole[P.block(shape)].requires_grad_()
        torch.manual_seed(1)
        y = checkpoint(lambda x, net=net: net(x * 1)[0], x, use_reentrant=False)
        assert torch.equal(y, made[0])
        y.sum().backward()
        assert torch.equal(x.grad, torch.ones_like(x))
    for tensors in found[1:]:
        if world.rank == 0:
            assert all(map(torch.equal, tensors, found[0]))
    if world.rank == 0:
        _, tossed, uniform, _ = found[0]
        n = uniform.numel() ** 0.5
        assert abs(uniform.mean() - 0.5) * n < 5 * 12**-0.5
        assert 0 <= uniform.min() < uniform.max() < 1
        assert abs((tossed - whole).mean()) * n < 5 * 0.5
