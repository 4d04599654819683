"""When and with which weight the gradients of a module's copies are summed."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch

from distdl_lite.agreement import raise_together
from distdl_lite.parallel.replicas.bucket import FIRST_BYTES, Bucket, filled
from distdl_lite.parallel.replicas.buffers import Buffers
from distdl_lite.parallel.replicas.options import BAD_WEIGHT, Options, as_weight
from distdl_lite.transport import Team, Transport
from distdl_lite.transport.abort import fail_at_exit
from distdl_lite.transport.sums import Pending
from distdl_lite.transport.wire import wire_dtype

Found = list[tuple[int, torch.Tensor | None]]  # parameters' numbers, and the sums of their gradients

# A model with fewer gradients has its sums made where they are started: a thread takes 60 us to wake.
INLINE_BYTES = 2 << 20
_SETTLED = "_distdl_settled"  # says of a gradient over which ranks it has been summed
_CHANGED = (
    "DataParallel: {} was changed, or its gradient taken away, within backward, before the gradient was summed; "
    "let optimizers step after backward"
)
_serials = itertools.count()


def synchronisers(transport: Transport) -> weakref.WeakSet[Synchroniser]:
    """The synchronisers of this rank that are alive."""
    return transport.local.setdefault("synchronisers", weakref.WeakSet())


class Synchroniser:
    """The sums of one module's gradients over one team, backward after backward.

    In each backward that synchronises, every rank sums every bucket once, in one order, with zeros for what it has no
    gradient of. Nothing else is agreed on: which parameters were reached, how much each rank's gradients weigh and which
    parameters are trained travels inside.
    """

    def __init__(
        self,
        names: Sequence[str],
        parameters: Sequence[torch.Tensor],
        late: Iterable[int],  # the numbers of parameters whose .grad is there only at the end of backward
        buffers: Callable[[], Iterable[torch.Tensor | None]],  # returns those of now
        team: Team,
        options: Options,
        lane: int,  # the number of the team's communicator for sums
        is_weighed: bool = False,  # whether gradients have their weights in the mean when backward begins
    ) -> None:
        self.names, self.parameters, self.late = names, parameters, frozenset(late)
        self.buffers = Buffers(buffers, options.sync_buffers)
        self.team, self.options = team, options
        self._divides = not is_weighed and options.average != "none"
        # The weights add up to one, so that what is in .grad on all ranks alike is still in their mean.
        self._keeps_sums = self._divides and options.average != "sum"
        self.count = 0.0  # rows since the last sum
        self.weight: float | None = None  # in place of it
        self._tells_order = True  # in which the root's gradients came: the last bucket of the first backward does
        # Of gradients before their sum: about what the weights added up to last. A power of 2, which rounds nothing off.
        self._scale = 1.0
        self.is_open = self.is_broken = self.has_failed = False  # the last: on all ranks, in the last backward
        self.may_start = True  # before backward ends: the rows of all its forwards are known
        self.backward: int | None = None
        self._local_backward = -1  # the last whose gradients are not summed
        self.arrived: dict[int, None] = {}  # parameters whose gradients have come in this backward
        synchronisers(team.world).add(self)
        self.lane = f"copies {lane}"
        if team.size > 1:
            team.world.open_sums(team, self.lane)
        self.serial = next(_serials)  # the same order on all ranks
        self._plan([n for n, p in enumerate(parameters) if p.requires_grad][::-1])

    def __del__(self) -> None:
        if self.is_open:  # other ranks may not have started its sums
            self.team.world.local.setdefault("spoilt lanes", []).append((self.team, self.lane))

    def _plan(self, order: Sequence[int]) -> None:
        """Cut the parameters that are trained into buckets, in the order in which their gradients come."""
        order = [n for n in order if n not in self.late] + [n for n in order if n in self.late]
        kinds = [(wire_dtype(p.dtype), p.device, n in self.late) for n, p in enumerate(self.parameters)]
        nbytes = [p.numel() * wire_dtype(p.dtype).itemsize for p in self.parameters]
        engine, most = self.options.engine, self.options.bucket_bytes
        if engine == "auto" and sum(nbytes[n] for n in order) < INLINE_BYTES:
            engine = "inline"
        self.engine = engine
        groups = filled(order, nbytes, kinds, most, FIRST_BYTES if self.starts_early else most) or [()]
        headers = [0] * len(groups)
        headers[0] = 3 + len(self.parameters)
        self._tells_order = self._tells_order and self.starts_early and len(groups) > 1
        if self._tells_order:
            headers[-1] = len(self.parameters)
        self.buckets = [
            Bucket(group, [self.parameters[n] for n in group], header)
            for group, header in zip(groups, headers, strict=True)
        ]
        self.places = {n: place for place, group in enumerate(groups) for n in group}

    @property
    def starts_early(self) -> bool:
        """Whether sums start while backward runs, so that each gradient is to be told of by `ready`."""
        return self.options.overlap and self.engine != "inline"

    def begin(self, backward: int | None, takes_part: bool = True) -> None:
        """Start a backward; one that failed before is completed without this rank's gradients."""
        if self.is_open:
            self.abandon()
        self.is_open, self.backward, self._takes_part = True, backward, takes_part
        self._leads = float(takes_part and self.team.world.rank == self.team[0])
        self.has_failed, self._mark, self._error = False, 1.0, None
        self._parameter_versions = [p._version for p in self.parameters]
        self.arrived.clear()
        self._pending: list[Pending] = []
        self._results: dict[int, tuple[list[torch.Tensor | None], float, float]] = {}
        self._weighed: tuple[float, float] | None = None
        for bucket in self.buckets:
            bucket.missing = len(bucket.numbers)
        self._already_summed: dict[int, torch.Tensor] = {}
        self._unweighted: dict[int, torch.Tensor] = {}
        for number, grad in self._settled() if takes_part else ():
            self._already_summed[number], self.parameters[number].grad = grad, None

    def put_aside_unweighted(self) -> None:
        """Put aside this rank's gradients, whose weight is 0 unless rows come: if no rank has rows, `.grad` stays as it was."""
        if self._divides and self.options.average != "ranks":
            self._unweighted = {n: p.grad for n, p in enumerate(self.parameters) if p.grad is not None}
            for number in self._unweighted:
                self.parameters[number].grad = None

    @torch.no_grad()
    def _take_back(self) -> None:
        """Gradients that were put aside weigh something after all."""
        for number, kept in self._unweighted.items():
            grad = self.parameters[number].grad
            self.parameters[number].grad = kept if grad is None else kept.add_(grad)
        self._unweighted.clear()

    def count_rows(self, rows: int) -> None:
        """Backward has reached a forward with so many rows."""
        weighs = self._divides and self.options.average != "ranks" and self.weight is None
        if rows and weighs and self._weighed is not None:
            self.fail(
                "DataParallel: backward reached another forward after sums had started: where the graph of a forward is kept "
                "and gone back through again beside others, use DataParallel(..., overlap=False)"
            )
        self.count += rows

    def _settled(self) -> list[tuple[int, torch.Tensor]]:
        """The gradients that are sums over the ranks, to which another sum is to be added."""
        grads = () if self._keeps_sums else enumerate(p.grad for p in self.parameters)
        return [(n, grad) for n, grad in grads if grad is not None and getattr(grad, _SETTLED, None) == self.team]

    def keep_local(self, backward: int) -> None:
        """Gradients come that are not to be summed yet: those that were zeroed are each rank's own from now on.

        All of them, also where this rank gets no gradient, because others may.
        """
        if backward == self._local_backward:
            return
        self._local_backward = backward
        for number, grad in self._settled():
            if grad.any():
                raise RuntimeError(
                    f"DataParallel: {self.names[number]}.grad holds a sum over ranks, to which a backward inside no_sync "
                    f'adds; with average="{self.options.average}" call zero_grad() before it'
                )
            delattr(grad, _SETTLED)

    def ready(self, number: int) -> None:
        """A gradient is there."""
        if self.starts_early and number in self.arrived:
            self.fail(
                f"DataParallel: the gradient of {self.names[number]} came twice in one backward, as under reentrant "
                f"checkpoints: use checkpoint(..., use_reentrant=False), or DataParallel(..., overlap=False)"
            )
            return
        self.arrived[number] = None
        place = self.places.get(number)
        if place is not None and self.starts_early:
            self.buckets[place].missing -= 1
            # The last one waits for the end, as it tells on how many ranks backward has ended well.
            last = len(self.buckets) - 1
            while self.may_start and len(self._pending) < last and not self.buckets[len(self._pending)].missing:
                self._start()

    def fail(self, error: str | Exception) -> None:
        """Let the backward that is open end with an error on all ranks, which this rank's last sum tells them."""
        self._error = self._error or (RuntimeError(error) if isinstance(error, str) else error)
        self._mark = -float(self.team.size)

    def _start(self) -> None:
        """Start the sum of the next bucket."""
        place = len(self._pending)
        bucket = self.buckets[place]
        if self._weighed is None:
            self._weighed = self._weigh()
            if self._unweighted and self._weighed[1]:
                self._take_back()
        if place == 0:
            trained = [float(p.requires_grad) for p in self.parameters]
            changed = float(self.buffers.have_changed())
            if changed and not self.buffers.are_writable():
                self.fail("DataParallel: forward has put a sparse or expanded tensor into a buffer's place")
                changed = -float(self.team.size)  # so that no rank waits for this one to take part
            bucket.header = [float(self._takes_part), self._leads, changed, *trained]
        elif self._tells_order and place == len(self.buckets) - 1:
            came = {n: turn for turn, n in enumerate(self.arrived, 1)} if self.team.world.rank == self.team[0] else {}
            bucket.header = [float(came.get(n, 0)) for n in range(len(self.parameters))]
        fill = partial(bucket.pack, self._gradients(bucket), *self._weighed)
        flat, then = bucket.free(), partial(self._unpack, place)
        if self.options.comm_hook is None and self.options.waits:
            pending = self._sum(flat, partial(fill, self._mark), then)
        else:
            fill(self._mark)
            if self.options.comm_hook is not None:
                try:
                    self.options.comm_hook(bucket)
                except Exception as error:
                    self.fail(error)
            if self._error is not None:
                fill(self._mark)
            pending = self._sum(flat, then=then)
        self._pending.append(pending)
        if self.engine == "inline":
            self._wait(place)

    def _gradients(self, bucket: Bucket) -> list[torch.Tensor | None]:
        """This rank's, but for sparse ones, which are an error when backward ends."""
        found = [self.parameters[n].grad if self._takes_part else None for n in bucket.numbers]
        return [None if grad is None or grad.layout is not torch.strided else grad for grad in found]

    def _check_parameters(self) -> None:
        """Fail if hooks have changed parameters, such as those of an optimizer that steps, or a gradient is sparse."""
        for number, (parameter, version) in enumerate(zip(self.parameters, self._parameter_versions, strict=True)):
            grad = parameter.grad
            if parameter._version != version or (grad is None and number in self.arrived):
                self.fail(_CHANGED.format(self.names[number]))
            elif grad is not None and grad.layout is not torch.strided:
                self.fail(TypeError(f"DataParallel: the gradient of {self.names[number]} is sparse, and is not summed"))

    def _weigh(self) -> tuple[float, float]:
        """The factor of this rank's gradients in the sum, and their weight in the mean."""
        if not self._takes_part:
            return 0.0, 0.0
        if not self._divides or self.options.average == "ranks":
            return self._scale, 1.0
        weight = self.count if self.weight is None else as_weight(self.weight)
        return (weight if self.options.average == "samples" else 1.0) * self._scale, weight

    def _sum(
        self, flat: torch.Tensor, fill: Callable[[], None] | None = None, then: Callable[[], None] | None = None
    ) -> Pending:
        # A blocking call could not be given up.
        is_limited = self.engine == "inline" and self.options.timeout is not None
        return self.team.world.start_sum(self.team, flat, "auto" if is_limited else self.engine, self.lane, fill, then)

    def _wait(self, place: int) -> None:
        self._await(self._pending[place], f"bucket {place}", self.buckets[place])

    def _await(self, pending: Pending, what: str, bucket: Bucket) -> None:
        if not pending.wait(self.options.seconds):
            self.is_broken = True
            fail_at_exit(f"rank {self.team.world.rank} ends with an error: a sum was not completed by all ranks")
            names = [self.names[n] for n in bucket.numbers]
            some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise TimeoutError(
                f"rank {self.team.world.rank}: {what} ({some}) was not reduced after {self.options.seconds:g} s: "
                f"some rank did not take part"
            )

    def abandon(self, error: Exception | None = None) -> int:
        """Complete a backward that failed, as other ranks do; on how many of them it has ended well.

        With an error, all of them raise it, wherever this rank has been.
        """
        if not self.is_open:
            self.begin(None, takes_part=False)
        self._takes_part, self._mark = False, min(self._mark, 0.0)
        if error is not None:
            self.fail(error)
        self.start_rest()
        ended_well, self.is_open = self.confirm(), False
        return ended_well

    def leave(self) -> int:
        """Meet the other ranks before all set up anew; how many of them were in a backward instead, and ended it."""
        synchronisers(self.team.world).discard(self)
        if self.team.size == 1 or self.is_broken:
            return 0
        self.begin(None, takes_part=False)
        self._leads = -float(self.team.size)  # buffers may no longer fit those of others
        return self.abandon()

    def finish(self) -> bool:
        """Complete a backward, and put the sums into ``.grad``. Whether any rank took part."""
        any_takes_part = self.start_rest()
        for place in range(1, len(self.buckets) - 1):  # while the last sum is under way
            self._wait(place)
        if self.confirm() < self.team.size:
            raise RuntimeError("DataParallel: backward failed on another rank, whose gradients are lacking")
        for place in range(len(self.buckets)):
            self.put(self.complete(place))
        self.close()
        return any_takes_part

    def start_rest(self) -> bool:
        """Start all sums that have not, and do what other ranks must do too. Whether any rank took part."""
        if self._takes_part:
            self._check_parameters()
        while len(self._pending) < len(self.buckets):
            self._start()
        self._wait(0)
        self._total = self._results[0][1]
        active, leads, changed, *self._trained = self.buckets[0].header
        self.put(self._unplanned())
        for number in {*self._already_summed, *self._unweighted} - self.places.keys():  # no longer trained
            self.put([(number, None)])
        all_go_on = round(active) == self.team.size
        if changed > 0 and (all_go_on or (leads > 0 and self.options.sync_buffers == "root")):
            self.buffers.synchronise(self.team)  # else join makes all equal in the end
        return active > 0

    def confirm(self) -> int:
        """Wait until it is known on how many ranks backward has ended well; unless on all, its sums are of no use.

        Where a rank has told of an error, all raise it.
        """
        last = len(self.buckets) - 1
        self._wait(last)
        ended_well = round(self._results[last][2])
        if ended_well < self.team.size:
            self._give_up()
            if ended_well < 0:
                raise_together(self.team, self._error, "DataParallel")
        elif not math.isfinite(self._total):
            self._give_up()
            raise ValueError(BAD_WEIGHT)
        return ended_well

    def _give_up(self) -> None:
        for place in range(1, len(self.buckets) - 1):  # before they are filled anew
            self._wait(place)
        self.is_open, self.has_failed = False, True
        self.count, self.weight = 0.0, None

    def complete(self, place: int) -> Found:
        """The sums of a bucket, None for a parameter without gradient on any rank."""
        self._wait(place)
        return list(zip(self.buckets[place].numbers, self._results[place][0], strict=True))

    def _unpack(self, place: int) -> None:
        self._results[place] = self.buckets[place].unpack(self._divides, self._scale)

    def close(self) -> None:
        """The end of a backward."""
        self._results.clear()
        wanted = self._wanted[::-1]
        if self._tells_order:
            turns, self._tells_order = self.buckets[-1].header, False
            self._plan(sorted(wanted, key=lambda n: turns[n] or math.inf))
        elif sorted(self.places) != wanted[::-1]:
            self._plan(wanted)
        if self._divides and self._total:
            self._scale = 2.0 ** -round(math.log2(self._total))
        self.is_open = False
        if self._takes_part:
            self.count, self.weight = 0.0, None

    @property
    def _wanted(self) -> list[int]:
        """The parameters that some rank trains."""
        return [n for n, ranks in enumerate(self._trained) if ranks]

    def _unplanned(self) -> Found:
        """The sums of parameters that some rank trains since this backward."""
        found: Found = []
        for n in [n for n in self._wanted if n not in self.places]:
            bucket = Bucket([n], [self.parameters[n]])
            assert self._weighed is not None
            bucket.pack(self._gradients(bucket), *self._weighed, 1.0)
            self._await(self._sum(bucket.flat), "a bucket of its own", bucket)
            found.append((n, bucket.unpack(self._divides, self._scale)[0][0]))
        return found

    @torch.no_grad()
    def put(self, found: Found) -> None:
        """Put sums into ``.grad``, added to what was there before backward."""
        if not self._takes_part:
            return
        for number, value in found:
            parameter, kept = self.parameters[number], self._unweighted.get(number)
            grad = self.added_up(number, parameter.grad if value is None else value)
            parameter.grad = grad
            if grad is not None and grad is not kept and not self._keeps_sums:
                setattr(grad, _SETTLED, self.team)

    def added_up(self, number: int, value: torch.Tensor | None) -> torch.Tensor | None:
        """The sum of a gradient, added to what was in ``.grad`` before backward."""
        if self._already_summed or self._unweighted:
            before, kept = self._already_summed.pop(number, None), self._unweighted.pop(number, None)
            if before is None and (value is None or not self._total):
                before = kept
            if before is not None:
                return before if value is None else before.add_(value)
        parameter = self.parameters[number]
        if value is None or (value.dtype is parameter.dtype and parameter.is_contiguous()):
            return value
        return torch.empty_like(parameter).copy_(value)
