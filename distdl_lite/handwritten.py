"""What a programmer who knows MPI writes by hand in place of a primitive: the other column of the benchmarks.

Each takes and returns tensors of the same values as the primitive, in fresh memory. Communicators, buffers and persistent
requests are made once, packing is NumPy assignment (less overhead than torch's for small pieces), and the shapes are
known beforehand, so nothing is agreed on.
"""

from __future__ import annotations

from typing import Any

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


class _Messages:
    """One persistent message to and one from each peer, all of one shape, in buffers of their own."""

    def __init__(self, comm: Any, peers: list[int], shape: Shape) -> None:
        self.sent = {peer: torch.empty(shape).numpy() for peer in peers}
        self.received = {peer: torch.empty(shape).numpy() for peer in peers}
        self._receiving = {peer: comm.Recv_init(buffer, peer) for peer, buffer in self.received.items()}
        self._sending = {peer: comm.Send_init(buffer, peer) for peer, buffer in self.sent.items()}

    def expect(self) -> None:
        for request in self._receiving.values():
            request.Start()

    def send(self, peer: int) -> None:
        self._sending[peer].Start()

    def wait(self) -> None:
        for request in (*self._receiving.values(), *self._sending.values()):
            request.Wait()


class Repartition(HandWritten):
    """From blocks cut along dim 2 to blocks cut along dim 3; both lengths are multiples of the number of ranks."""

    def __init__(self, comm: Any, shape: Shape) -> None:
        super().__init__(comm, shape)
        n, c, self.height, width = shape
        self.width = width // comm.size
        self.peers = [peer for peer in range(comm.size) if peer != comm.rank]
        self.messages = _Messages(comm, self.peers, (n, c, self.height, self.width))

    def _row(self, rank: int) -> tuple[slice, ...]:
        return slice(None), slice(None), slice(rank * self.height, (rank + 1) * self.height)

    def _column(self, rank: int) -> tuple[slice, ...]:
        return slice(None), slice(None), slice(None), slice(rank * self.width, (rank + 1) * self.width)

    def _move(self, x: torch.Tensor, y: torch.Tensor, out_of: Any, into: Any) -> torch.Tensor:
        source, target, messages, rank = x.numpy(), y.numpy(), self.messages, self.comm.rank
        messages.expect()
        for peer in self.peers:
            messages.sent[peer][...] = source[out_of(peer)]
            messages.send(peer)
        target[into(rank)] = source[out_of(rank)]
        messages.wait()
        for peer in self.peers:
            target[into(peer)] = messages.received[peer]
        return y

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, height, _ = self.shape
        return self._move(x, torch.empty((n, c, height * self.comm.size, self.width)), self._column, self._row)

    def backward(self, gradient: torch.Tensor) -> torch.Tensor:
        return self._move(gradient, torch.empty(self.shape), self._row, self._column)


class HaloExchange(HandWritten):
    """One row from each neighbour along dim 2, and if `pads` a row of zeros where there is none."""

    def __init__(self, comm: Any, shape: Shape, pads: bool = False) -> None:
        super().__init__(comm, shape)
        n, c, self.height, width = shape
        rank, last = comm.rank, comm.size - 1
        self.top = int(pads or rank > 0)
        self.grown = n, c, self.height + self.top + int(pads or rank < last), width
        self.zeros = [row for row, is_edge in ((0, rank == 0), (-1, rank == last)) if pads and is_edge]
        # Per neighbour: the row of the block it wants, and the row of the grown block that it gives.
        self.rows = {peer: row for peer, row in ((rank - 1, 0), (rank + 1, -1)) if 0 <= peer <= last}
        self.messages = _Messages(comm, list(self.rows), (n, c, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, messages = torch.empty(self.grown), self.messages
        source, target = x.numpy(), y.numpy()
        messages.expect()
        for peer, row in self.rows.items():
            messages.sent[peer][...] = source[:, :, row]
            messages.send(peer)
        target[:, :, self.top : self.top + self.height] = source
        for row in self.zeros:
            target[:, :, row] = 0
        messages.wait()
        for peer, row in self.rows.items():
            target[:, :, row] = messages.received[peer]
        return y

    def backward(self, gradient: torch.Tensor) -> torch.Tensor:
        x, messages = torch.empty(self.shape), self.messages
        source, target = gradient.numpy(), x.numpy()
        messages.expect()
        for peer, row in self.rows.items():
            messages.sent[peer][...] = source[:, :, row]
            messages.send(peer)
        target[...] = source[:, :, self.top : self.top + self.height]
        messages.wait()
        for peer, row in self.rows.items():
            target[:, :, row] += messages.received[peer]
        return x
