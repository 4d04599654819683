"""The transport over torch.distributed: NCCL moves tensors of GPUs, Gloo and the library's own sockets those of the host.

It works on groups of its own, one for each team of ranks, so that a user's traffic cannot match its messages. They are
made from torch's store by their members alone, for which there are no public calls: ``torch.distributed.new_group`` wants all
ranks of the job, or the same number of groups made before on each of them.
"""

from __future__ import annotations

import atexit
import hashlib
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from distdl_lite.plan import Leg, Pattern
from distdl_lite.transport import RowsByRank, Team, wire
from distdl_lite.transport.channel import Requests, counts_of
from distdl_lite.transport.counts import counted
from distdl_lite.transport.devices import HOST, gpu, take_gpu
from distdl_lite.transport.processes import ProcessTransport
from distdl_lite.transport.reports import take_part
from distdl_lite.transport.sockets import Line, Piece, Stream, Streams, Switchboard

_TIMEOUT = timedelta(minutes=30)  # torch's own for Gloo
_ADDED_AS = {torch.int16: torch.int32}  # Gloo and NCCL add none of these
_BY_MESSAGES = Pattern.ALL_GATHER, Pattern.REDUCE_SCATTER
_FOLDS = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}
_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


class _Job:
    """The processes of torch's default group, which is made from the launcher's variables if there is none."""

    now: _Job | None = None

    def __init__(self) -> None:
        take_gpu()
        if not dist.is_initialized():
            has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
            dist.init_process_group("cpu:gloo,cuda:nccl" if has_nccl else "gloo")
            atexit.register(_destroy)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.store = c10d._get_default_store()
        self.has_nccl = gpus_suffice(self.store, self.rank, self.size)
        self.made: Counter[tuple[int, ...]] = Counter()
        self.transports: dict[tuple[int, ...], TorchTransport] = {}

    def new_name(self, ranks: tuple[int, ...]) -> str:
        """A name for what these ranks are about to make together."""
        self.made[ranks] += 1
        digest = hashlib.blake2b(str(ranks).encode(), digest_size=8).hexdigest()  # of thousands of ranks, too
        return f"distdl_lite {digest} {self.made[ranks]}"

    def public_group(self, ranks: tuple[int, ...]) -> dist.ProcessGroup:
        """A group of these ranks that torch.distributed knows; see above for the calls that are not public."""
        arguments = len(ranks), ranks.index(self.rank), list(ranks), dist.get_backend_config(), self.store
        made, _ = c10d._new_process_group_helper(*arguments, self.new_name(ranks), timeout=_TIMEOUT)
        c10d._world.pg_group_ranks[made] = {rank: place for place, rank in enumerate(ranks)}
        return made


def _destroy() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def transport_over(group: Any) -> TorchTransport:
    """The one transport over the ranks of a process group or a device mesh (None: all), which make it together."""
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("a partition needs a process group that this rank belongs to")
    if dist.is_initialized() and dist.get_backend() == "distdl":
        raise ValueError("the default process group is one over MPI: make partitions of dl.Partition.world()")
    _Job.now = job = _Job.now or _Job()
    if group is None:
        ranks = tuple(range(job.size))
    elif isinstance(group, dist.ProcessGroup):
        ranks = tuple(dist.get_process_group_ranks(group))
    else:
        ranks = tuple(group.mesh.flatten().tolist())
    if job.rank not in ranks:
        raise ValueError(f"a partition needs a group that this rank, {job.rank}, belongs to, not {ranks}")
    if ranks not in job.transports:
        job.transports[ranks] = TorchTransport(job, ranks)
    return job.transports[ranks]


