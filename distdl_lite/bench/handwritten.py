"""What a programmer who knows MPI, or torch.distributed, writes by hand in place of a primitive: the benchmarks' other column.

Each takes and returns tensors of the same values as the primitive, in fresh memory. Communicators, buffers and persistent
requests are made once, packing is NumPy assignment (less overhead than torch's for small pieces), and the shapes are
known beforehand, so nothing is agreed on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from distdl_lite.bench.table import is_over_torch
from distdl_lite.partition import Partition

Shape = tuple[int, ...]
Starts = Callable[[], Callable[[], Any]]  # starts a message, and returns what waits for it


class Calls:
    """The calls of a launcher's library on float32 tensors of the host; those that return give fresh memory."""

    def __init__(self, P: Partition) -> None:
        self.comm, self.rank, self.size = P.comm, P.rank, P.size

    def broadcast(self, x: torch.Tensor) -> None:
        """Fill the tensor with rank 0's."""
        self.comm.Bcast(x.numpy())

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum, on rank 0 alone."""
        y = torch.empty(x.shape if self.rank == 0 else 0)
        self.comm.Reduce(x.numpy(), y.numpy() if self.rank == 0 else None)
        return y

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.empty(x.shape)
        self.comm.Allreduce(x.numpy(), y.numpy())
        return y

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """The ranks' blocks along the first dim, where they arrive in place."""
        y = torch.empty((x.shape[0] * self.size, *x.shape[1:]))
        self.comm.Allgather(x.numpy(), y.numpy())
        return y

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's block of the sum."""
        y = torch.empty((x.shape[0] // self.size, *x.shape[1:]))
        self.comm.Reduce_scatter_block(x.numpy(), y.numpy())
        return y

    def receives(self, buffer: torch.Tensor, peer: int) -> Starts:
        request = self.comm.Recv_init(buffer.numpy(), peer)
        return lambda: request.Start() or request.Wait

    def sends(self, buffer: torch.Tensor, peer: int) -> Starts:
        request = self.comm.Send_init(buffer.numpy(), peer)
        return lambda: request.Start() or request.Wait


class TorchCalls(Calls):
    """Those of torch.distributed, on its default group."""

    def __init__(self, P: Partition) -> None:
        import torch.distributed as dist

        self.dist, self.rank, self.size = dist, P.rank, P.size
        # Later versions of torch call them otherwise.
        self._gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        self._scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

    def broadcast(self, x: torch.Tensor) -> None:
        self.dist.broadcast(x, 0)

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        y = x.clone()  # others than rank 0 get parts of the sum
        self.dist.reduce(y, 0)
        return y if self.rank == 0 else torch.empty(0)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        self.dist.all_reduce(y)
        return y

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.empty((x.shape[0] * self.size, *x.shape[1:]))
        self._gather(y, x)
        return y

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.empty((x.shape[0] // self.size, *x.shape[1:]))
        self._scatter(y, x)
        return y

    def receives(self, buffer: torch.Tensor, peer: int) -> Starts:
        return lambda: self.dist.irecv(buffer, peer).wait

    def sends(self, buffer: torch.Tensor, peer: int) -> Starts:
        return lambda: self.dist.isend(buffer, peer).wait


def calls_over(P: Partition) -> Calls:
    """Those of what moves ours."""
    return TorchCalls(P) if is_over_torch(P) else Calls(P)


class HandWritten:
    """A movement and its adjoint over the ranks of a partition, for one local float32 shape."""

    def __init__(self, P: Partition, shape: Shape) -> None:
        self.calls, self.shape = calls_over(P), shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def backward(self, gradient: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return _Node.apply(x, self) if torch.is_grad_enabled() else self.forward(x)


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, movement: HandWritten) -> torch.Tensor:
        ctx.movement = movement
        return movement.forward(x.detach())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.movement.backward(gradient), None


class Broadcast(HandWritten):
    """From rank 0 to all."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x if self.calls.rank == 0 else torch.empty(self.shape)
        self.calls.broadcast(y)
        return x.clone() if y is x else y

    def backward(self, gradient: torch.Tensor) -> torch.Tensor:
        return self.calls.reduce(gradient)


class SumReduce(HandWritten):
    """From all to rank 0."""

    forward = Broadcast.backward
    backward = Broadcast.forward


class AllSumReduce(HandWritten):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.calls.all_reduce(x)

    backward = forward


class AllGather(HandWritten):
    """Along the first dim."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.calls.all_gather(x)

    def backward(self, gradient: torch.Tensor) -> torch.Tensor:
        return self.calls.reduce_scatter(gradient)


class ReduceScatter(HandWritten):
    """The adjoint of `AllGather`."""

    forward = AllGather.backward
    backward = AllGather.forward


class _Exchange(HandWritten):
    """Pieces that ranks give each other, by one message to and one from each peer."""

    out: Shape  # of this rank's output
    own: tuple[Any, Any]  # the places in the input and in the output of what stays here
    pieces: dict[int, tuple[Any, Any]]  # by peer: of what goes to it, and of what comes from it
    zeros: Sequence[Any] = ()  # places in the output that get nothing
    adds = False  # whether what comes back is added to what stayed

    def _connect(self, shape: Shape) -> None:
        """Make the buffers, of the shape of all pieces, and the messages."""
        sent, received = ({peer: torch.empty(shape) for peer in self.pieces} for _ in range(2))
        self.receiving = [self.calls.receives(buffer, peer) for peer, buffer in received.items()]
        self.sending = {peer: self.calls.sends(buffer, peer) for peer, buffer in sent.items()}
        self.sent, self.received = ({p: b.numpy() for p, b in buffers.items()} for buffers in (sent, received))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.empty(self.out)
        for place in self.zeros:
            y.numpy()[place] = 0
        return self._move(x, y, 0, False)

    def backward(self, gradient: torch.Tensor) -> torch.Tensor:
        return self._move(gradient, torch.empty(self.shape), 1, self.adds)

    def _move(self, x: torch.Tensor, y: torch.Tensor, side: int, adds: bool) -> torch.Tensor:
        source, target = x.numpy(), y.numpy()
        under_way = [start() for start in self.receiving]
        for peer, places in self.pieces.items():
            self.sent[peer][...] = source[places[side]]
            under_way.append(self.sending[peer]())
        target[self.own[1 - side]] = source[self.own[side]]
        for wait in under_way:
            wait()
        for peer, places in self.pieces.items():
            if adds:
                target[places[1 - side]] += self.received[peer]
            else:
                target[places[1 - side]] = self.received[peer]
        return y


class Repartition(_Exchange):
    """From blocks cut along dim 2 to blocks cut along dim 3; both lengths are multiples of the number of ranks."""

    def __init__(self, P: Partition, shape: Shape) -> None:
        super().__init__(P, shape)
        n, c, height, width = shape
        width //= P.size
        self.out = n, c, height * P.size, width
        self.pieces = {
            rank: (np.s_[:, :, :, rank * width : (rank + 1) * width], np.s_[:, :, rank * height : (rank + 1) * height])
            for rank in range(P.size)
        }
        self.own = self.pieces.pop(P.rank)
        self._connect((n, c, height, width))


class HaloExchange(_Exchange):
    """One row from each neighbour along dim 2, and if `pads` a row of zeros where there is none."""

    adds = True

    def __init__(self, P: Partition, shape: Shape, pads: bool = False) -> None:
        super().__init__(P, shape)
        n, c, height, width = shape
        edges = {0: P.rank - 1, -1: P.rank + 1}
        peers = {row: peer for row, peer in edges.items() if 0 <= peer < P.size}
        top = int(pads or 0 in peers)
        self.out = n, c, height + (2 if pads else len(peers)), width
        self.own = np.s_[:], np.s_[:, :, top : top + height]
        self.pieces = {peer: (np.s_[:, :, row],) * 2 for row, peer in peers.items()}
        self.zeros = [np.s_[:, :, row] for row in edges if pads and row not in peers]
        self._connect((n, c, width))
