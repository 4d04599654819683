"""What a programmer who knows MPI writes by hand in place of a primitive: the other column of the benchmarks.

Each takes and returns tensors of the same values as the primitive, in fresh memory. Communicators, buffers and persistent
requests are made once, packing is NumPy assignment (less overhead than torch's for small pieces), and the shapes are
known beforehand, so nothing is agreed on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

Shape = tuple[int, ...]


class HandWritten:
    """A movement and its adjoint over the ranks of a communicator, for one local float32 shape."""

    def __init__(self, comm: Any, shape: Shape) -> None:
        self.comm, self.shape = comm, shape

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
        if self.comm.rank == 0:
            self.comm.Bcast(x.numpy())
            return x.clone()
        y = torch.empty(self.shape)
        self.comm.Bcast(y.numpy())
        return y

    def backward(self, gradient: torch.Tensor) -> torch.Tensor:
        if self.comm.rank == 0:
            y = torch.empty(self.shape)
            self.comm.Reduce(gradient.numpy(), y.numpy())
            return y
        self.comm.Reduce(gradient.numpy(), None)
        return torch.empty(0)


class SumReduce(HandWritten):
    """From all to rank 0."""

    forward = Broadcast.backward
    backward = Broadcast.forward


class AllSumReduce(HandWritten):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.empty(self.shape)
        self.comm.Allreduce(x.numpy(), y.numpy())
        return y

    backward = forward


class AllGather(HandWritten):
    """Along the first dim, where the blocks arrive in place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.empty((self.shape[0] * self.comm.size, *self.shape[1:]))
        self.comm.Allgather(x.numpy(), y.numpy())
        return y

    def backward(self, gradient: torch.Tensor) -> torch.Tensor:
        x = torch.empty(self.shape)
        self.comm.Reduce_scatter_block(gradient.numpy(), x.numpy())
        return x


class ReduceScatter(AllGather):
    """The adjoint of `AllGather`; the shape is that of one block."""

    forward = AllGather.backward
    backward = AllGather.forward


class _Exchange(HandWritten):
    """Pieces that ranks give each other, by one persistent message to and one from each peer."""

    out: Shape  # of this rank's output
    own: tuple[Any, Any]  # the places in the input and in the output of what stays here
    pieces: dict[int, tuple[Any, Any]]  # by peer: of what goes to it, and of what comes from it
    zeros: Sequence[Any] = ()  # places in the output that get nothing
    adds = False  # whether what comes back is added to what stayed

    def _connect(self, shape: Shape) -> None:
        """Make the buffers, of the shape of all pieces, and the requests."""
        self.sent = {peer: torch.empty(shape).numpy() for peer in self.pieces}
        self.received = {peer: torch.empty(shape).numpy() for peer in self.pieces}
        self.receiving = [self.comm.Recv_init(buffer, peer) for peer, buffer in self.received.items()]
        self.sending = {peer: self.comm.Send_init(buffer, peer) for peer, buffer in self.sent.items()}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.empty(self.out)
        for place in self.zeros:
            y.numpy()[place] = 0
        return self._move(x, y, 0, False)

    def backward(self, gradient: torch.Tensor) -> torch.Tensor:
        return self._move(gradient, torch.empty(self.shape), 1, self.adds)

    def _move(self, x: torch.Tensor, y: torch.Tensor, side: int, adds: bool) -> torch.Tensor:
        source, target = x.numpy(), y.numpy()
        for request in self.receiving:
            request.Start()
        for peer, places in self.pieces.items():
            self.sent[peer][...] = source[places[side]]
            self.sending[peer].Start()
        target[self.own[1 - side]] = source[self.own[side]]
        for request in (*self.receiving, *self.sending.values()):
            request.Wait()
        for peer, places in self.pieces.items():
            if adds:
                target[places[1 - side]] += self.received[peer]
            else:
                target[places[1 - side]] = self.received[peer]
        return y


class Repartition(_Exchange):
    """From blocks cut along dim 2 to blocks cut along dim 3; both lengths are multiples of the number of ranks."""

    def __init__(self, comm: Any, shape: Shape) -> None:
        super().__init__(comm, shape)
        n, c, height, width = shape
        width //= comm.size
        self.out = n, c, height * comm.size, width
        self.pieces = {
            rank: (np.s_[:, :, :, rank * width : (rank + 1) * width], np.s_[:, :, rank * height : (rank + 1) * height])
            for rank in range(comm.size)
        }
        self.own = self.pieces.pop(comm.rank)
        self._connect((n, c, height, width))


class HaloExchange(_Exchange):
    """One row from each neighbour along dim 2, and if `pads` a row of zeros where there is none."""

    adds = True

    def __init__(self, comm: Any, shape: Shape, pads: bool = False) -> None:
        super().__init__(comm, shape)
        n, c, height, width = shape
        edges = {0: comm.rank - 1, -1: comm.rank + 1}
        peers = {row: peer for row, peer in edges.items() if 0 <= peer < comm.size}
        top = int(pads or 0 in peers)
        self.out = n, c, height + (2 if pads else len(peers)), width
        self.own = np.s_[:], np.s_[:, :, top : top + height]
        self.pieces = {peer: (np.s_[:, :, row],) * 2 for row, peer in peers.items()}
        self.zeros = [np.s_[:, :, row] for row in edges if pads and row not in peers]
        self._connect((n, c, width))
