"""torch.distributed over MPI: stock torch code runs under mpirun from the wheels of PyPI.

torch has an MPI backend, but not in its wheels. This one is a process group in Python over mpi4py.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import numpy
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _create_work_from_future
from torch.futures import Future

from distdl_lite.agreement import vote_of
from distdl_lite.partition import Partition, partition_of
from distdl_lite.private import untraced
from distdl_lite.transport import wire

BACKEND = "distdl"
DEVICES = ["cpu", "cuda"]

Tensors = Sequence[torch.Tensor]

_UNFINISHED: list[Any] = []  # requests given up, into whose memory MPI may yet write

_Kind = dist.ReduceOp.RedOpType
_OF_BITS = {_Kind.BAND: "BAND", _Kind.BOR: "BOR", _Kind.BXOR: "BXOR"}
_OF_BOOLS = {**_OF_BITS, _Kind.SUM: "BOR", _Kind.MAX: "BOR", _Kind.PRODUCT: "BAND", _Kind.MIN: "BAND"}
_OF_COMPLEX = {_Kind.SUM: "SUM", _Kind.AVG: "SUM", _Kind.PRODUCT: "PROD"}
_OF_FLOATS = {**_OF_COMPLEX, _Kind.MIN: "MIN", _Kind.MAX: "MAX"}
_BUT_SUM = "PROD", "MIN", "MAX", "BAND", "BOR", "BXOR"
_OF_INTEGERS = {**{kind: name for kind, name in _OF_FLOATS.items() if kind is not _Kind.AVG}, **_OF_BITS}


class MPIProcessGroup(dist.ProcessGroup):
    """A process group of torch.distributed over MPI, made by `init` or after it by ``torch.distributed.new_group``.

    All ranks of the group make the same calls in the same order. A call runs to its end before it returns, also with
    ``async_op=True``, whose work object is then complete; only ``isend`` and ``irecv`` go on until their ``wait()``. So
    nothing overlaps with ``backward()``, and no call of MPI is made from a thread that the caller does not know of.

    Reductions are SUM, PRODUCT, MIN and MAX, AVG of floating and complex numbers, BAND, BOR and BXOR of integers. Bools are
    reduced by "or" (SUM, MAX, BOR), "and" (PRODUCT, MIN, BAND) and BXOR. float16 and bfloat16 are reduced in float32 and
    rounded once. All dtypes can be copied. Tensors of any memory order, and on a device, go through a contiguous copy in
    host memory. The numbers of elements may differ between ranks where each rank has a list of tensors.

    Parameters
    ----------
    P, limit
        Of `init`, which makes it: its partition, and its timeout in seconds.

    Raises
    ------
    TypeError
        For a sparse tensor, or a reduction that the dtype does not have, PREMUL_SUM always.
    ValueError
        If the tensors of one rank do not fit each other.
    TimeoutError
        If there is a limit and the other ranks do not come; collectives are refused from then on.
    RuntimeError
        After the group is destroyed; or where ranks make different calls, if there is a limit or ``TORCH_DISTRIBUTED_DEBUG`` is
        ``DETAIL``. Errors of MPI itself are mpi4py's ``MPI.Exception``, a RuntimeError too.

    Examples
    --------
    Under ``mpirun``, in a program that knows torch's DDP alone::

        dl.MPIProcessGroup.init()
        net = torch.nn.parallel.DistributedDataParallel(model)
    """

    _origin: Partition  # the ranks of the default group
    _limited = False

    @classmethod
    def init(
        cls, P: Any = None, timeout: float | timedelta | None = None, store: dist.Store | None = None
    ) -> MPIProcessGroup | None:
        """Make the default group of torch.distributed, in place of ``torch.distributed.init_process_group``.

        It opens no port and reads no environment variable. ``torch.distributed.destroy_process_group()`` ends it.

        Parameters
        ----------
        P : Partition or communicator, optional
            Its ranks, in its order, are those of the group. None is all MPI ranks.
        timeout : float or datetime.timedelta, optional
            Seconds that a rank waits in a call for the others, the same on all ranks. Before each call they then also find
            out whether it is the same, in some microseconds. None waits for ever.
        store : torch.distributed.Store, optional
            For a program that reads the group's store itself. torch's own parallel modules do without.

        Returns
        -------
        MPIProcessGroup or None
            None on a rank outside `P`.

        Raises
        ------
        ValueError
            If the ranks are threads, the timeout is not positive, or torch has a default group already.
        """
        P = partition_of(P)
        if timeout is not None:
            timeout = timeout if isinstance(timeout, timedelta) else timedelta(seconds=timeout)
            if timeout <= timedelta(0):
                raise ValueError(f"a timeout of {timeout.total_seconds():g} s is not positive")
        if P.world_transport.name != "MPI":
            raise ValueError(f"a process group over MPI needs MPI ranks, not {P.world_transport.name}")
        if not P.active:
            return None
        if BACKEND not in dist.Backend.backend_list:
            dist.Backend.register_backend(BACKEND, _create, extended_api=True, devices=DEVICES)
        if not dist.is_initialized():
            cls._origin, cls._limited = P, timeout is not None
        store = NoStore() if store is None else store
        hook = sys.excepthook
        dist.init_process_group(BACKEND, store=store, rank=P.rank, world_size=P.size, timeout=timeout)
        if hook is not sys.__excepthook__:  # torch's keeps back what abort_on_exception prints until it has ended us
            sys.excepthook = hook
        group = dist.group.WORLD
        assert isinstance(group, MPIProcessGroup)
        group._store = store  # torch keeps what is C++ of it
        return group

    def __init__(self, P: Partition, limit: float | None) -> None:
        comm = P.world_transport.user_communicator(P.ranks)
        super().__init__(P.rank, P.size)
        self._comm, self._limit = comm, limit
        self._MPI = sys.modules[type(comm).__module__]  # mpi4py's, which the transport has imported
        self._closed = self._name = ""
        self._is_checked = dist.get_debug_level() == dist.DebugLevel.DETAIL
        self._transfers: set[_Transfer] = set()
        for device in DEVICES:
            self._register_backend(torch.device(device), dist.ProcessGroup.BackendType.CUSTOM, None)

    def getBackendName(self) -> str:
        return BACKEND

    def setGroupName(self, name: str) -> None:
        self._name = name

    def getGroupName(self) -> str:
        return self._name

    @property
    def group_name(self) -> str:
        return self._name

    def shutdown(self) -> None:
        """Free the communicator; ``torch.distributed.destroy_process_group`` calls this on all ranks."""
        if self._comm:
            self._closed = "the process group is destroyed"
            self._comm.Free()

    def _start_coalescing(self, device: torch.device) -> None:
        """Calls are not put together: each runs at once."""

    def _end_coalescing(self, device: torch.device) -> dist.Work:
        return _done(())

    def _run(self, name: str, *arguments: Any) -> None:
        """A call of all ranks; with a limit, once all of them have come."""
        if self._closed:
            raise RuntimeError(f"{name}: {self._closed}")
        if self._is_checked or self._limit is not None:
            self._compare(name, arguments)
        getattr(self._comm, name)(*arguments)

    def _compare(self, name: str, arguments: Sequence[Any]) -> None:
        """Raise on all ranks unless they come within the limit and make the same call.

        One that makes another would not be waited for in vain here, where every rank comes before a call, but in it.
        """
        arrays = [f" of {a.size} {a.dtype}" for a in arguments if isinstance(a, numpy.ndarray)]
        varies = name.endswith("v")  # how much, from rank to rank
        root = [f" with root {a}" for a in arguments if isinstance(a, int)]
        ops = [f" by {op}" for a in arguments for op in _BUT_SUM if a is getattr(self._MPI, op)]
        call = "".join([name, *([] if varies else arrays[:1]), *ops, *root])
        if self._limit is not None and self._is_same(call, name, self._limit):
            return
        calls = self._comm.allgather(call)
        if len(set(calls)) > 1:
            told = ", ".join(f"rank {rank} {call}" for rank, call in enumerate(calls))
            raise RuntimeError(f"the ranks make different calls: {told}")

    def _is_same(self, call: str, name: str, limit: float) -> bool:
        """Whether all ranks name the same call, once they have come."""
        largest = numpy.array([vote_of(call), -vote_of(call)])  # of the numbers, and of their negatives
        request = self._comm.Iallreduce(self._MPI.IN_PLACE, largest, self._MPI.MAX)
        try:
            self._finish(request, name, limit)
        except TimeoutError as error:
            self._closed = f"a call before has failed: {error}"
            _UNFINISHED.append(request)
            raise
        return bool(largest[0] == -largest[1])

    def _finish(self, request: Any, name: str, limit: float | None, status: Any = None) -> None:
        if limit is None:
            request.Wait(status)
            return
        end = time.monotonic() + limit
        while not request.Test(status):
            if time.monotonic() > end:
                who = f"rank {self.rank()} of {self.size()}"
                raise TimeoutError(f"{who}: {name} has waited {limit:g} s for other ranks")

    def _reduction(self, op: Any, tensor: torch.Tensor) -> tuple[Any, torch.dtype]:
        """MPI's operation, and the dtype in which the tensor travels."""
        kind = getattr(op, "op", op)
        name = _reductions(tensor.dtype).get(kind)
        if name is None:
            raise TypeError(f"{tensor.dtype} tensors have no reduction {kind.name} over MPI")
        dtype = torch.uint8 if tensor.dtype is torch.bool else wire.wire_dtype(tensor.dtype)
        return getattr(self._MPI, name), dtype

    def _deliver(self, result: torch.Tensor, op: Any, target: torch.Tensor) -> None:
        """Store what was reduced."""
        _fill(target, result.div_(self.size()) if op == dist.ReduceOp.AVG else result)

    def _check_share(self, whole: torch.Tensor, part: torch.Tensor) -> None:
        if whole.numel() != self.size() * part.numel() or whole.dtype is not part.dtype:
            wanted = f"{self.size()} times a {part.dtype} tensor of shape {tuple(part.shape)}"
            raise ValueError(f"a {whole.dtype} tensor of shape {tuple(whole.shape)} is not {wanted}")

    @untraced
    def broadcast(self, tensors: Tensors, opts: Any) -> dist.Work:
        for tensor in tensors:
            sent = _host(tensor)
            self._run("Bcast", _bytes(sent), opts.rootRank)
            _fill(tensor, sent)
        return _done(tensors)

    @untraced
    def allreduce(self, tensors: Tensors | torch.Tensor, opts: Any = None) -> dist.Work:
        tensors = [tensors] if isinstance(tensors, torch.Tensor) else tensors
        kind = dist.ReduceOp.SUM if opts is None else opts.reduceOp
        for tensor in tensors:
            op, dtype = self._reduction(kind, tensor)
            sent = _host(tensor, dtype)
            self._run("Allreduce", self._MPI.IN_PLACE, sent.numpy(), op)
            self._deliver(sent, kind, tensor)
        return _done(tensors)

    allreduce_coalesced = allreduce

    @untraced
    def reduce(self, tensors: Tensors, opts: Any) -> dist.Work:
        for tensor in tensors:
            op, dtype = self._reduction(opts.reduceOp, tensor)
            sent = _host(tensor, dtype)
            if self.rank() == opts.rootRank:
                self._run("Reduce", self._MPI.IN_PLACE, sent.numpy(), op, opts.rootRank)
                self._deliver(sent, opts.reduceOp, tensor)
            else:
                self._run("Reduce", sent.numpy(), None, op, opts.rootRank)
        return _done(tensors)

    @untraced
    def allgather(self, outputs: Sequence[Tensors], inputs: Tensors, opts: Any = None) -> dist.Work:
        for parts, mine in zip(outputs, inputs, strict=True):
            whole = _Parts(parts, self, mine)
            self._run("Allgatherv", _bytes(_host(mine)), whole.spec)
            whole.unpack()
        return _done(outputs)

    @untraced
    def allgather_coalesced(self, outputs: Sequence[Tensors], inputs: Tensors, opts: Any = None) -> dist.Work:
        return self.allgather(list(zip(*outputs, strict=True)), inputs)

    @untraced
    def all_gather_single_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> dist.Work:
        for output, mine in zip(outputs, inputs, strict=True):
            self._check_share(output, mine)
            whole = _buffer(output)
            sent = _host(mine)
            if _overlap(sent, whole):  # FSDP gathers into the memory it sends from; MPI forbids that
                sent = sent.clone()
            self._run("Allgather", _bytes(sent), _bytes(whole))
            _fill(output, whole)
        return _done(outputs)

    @untraced
    def all_gather_single(self, output: torch.Tensor, mine: torch.Tensor, opts: Any = None) -> dist.Work:
        return self.all_gather_single_coalesced([output], [mine])

    @untraced
    def reduce_scatter(self, outputs: Tensors, inputs: Sequence[Tensors], opts: Any) -> dist.Work:
        for output, parts in zip(outputs, inputs, strict=True):
            op, dtype = self._reduction(opts.reduceOp, output)
            whole = _Parts(parts, self, output, dtype)
            mine = torch.empty(output.shape, dtype=dtype)
            counts = [part.numel() for part in parts]
            self._run("Reduce_scatter", whole.pack().numpy(), mine.numpy(), counts, op)
            self._deliver(mine, opts.reduceOp, output)
        return _done(outputs)

    @untraced
    def reduce_scatter_single_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any) -> dist.Work:
        for output, whole in zip(outputs, inputs, strict=True):
            self._check_share(whole, output)
            op, dtype = self._reduction(opts.reduceOp, output)
            mine = torch.empty(output.shape, dtype=dtype)
            self._run("Reduce_scatter_block", _host(whole, dtype).numpy(), mine.numpy(), op)
            self._deliver(mine, opts.reduceOp, output)
        return _done(outputs)

    @untraced
    def reduce_scatter_single(self, output: torch.Tensor, whole: torch.Tensor, opts: Any) -> dist.Work:
        return self.reduce_scatter_single_coalesced([output], [whole], opts)

    @untraced
    def gather(self, outputs: Sequence[Tensors], inputs: Tensors, opts: Any) -> dist.Work:
        (mine,) = inputs
        if self.rank() == opts.rootRank:
            whole = _Parts(outputs[0], self, mine)
            self._run("Gatherv", _bytes(_host(mine)), whole.spec, opts.rootRank)
            whole.unpack()
        else:
            self._run("Gatherv", _bytes(_host(mine)), None, opts.rootRank)
        return _done(outputs)

    @untraced
    def scatter(self, outputs: Tensors, inputs: Sequence[Tensors], opts: Any) -> dist.Work:
        (output,) = outputs
        mine, spec = _buffer(output), None
        if self.rank() == opts.rootRank:
            whole = _Parts(inputs[0], self, output)
            whole.pack()
            spec = whole.spec
        self._run("Scatterv", spec, _bytes(mine), opts.rootRank)
        _fill(output, mine)
        return _done(outputs)

    @untraced
    def alltoall(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> dist.Work:
        sent = _Parts(inputs, self)
        received = _Parts(outputs, self, inputs[self.rank()])
        sent.pack()
        self._run("Alltoallv", sent.spec, received.spec)
        received.unpack()
        return _done(outputs)

    @untraced
    def all_to_all_single(
        self,
        output: torch.Tensor,
        whole: torch.Tensor,
        output_sizes: Sequence[int],
        input_sizes: Sequence[int],
        opts: Any = None,
    ) -> dist.Work:
        return self.alltoall(self._rows(output, output_sizes), self._rows(whole, input_sizes))

    def _rows(self, tensor: torch.Tensor, sizes: Sequence[int]) -> Tensors:
        """The rows of each rank; without sizes, the same number each."""
        rows = tensor.shape[0]
        if not sizes and rows % self.size():
            raise ValueError(f"{rows} rows cannot be cut evenly over {self.size()} ranks")
        return tensor.detach().split(list(sizes) or [rows // self.size()] * self.size())

    @untraced
    def barrier(self, opts: Any = None) -> dist.Work:
        self._run("Barrier")
        return _done(())

    # Names of older torch.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single

    @untraced
    def send(self, tensors: Tensors, rank: int, tag: int) -> dist.Work:
        (tensor,) = tensors
        sent = _host(tensor)
        return self._transfer("send", self._comm.Isend(_bytes(sent), rank, tag), sent)

    @untraced
    def recv(self, tensors: Tensors, rank: int, tag: int) -> dist.Work:
        (tensor,) = tensors
        received = _buffer(tensor)
        return self._transfer("recv", self._comm.Irecv(_bytes(received), rank, tag), received, tensor)

    @untraced
    def recv_anysource(self, tensors: Tensors, tag: int) -> dist.Work:
        return self.recv(tensors, self._MPI.ANY_SOURCE, tag)

    def _transfer(self, *arguments: Any) -> _Transfer:
        for transfer in list(self._transfers):
            if transfer.is_send:
                transfer.is_completed()
        made = _Transfer(self, *arguments)
        self._transfers.add(made)
        return made


class _Transfer(dist.Work):
    """A message under way. The group keeps it, for MPI uses its buffer until it has ended."""

    def __init__(
        self, group: MPIProcessGroup, name: str, request: Any, buffer: torch.Tensor, target: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self._group, self._name, self._request, self._buffer, self._target = group, name, request, buffer, target
        self.is_send = target is None
        self._status = group._MPI.Status()

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Wait for the message; a `timeout` goes before the group's."""
        if self._request:
            limit = timeout.total_seconds() or self._group._limit
            self._group._finish(self._request, self._name, limit, self._status)
            self._end()
        return True

    def is_completed(self) -> bool:
        if self._request and self._request.Test(self._status):
            self._end()
        return not self._request

    def _end(self) -> None:
        self._group._transfers.discard(self)
        if not self.is_send:
            came, wanted = self._status.Get_count(), self._buffer.nbytes
            if came != wanted:
                raise ValueError(f"{came} bytes came from rank {self.source_rank()} for a tensor of {wanted} bytes")
            _fill(self._target, self._buffer)

    def source_rank(self) -> int:
        return int(self._status.Get_source())

    _source_rank = source_rank

    def result(self) -> list[torch.Tensor]:
        self.wait()
        return [self._buffer if self._target is None else self._target]

    def get_future(self) -> Future[list[torch.Tensor]]:
        """The future of a message that has ended: this waits for it."""
        return _future(self.result())


class NoStore(dist.Store):
    """In the place of a store: ranks of MPI need none to find each other."""

    def _refuse(self, *arguments: Any, **options: Any) -> Any:
        raise RuntimeError("this process group over MPI has no store; MPIProcessGroup.init takes one")

    set = get = add = wait = check = compare_set = delete_key = num_keys = set_timeout = _refuse
    append = multi_get = multi_set = has_extended_api = _refuse


def _reductions(dtype: torch.dtype) -> dict[Any, str]:
    """Names in MPI of the reductions that a dtype has."""
    if dtype is torch.bool:
        return _OF_BOOLS
    if dtype.is_complex:
        return _OF_COMPLEX
    if dtype.is_floating_point:
        return _OF_FLOATS if dtype.itemsize > 1 else {}
    return _OF_INTEGERS


def _create(options: Any, more: Any) -> MPIProcessGroup:
    """Make a group for torch; the ranks of a sub-group are numbers in the default group."""
    P = MPIProcessGroup._origin
    if ranks := options.global_ranks_in_group:
        P = P.create_partition_inclusive(ranks)
    limit = options.timeout.total_seconds() if MPIProcessGroup._limited else None
    return MPIProcessGroup(P, limit)


def _future(result: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(result)
    return future


def _done(result: Any) -> dist.Work:
    """A work object that has ended. It is none in Python: DDP crashes when such a one's future holds an error."""
    return _create_work_from_future(_future(list(result)))


def _check_layout(tensor: torch.Tensor) -> None:
    if tensor.layout is not torch.strided:
        raise TypeError(f"a process group over MPI moves no tensors of layout {tensor.layout}")


def _host(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The values, contiguous in host memory; over the tensor's own memory where it is so already."""
    _check_layout(tensor)
    return tensor.detach().to("cpu", dtype or tensor.dtype).resolve_conj().resolve_neg().contiguous()


def _buffer(tensor: torch.Tensor) -> torch.Tensor:
    """Host memory to receive a tensor in, the tensor's own if that will do."""
    _check_layout(tensor)
    if tensor.is_cpu and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg()):
        return tensor.detach()
    return torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format)


def _fill(tensor: torch.Tensor, buffer: torch.Tensor) -> None:
    """Store what came, unless it came into the tensor's memory; a version counter does not move, as in torch's groups."""
    if buffer.data_ptr() != tensor.data_ptr() or buffer.dtype is not tensor.dtype:
        tensor.data.copy_(buffer)


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two contiguous tensors share memory, be it of one storage or not, such as two views of a NumPy array."""
    return a.data_ptr() < b.data_ptr() + b.nbytes and b.data_ptr() < a.data_ptr() + a.nbytes


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.view(-1).view(torch.uint8).numpy()


class _Parts:
    """A tensor for each rank, one behind the other in one buffer; this rank's goes together with a tensor of its `own`."""

    def __init__(
        self, parts: Tensors, group: MPIProcessGroup, own: torch.Tensor | None = None, dtype: torch.dtype | None = None
    ) -> None:
        size, rank = group.size(), group.rank()
        if len(parts) != size or len({part.dtype for part in parts}) > 1:
            raise ValueError(f"{[part.dtype for part in parts]} are not {size} tensors of one dtype")
        mine = parts[rank]
        if own is not None and (mine.numel() != own.numel() or mine.dtype is not own.dtype):
            shapes = f"{mine.dtype} of shape {tuple(mine.shape)} and {own.dtype} of shape {tuple(own.shape)}"
            raise ValueError(f"rank {rank}: its part in the list and its tensor do not fit: {shapes}")
        self.parts = parts
        self.buffer = torch.empty(sum(part.numel() for part in parts), dtype=dtype or parts[0].dtype)
        self._pieces = self.buffer.split([part.numel() for part in parts])

    @property
    def spec(self) -> list[Any]:
        """The argument for mpi4py: the bytes, and how many are each rank's."""
        return [_bytes(self.buffer), [piece.nbytes for piece in self._pieces]]

    def pack(self) -> torch.Tensor:
        for part, piece in zip(self.parts, self._pieces, strict=True):
            piece.view(part.shape).copy_(part.detach())
        return self.buffer

    def unpack(self) -> None:
        for part, piece in zip(self.parts, self._pieces, strict=True):
            part.data.copy_(piece.view(part.shape))
