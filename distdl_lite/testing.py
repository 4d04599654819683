"""For tests of distributed code: ranks without mpirun, adjoints, equality with the serial layer, counts of messages."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from distdl_lite.layout import Shape
from distdl_lite.partition import Partition
from distdl_lite.plan import Edge, Leg, Plan
from distdl_lite.transport import current, tallies
from distdl_lite.transport.abort import abort_on_exception
from distdl_lite.transport.counts import Tally
from distdl_lite.transport.threads import ThreadTransport, spmd

__all__ = ["adjoint_test", "assert_equals_serial", "count", "launch", "simulate", "spmd"]


def launch(ranks: int, body: Callable[[Partition], Any]) -> Any:
    """Run ``body(world)`` on the ranks that mpirun, srun or torchrun has started; without a launcher on threads, as `spmd`.

    So one script runs on a cluster, in a notebook and in a debugger. What follows the call runs once: under a launcher only
    rank 0 goes on, and the other processes end.

    Parameters
    ----------
    ranks : int
        The number of ranks that the program is written for.
    body : callable
        Called once per rank with the `Partition` of all ranks.

    Returns
    -------
    object
        What `body` returned on rank 0.

    Raises
    ------
    ValueError
        On all ranks, if a launcher has started another number of them.
    RuntimeError
        If it is called inside a `body`, or under a launcher a second time, when the other processes have ended.
    Exception
        What `body` raises; under a launcher an error of one rank ends the job, see `distdl_lite.abort_on_exception`.

    Examples
    --------
    >>> launch(4, lambda world: world.size)
    4
    """
    try:
        transport = current()
    except RuntimeError:  # neither torchrun nor an MPI
        transport = None
    started = transport.size if transport else 1
    if isinstance(transport, ThreadTransport):
        raise RuntimeError("launch: ranks run already, inside which it is body(world) that one calls")
    if started == 1:
        return spmd(ranks, body)[0]
    if "launched" in transport.local:
        raise RuntimeError("launch: the other processes have ended after the first call")
    transport.local["launched"] = True
    if started != ranks:
        raise ValueError(f"this program is written for {ranks} ranks, and the launcher has started {started}")
    abort_on_exception()
    world = Partition.world()
    try:
        result = body(world)
    except SystemExit as end:  # of one rank alone, for which the others would wait
        raise RuntimeError(f"rank {world.rank} has left launch by sys.exit({end.code!r})") from end
    if world.rank:
        raise SystemExit
    return result


@contextmanager
def count() -> Iterator[Tally]:
    """Count what this rank moves while the block runs, over all communicators; the other ranks need not call it.

    Yields
    ------
    Tally
        ``messages`` (a collective counts one), ``bytes``, ``seconds`` and ``collectives``; ``by_label`` holds the same for
        each primitive or layer, and as "sums" for losses and replica gradients. Agreements and set-up count in seconds alone.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite.nn as dnn
    >>> def body(world):
    ...     halo = dnn.HaloExchange(world.grid((2,)), [1])
    ...     with count() as c:
    ...         halo(torch.ones(3))
    ...     return c.messages, c.by_label["HaloExchange"].bytes
    >>> spmd(2, body)
    [(1, 4), (1, 4)]
    """
    opened, tally = tallies(), Tally()
    opened.append(tally)
    try:
        yield tally
    finally:
        opened.remove(tally)


def adjoint_test(function: Callable[..., Any], *inputs: torch.Tensor, P: Partition) -> float:
    """The relative error of <F x, y> = <x, F* y>, where F* is what autograd finds for the linear function F.

    Parameters
    ----------
    function : callable
        A layer or function of local blocks, linear in all its inputs together, that returns a tensor or several.
    *inputs : torch.Tensor
        This rank's blocks of x, real or complex; zero-volume on a rank without data.
    P : Partition
        A partition with every rank that takes part; these ranks call this together. y is random, of the shape of each
        rank's output.

    Returns
    -------
    float
        The difference over ``max(|F x| |y|, |x| |F* y|)``, each summed over all ranks of P in float64, the same on all.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite.nn as dnn
    >>> def body(world):
    ...     P = world.grid((2,))
    ...     x = torch.randn(3, dtype=torch.float64)
    ...     return adjoint_test(dnn.AllGather(P, [0]), x, P=P) < 1e-14
    >>> spmd(2, body)
    [True, True]
    """
    x = [value.detach().clone().requires_grad_() for value in inputs]
    result = function(*x)
    outputs = [result] if isinstance(result, torch.Tensor) else list(result)
    generator = torch.Generator().manual_seed(P.world_transport.rank)
    wide = [torch.promote_types(out.dtype, torch.float64) for out in outputs]
    y = [torch.randn(o.shape, dtype=w, generator=generator).to(o) for o, w in zip(outputs, wide, strict=True)]
    found = torch.autograd.grad(outputs, x, y, allow_unused=True)
    gradients = [torch.zeros_like(a) if g is None else g for a, g in zip(x, found, strict=True)]
    pairs = [(outputs, y), (x, gradients), (outputs, outputs), (y, y), (x, x), (gradients, gradients)]
    sums = torch.tensor([_dot(a, b) for a, b in pairs], dtype=torch.complex128)
    if P.active:
        P.world_transport.all_reduce(P.team, sums)
    forward, backward = sums[:2].tolist()
    norms = sums[2:].real.sqrt().tolist()
    scale = max(norms[0] * norms[1], norms[2] * norms[3])
    return float(abs(forward - backward) / scale) if scale else 0.0


def _dot(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> complex:
    """The inner product of two lists of blocks in double precision."""
    flat = [[v.detach().cpu().to(torch.complex128).reshape(-1) for v in blocks] for blocks in (left, right)]
    return sum((complex(torch.vdot(a, b)) for a, b in zip(*flat, strict=True)), 0j)


def assert_equals_serial(
    distributed_layer: torch.nn.Module,
    serial_layer: torch.nn.Module,
    x_global: torch.Tensor | Sequence[torch.Tensor],
    P_x: Partition,
    P_y: Partition | None = None,
    rtol: float = 0.0,
    atol: float = 0.0,
) -> None:
    """Check that a distributed layer computes what its serial twin does.

    The distributed layer gets the serial one's weights and buffers. Then every rank compares its block of the output, of
    the input gradients and of all parameter gradients, and its buffers, with those of the serial layer, which it runs on
    the whole input. The output's gradient is made of random integers: where the input and weights are integers in float64,
    linear layers must agree exactly, which is the default.

    Parameters
    ----------
    distributed_layer, serial_layer : torch.nn.Module
        The serial one is left as it is.
    x_global : torch.Tensor or sequence of tensors
        The whole inputs, the same on every rank.
    P_x, P_y : Partition
        Of inputs and output, which are cut in balanced blocks. P_y is P_x by default; a 0-dim output is the same on all ranks.
    rtol, atol : float
        Of ``torch.testing.assert_close``.

    Raises
    ------
    AssertionError
        On all ranks, saying what differs on which. All ranks of P_x's world call this together.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite.nn as dnn
    >>> def body(world):
    ...     P = world.grid((1, 1, 2))
    ...     pool = dnn.DistributedMaxPool1d(P, 3)
    ...     assert_equals_serial(pool, torch.nn.MaxPool1d(3), torch.arange(11.0).view(1, 1, 11), P)
    >>> spmd(2, body)
    [None, None]
    """
    from distdl_lite.model.weights import load_serial_state_dict

    world = P_x.world_transport
    serial = copy.deepcopy(serial_layer)
    load_serial_state_dict(distributed_layer, serial.state_dict())
    distributed_layer.zero_grad()
    serial.zero_grad()
    given = [x_global] if isinstance(x_global, torch.Tensor) else list(x_global)
    whole = [_leaf(x) for x in given]
    local = [_leaf(_block(x, P_x)) for x in given]
    y, y_local = serial(*whole), distributed_layer(*local)
    generator = torch.Generator().manual_seed(0)
    g = torch.randint(-4, 5, y.shape, generator=generator).to(y)
    if y.requires_grad:
        y.backward(g)
    if y_local.requires_grad:
        y_local.backward(_block(g, P_y or P_x).view(y_local.shape))
    pairs = {"output": (y_local, _block(y, P_y or P_x))} if (P_y or P_x).active else {}
    if P_x.active:
        for number, (x, x_local) in enumerate(zip(whole, local, strict=True)):
            if x.requires_grad:
                pairs[f"gradient of input {number}"] = x_local.grad, _block(x.grad, P_x)
    pairs.update(_weights(distributed_layer, serial, world.rank))
    _raise_differences(world, {name: _difference(*pair, rtol, atol) for name, pair in pairs.items()})


def _leaf(x: torch.Tensor) -> torch.Tensor:
    return x.detach().clone().requires_grad_(x.is_floating_point() or x.is_complex())


def _block(x: torch.Tensor | None, P: Partition) -> torch.Tensor | None:
    """This rank's block of a whole tensor; a 0-dim one is not cut."""
    return x if x is None or not x.dim() else P.cut(x)  # type: ignore[attr-defined]