class TorchTransport(ProcessTransport):
    """Some ranks of a job."""

    name = "torch.distributed"
    launcher = "torchrun --nproc-per-node {}"
    engine = "poll"
    threads_may_call = True

    def __init__(self, job: _Job, ranks: tuple[int, ...]) -> None:
        self._job, self._ranks = job, ranks
        self._begin(ranks.index(job.rank), len(ranks), proc_null=-2)
        self._board = Switchboard(dist.PrefixStore(job.new_name(ranks), job.store), self.rank)
        self._streams, self._lines = Streams(self._board), dict[Team, Line]()
        self._world = self.team(range(self.size)).comm = self.make_group(range(self.size))
        take_part(self)

    def make_group(self, ranks: Sequence[int]) -> TorchGroup:
        known = tuple(self._ranks[rank] for rank in ranks)
        name, other = self._job.new_name(known), [rank for rank in ranks if rank != self.rank]
        swap = partial(self._swap, *self._streams.between(other, name).values()) if len(other) == 1 else None
        job = self._job
        return TorchGroup(dist.PrefixStore(name, job.store), known.index(job.rank), len(known), job.has_nccl, swap)

    def _swap(self, stream: Stream, sent: torch.Tensor | None, received: torch.Tensor | None) -> None:
        moving = [] if received is None else [stream.receive(_memory(received))]
        moving += [] if sent is None else [stream.send(_memory(sent))]
        self._streams.move(moving)

    def user_communicator(self, ranks: Sequence[int]) -> dist.ProcessGroup:
        return self._job.public_group(tuple(self._ranks[rank] for rank in ranks))

    def home(self, device: torch.device) -> torch.device:
        return device if device.type in self._world.backends else HOST

    def on_wire(self, tensor: torch.Tensor) -> torch.Tensor:
        return super().on_wire(tensor.to(_ADDED_AS.get(tensor.dtype, tensor.dtype)))

    def has(self, leg: Leg, device: torch.device) -> bool:
        """Gloo's reduce-scatter takes five times as long as messages, and its all-gather twice; NCCL's want equal blocks."""
        return leg.pattern not in _BY_MESSAGES or (self.home(device) != HOST and len(set(counts_of(leg))) == 1)

    def requests(self, sends: Sequence[wire.Message], receives: Sequence[wire.Message]) -> Requests:
        if any(not message.buffer.is_cpu for message in (*sends, *receives)):
            return NCCLMessages(self._world, sends, receives)
        return SocketMessages(self._streams, sends, receives)

    def make_vote(self, team: Team) -> Line:
        return Line(self._board, team, "votes")

    def _line(self, team: Team) -> Line:
        if team not in self._lines:
            self._lines[team] = Line(self._board, team, "data")
        return self._lines[team]

    @counted()
    def gather_objects(self, team: Team, value: Any) -> list[Any]:
        return self._line(team).told(value)

    @counted()
    def maxima(self, team: Team, numbers: Sequence[int]) -> list[int]:
        return self._line(team).maxima(numbers)

    @counted("rows")
    def exchange_rows(self, ranks: Sequence[int], sends: RowsByRank, receives: RowsByRank) -> Rows:
        ranks = tuple(ranks)
        if ranks not in self._row_groups:
            # Of its own: an exchange is under way while the ranks' other calls come and go.
            self._row_groups[ranks] = self.make_group(ranks)
        return Rows(self._row_groups[ranks], sends, receives, self.home(sends.tensor.device))


class TorchGroup:
    """The collectives of a group on contiguous tensors of any dtype; where there are GPUs enough, on theirs too.

    Two ranks of the host swap tensors instead, in a part of the time.
    """

    def __init__(
        self, store: dist.Store, rank: int, size: int, has_nccl: bool, swap: Callable[..., None] | None = None
    ) -> None:
        self.rank, self.size, self._swap = rank, size, swap
        self.backends: dict[str, Any] = {"cpu": dist.ProcessGroupGloo(dist.PrefixStore("cpu", store), rank, size)}
        if has_nccl:
            self.backends["cuda"] = dist.ProcessGroupNCCL(dist.PrefixStore("cuda", store), rank, size)
            # Else the first messages of two ranks would wait for all the others.
            self.backends["cuda"].eager_connect_single_device(torch.device("cuda", torch.cuda.current_device()))

    def of(self, tensor: torch.Tensor) -> Any:
        return self.backends[tensor.device.type]

    def broadcast(self, tensor: torch.Tensor, root: int) -> None:
        if self._swap is None or not tensor.is_cpu:
            self.of(tensor).broadcast(_bytes(tensor), root).wait()
        elif self.rank == root:
            self._swap(tensor, None)
        else:
            self._swap(None, tensor)

    def reduce(self, sent: torch.Tensor, total: torch.Tensor | None, root: int) -> None:
        if self._swap is not None and sent.is_cpu:
            if total is None:
                self._swap(sent, None)
            else:
                received = torch.empty_like(sent)
                self._swap(None, received)
                torch.add(sent, received, out=total)
            return
        # Others than the root get parts of the sum.
        total = sent.clone() if total is None else total if total is sent else total.copy_(sent)
        self.of(total).reduce(_numbers(total), root).wait()

    def all_reduce(self, sent: torch.Tensor, total: torch.Tensor, op: str = "sum") -> None:
        if self._swap is not None and sent.is_cpu:
            received = torch.empty_like(sent)
            self._swap(sent, received)
            _FOLDS[op](sent, received, out=total)
            return
        if total is not sent:
            total.copy_(sent)
        self.of(total).allreduce(_numbers(total), _OPS[op]).wait()

    def post_all_reduce(self, tensor: torch.Tensor) -> Posted:
        return Posted(self.of(tensor).allreduce(_numbers(tensor)))

    def all_gather(self, mine: torch.Tensor, flat: torch.Tensor, counts: Sequence[int]) -> None:
        self.of(mine).allgather(list(_bytes(flat).chunk(self.size)), _bytes(mine)).wait()

    def reduce_scatter(self, flat: torch.Tensor, mine: torch.Tensor, counts: Sequence[int]) -> None:
        self.of(mine).reduce_scatter(_numbers(mine), list(_numbers(flat.view(-1)).chunk(self.size))).wait()

    def all_to_all(self, rows: torch.Tensor, received: torch.Tensor) -> None:
        self.of(rows).alltoall_base(_bytes(received), _bytes(rows), [], []).wait()


