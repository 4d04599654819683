"""The transport over torch.distributed: Gloo moves tensors of the host, NCCL those of GPUs.

It works on groups of its own, one for each team of ranks, so that a user's traffic cannot match its messages. They are
made from torch's store by their members alone, for which there are no public calls: ``torch.distributed.new_group`` wants all
ranks of the job, or the same number of groups made before on each of them.
"""

from __future__ import annotations

import atexit
import hashlib
import warnings
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from distdl_lite.plan import Pattern
from distdl_lite.transport import RowsByRank, Team, wire
from distdl_lite.transport.counts import counted
from distdl_lite.transport.devices import HOST, gpus_suffice, take_gpu
from distdl_lite.transport.processes import ProcessTransport
from distdl_lite.transport.sockets import Line, Switchboard

_TIMEOUT = timedelta(minutes=30)  # torch's own for Gloo
_ADDED_AS = {torch.int16: torch.int32}  # Gloo and NCCL add none of these
_BY_MESSAGES = Pattern.ALL_GATHER, Pattern.REDUCE_SCATTER
_FOLDS = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}
_SWAP = 1  # the tag of swaps between two ranks; that of exchanges is 0
_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


class _Job:
    """The processes of torch's default group, which is made from the launcher's variables if there is none."""

    now: _Job | None = None

    def __init__(self) -> None:
        take_gpu()
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if uses_nccl() else "gloo")
            atexit.register(_destroy)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.store = c10d._get_default_store()
        self.made: Counter[tuple[int, ...]] = Counter()
        self.transports: dict[tuple[int, ...], TorchTransport] = {}

    def new_name(self, ranks: tuple[int, ...]) -> str:
        """A name for what these ranks are about to make together."""
        self.made[ranks] += 1
        digest = hashlib.blake2b(str(ranks).encode(), digest_size=8).hexdigest()  # of thousands of ranks, too
        return f"distdl_lite {digest} {self.made[ranks]}"

    def group(self, ranks: tuple[int, ...]) -> TorchGroup:
        """A new group of these ranks, in their order, which make it together."""
        store = dist.PrefixStore(self.new_name(ranks), self.store)
        return TorchGroup(store, ranks.index(self.rank), len(ranks))

    def public_group(self, ranks: tuple[int, ...]) -> dist.ProcessGroup:
        """The same as one that torch.distributed knows; see above for the calls that are not public."""
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
        self._world = job.group(ranks)
        self._begin(self._world.rank, self._world.size, proc_null=-2)
        self.team(range(self.size)).comm = self._world
        self._board = Switchboard(dist.PrefixStore(job.new_name(ranks), job.store), self.rank)
        self._lines: dict[Team, Line] = {}

    def make_group(self, ranks: Sequence[int]) -> TorchGroup:
        return self._job.group(tuple(self._ranks[rank] for rank in ranks))

    def user_communicator(self, ranks: Sequence[int]) -> dist.ProcessGroup:
        return self._job.public_group(tuple(self._ranks[rank] for rank in ranks))

    def home(self, device: torch.device) -> torch.device:
        return device if device.type in self._world.backends else HOST

    def on_wire(self, tensor: torch.Tensor) -> torch.Tensor:
        dtype = _ADDED_AS.get(tensor.dtype) or wire.wire_dtype(tensor.dtype)
        return tensor.to(self.home(tensor.device), dtype).contiguous()

    def has(self, pattern: Pattern, counts: Sequence[int], device: torch.device) -> bool:
        """Gloo's reduce-scatter takes five times as long as messages, and its all-gather twice; NCCL's want equal blocks."""
        return pattern not in _BY_MESSAGES or (self.home(device) != HOST and len(set(counts)) == 1)

    def requests(self, sends: Sequence[wire.Message], receives: Sequence[wire.Message]) -> Messages:
        return Messages(self._world, sends, receives)

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
    """The collectives of a group on contiguous tensors of any dtype; where there are GPUs enough, on theirs too."""

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.backends: dict[str, Any] = {"cpu": dist.ProcessGroupGloo(dist.PrefixStore("cpu", store), rank, size)}
        if uses_nccl():
            self.backends["cuda"] = dist.ProcessGroupNCCL(dist.PrefixStore("cuda", store), rank, size)
            # Else the first messages of two ranks would wait for all the others.
            self.backends["cuda"].eager_connect_single_device(torch.device("cuda", torch.cuda.current_device()))

    def of(self, tensor: torch.Tensor) -> Any:
        return self.backends[tensor.device.type]

    def broadcast(self, tensor: torch.Tensor, root: int) -> None:
        self.of(tensor).broadcast(_bytes(tensor), root).wait()

    def _with_other(self, sent: torch.Tensor, received: torch.Tensor | None, sends: bool = True) -> bool:
        """Let two ranks of the host swap tensors: half the time of Gloo's sum. False where there are not two."""
        if self.size != 2 or not sent.is_cpu:
            return False
        gloo, other = self.of(sent), 1 - self.rank
        works = [] if received is None else [gloo.recv([_bytes(received)], other, _SWAP)]
        works += [gloo.send([_bytes(sent)], other, _SWAP)] if sends else []
        for work in works:
            work.wait()
        return True

    def reduce(self, sent: torch.Tensor, total: torch.Tensor | None, root: int) -> None:
        received = None if total is None else torch.empty_like(sent)
        if self._with_other(sent, received, sends=total is None):
            if total is not None:
                torch.add(sent, received, out=total)
            return
        # Others than the root get parts of the sum.
        total = sent.clone() if total is None else total if total is sent else total.copy_(sent)
        self.of(total).reduce(_numbers(total), root).wait()

    def all_reduce(self, sent: torch.Tensor, total: torch.Tensor, op: str = "sum") -> None:
        received = torch.empty_like(sent)
        if self._with_other(sent, received):
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


@cache
def uses_nccl() -> bool:
    """Whether tensors of GPUs travel by NCCL, not through host memory; a warning says where it alone is missing."""
    if gpus_suffice() and not dist.is_nccl_available():
        warnings.warn("this torch has no NCCL: tensors of GPUs go through host memory", stacklevel=2)
    return gpus_suffice() and dist.is_nccl_available()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous tensor."""
    return tensor.detach().view(-1).view(torch.uint8)


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


class Messages:
    """The messages of an exchange. NCCL gets them together, so that none waits for another."""

    def __init__(self, world: TorchGroup, sends: Sequence[wire.Message], receives: Sequence[wire.Message]) -> None:
        self._sends = sends
        crossing = [*receives, *sends]
        self._backend = world.of(crossing[0].buffer) if crossing else None
        self._joins = bool(crossing) and crossing[0].buffer.is_cuda
        self._taken, self._given = ([([_bytes(m.buffer)], m.peer, 0) for m in part] for part in (receives, sends))
        self._works: list[Any] = []

    def start(self, source: Any) -> None:
        for message in self._sends:
            message.pack(source)
        if self._backend is None:
            return
        if self._joins:
            self._backend._start_coalescing()
        works = [self._backend.recv(*call) for call in self._taken]
        works += [self._backend.send(*call) for call in self._given]
        self._works = [self._backend._end_coalescing()] if self._joins else works

    def receive(self) -> None:
        """What goes is waited for too: Gloo does not send what nobody waits for."""
        for work in self._works:
            work.wait()


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