def _weights(distributed: torch.nn.Module, serial: torch.nn.Module, rank: int) -> dict[str, tuple[Any, Any]]:
    """The gradients of parameters, and the buffers, that this rank holds, each with the serial layer's."""
    pairs: dict[str, tuple[Any, Any]] = {}
    serials = {**dict(serial.named_parameters()), **dict(serial.named_buffers())}
    for path, inner in distributed.named_modules():
        for own_name, tensor in {**inner._parameters, **inner._buffers}.items():
            name = f"{path}.{own_name}".lstrip(".")
            place = getattr(inner, "_distdl_places", {}).get(own_name)
            box = place and place.layout.box(rank)
            if tensor is None or name not in serials or (place and box is None):
                continue
            found, wanted, kind = tensor, serials[name], "buffer"
            if own_name in inner._parameters:
                found, wanted, kind = tensor.grad, wanted.grad, "gradient of"
            if box and wanted is not None:
                wanted = wanted[tuple(slice(*r) for r in box)]
            pairs[f"{kind} {name}"] = found, wanted
    return pairs


def _difference(actual: torch.Tensor | None, expected: torch.Tensor | None, rtol: float, atol: float) -> str:
    """What distinguishes two tensors, empty if nothing does."""
    if actual is None or expected is None:
        return "" if actual is expected else f"is {_named(actual)}, not {_named(expected)}"
    try:
        torch.testing.assert_close(actual.detach(), expected.detach(), rtol=rtol, atol=atol, equal_nan=True)
    except AssertionError as error:
        return str(error)
    return ""