def gpus_suffice(store: dist.Store, rank: int, size: int) -> bool:
    """Whether tensors of GPUs travel by NCCL, which wants one for each process; a warning says where it alone is missing."""
    mine = gpu()
    store.set(f"distdl_lite gpu {rank}", mine)
    if not mine:  # as the others will find
        return False
    told = {store.get(f"distdl_lite gpu {other}") for other in range(size)}
    suffice = len(told) == size and b"" not in told
    if suffice and not dist.is_nccl_available():
        warnings.warn("this torch has no NCCL: tensors of GPUs go through host memory", stacklevel=2)
        return False
    return suffice


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous tensor; one of a single element is contiguous whatever its strides."""
    return tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _memory(tensor: torch.Tensor) -> memoryview:
    """The same of a tensor of the host, for sockets."""
    return memoryview(_bytes(tensor).numpy())


def _numbers(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as what can be added."""
    return torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()


class Posted:
    """A collective under way, which its group carries out by itself."""

    def __init__(self, work: Any) -> None:
        self._work = work

    def Test(self) -> bool:
        return bool(self._work.is_completed())

    def Wait(self) -> None:
        self._work.wait()


class SocketMessages:
    """The messages of an exchange between tensors of the host."""

    def __init__(self, streams: Streams, sends: Sequence[wire.Message], receives: Sequence[wire.Message]) -> None:
        to = streams.between({message.peer for message in (*sends, *receives)})
        self._streams, self._sends = streams, sends
        self._given, self._taken = ([(to[m.peer], _memory(m.buffer)) for m in part] for part in (sends, receives))
        self._moving: list[Piece] = []

    def start(self, source: Any) -> None:
        self._moving = [stream.receive(memory) for stream, memory in self._taken]
        for message, (stream, memory) in zip(self._sends, self._given, strict=True):
            message.pack(source)
            self._moving.append(stream.send(memory))

    def receive(self) -> None:
        """Wait for what goes, too: it moves while this rank waits."""
        self._streams.move(self._moving)


class NCCLMessages:
    """The same between tensors of GPUs, all messages together, so that none waits for another."""

    def __init__(self, world: TorchGroup, sends: Sequence[wire.Message], receives: Sequence[wire.Message]) -> None:
        self._sends, self._nccl = sends, world.backends["cuda"]
        self._taken, self._given = ([([_bytes(m.buffer)], m.peer, 0) for m in part] for part in (receives, sends))
        self._work: Any = None

    def start(self, source: Any) -> None:
        for message in self._sends:
            message.pack(source)
        self._nccl._start_coalescing()
        for call in self._taken:
            self._nccl.recv(*call)
        for call in self._given:
            self._nccl.send(*call)
        self._work = self._nccl._end_coalescing()

    def receive(self) -> None:
        self._work.wait()


class Rows:
    """Rows under way between the ranks of a group."""

    def __init__(self, group: TorchGroup, sends: RowsByRank, receives: RowsByRank, home: torch.device) -> None:
        self._into = receives.tensor
        sent, row = _bytes(sends.tensor.to(home).contiguous()), sends.tensor[:1].nbytes or receives.tensor[:1].nbytes
        self._received = torch.empty(self._into.nbytes, dtype=torch.uint8, device=home)
        given, taken = ([row * n for n in rows.counts] for rows in (sends, receives))
        self._posted = Posted(group.of(sent).alltoall_base(self._received, sent, taken, given))

    def test(self) -> bool:
        return self._posted.Test()

    def finish(self) -> torch.Tensor:
        self._posted.Wait()
        return self._into.copy_(self._received.view(self._into.dtype).view(self._into.shape))