def _named(tensor: torch.Tensor | None) -> str:
    return "None" if tensor is None else f"a tensor of shape {tuple(tensor.shape)}"


def _raise_differences(world: Any, found: dict[str, str]) -> None:
    """Raise on all ranks what any of them found."""
    everywhere = world.gather_objects(world.team(range(world.size)), found)
    pairs = [(rank, pair) for rank, texts in enumerate(everywhere) for pair in texts.items()]
    lines = [f"rank {rank}: {name}: {text}" for rank, (name, text) in pairs if text]
    if lines:
        raise AssertionError("the distributed layer does not equal the serial one\n" + "\n".join(lines))


def simulate(plans: Iterable[Plan], blocks: Mapping[int, Any], zeros: Callable[[Shape], Any]) -> dict[int, Any]:
    """Run an operator without any transport.

    Parameters
    ----------
    plans : iterable of Plan
        The plan of every rank.
    blocks : mapping from rank to array
        The input of every rank that holds one; anything that slices and adds.
    zeros : callable
        Makes an array of zeros of a shape.

    Returns
    -------
    dict
        The output of every rank that holds one.

    Examples
    --------
    >>> import numpy
    >>> from distdl_lite import plan
    >>> from distdl_lite.grid import Grid
    >>> from distdl_lite.layout import balanced_blocks, gathered
    >>> blocks = balanced_blocks(Grid((2,), (0, 1)), (3,))
    >>> plans = [plan(blocks, gathered(blocks, [0]), rank) for rank in (0, 1)]
    >>> simulate(plans, {0: numpy.array([1, 2]), 1: numpy.array([3])}, lambda shape: numpy.zeros(shape, int))
    {0: array([1, 2, 3]), 1: array([1, 2, 3])}
    """
    by_rank = {p.rank: p for p in plans}
    outputs = {}
    for rank, mine in by_rank.items():
        if mine.shape_out is None:
            continue
        y = zeros(mine.shape_out)
        for leg in mine.legs:
            for number, edge in enumerate(leg.receives):
                twin = _twin(by_rank[edge.peer], leg, rank, sum(e.peer == edge.peer for e in leg.receives[:number]))
                y[edge.slices] += blocks[edge.peer][twin.slices]
        outputs[rank] = y
    return outputs


def _twin(peer: Plan, leg: Leg, rank: int, number: int) -> Edge:
    """The send of a peer that is the `number`-th receive from it of `rank`'s leg."""
    sends = [edge for other in peer.legs if other.team == leg.team for edge in other.sends if edge.peer == rank]
    return sends[number]
