"""Which GPU a process takes and how its tensors travel, with fakes in the places of GPUs."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.distributed_c10d as c10d

from distdl_lite.grid import Grid
from distdl_lite.layout import balanced_blocks
from distdl_lite.plan import plan
from distdl_lite.transport import devices, torch_dist, wire
from distdl_lite.transport.channel import PlannedChannel
from distdl_lite.transport.team import Team

GPU = torch.device("meta")  # in the place of one: no kernel runs


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was asked of streams, in order."""
    made: list[str] = []
    event = SimpleNamespace(synchronize=lambda: made.append("wait for event"))
    stream = SimpleNamespace(
        synchronize=lambda: made.append("wait for stream"), record_event=lambda: (made.append("event"), event)[1]
    )
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: stream)
    return made


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [({}, 0), ({"LOCAL_RANK": "3"}, 3), ({"OMPI_COMM_WORLD_LOCAL_RANK": "2"}, 2), ({"MPI_LOCALRANKID": "1"}, 1)],
)
def test_local_ranks(variables: dict[str, str], wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in devices._LOCAL_RANKS:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert devices.local_rank() == wanted


@pytest.mark.parametrize(("there", "chosen", "wanted"), [(2, False, [1]), (2, True, []), (0, False, [])])
def test_a_process_takes_the_gpu_of_its_number(
    there: int, chosen: bool, wanted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the program has used one."""
    taken: list[int] = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there > 0)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: chosen)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    devices.take_gpu()
    assert taken == wanted


@pytest.mark.parametrize(
    ("gpus", "wanted"), [(["a 0", "a 1", "b 0"], True), (["a 0", "a 0"], False), (["a 0", ""], False), ([""], False)]
)
def test_nccl_wants_a_gpu_for_each_process(gpus: list[str], wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    store = torch.distributed.HashStore()
    for rank, name in enumerate(gpus):
        store.set(f"distdl_lite gpu {rank}", name)
    for rank, name in enumerate(gpus):
        monkeypatch.setattr(torch_dist, "gpu", lambda name=name: name)
        assert torch_dist.gpus_suffice(store, rank, len(gpus)) is wanted
    if wanted:
        monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
        with pytest.warns(UserWarning, match="no NCCL: tensors of GPUs go through host memory"):
            assert not torch_dist.gpus_suffice(store, rank, len(gpus))


def test_gpus_have_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.gpu() == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(uuid=f"GPU-{number}"))
    assert devices.gpu().endswith(" GPU-3")


def test_the_way_of_device_memory_over_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISTDL_LITE_MPI_CUDA", raising=False)
    assert devices.mpi_takes(devices.HOST)
    assert not devices.mpi_takes(GPU)
    monkeypatch.setenv("DISTDL_LITE_MPI_CUDA", "direct")
    assert devices.mpi_takes(GPU)
    monkeypatch.setenv("DISTDL_LITE_MPI_CUDA", "perhaps")
    with pytest.raises(ValueError, match="DISTDL_LITE_MPI_CUDA='perhaps' is neither staged nor direct"):
        devices.mpi_takes(GPU)


def test_streams_are_waited_for_where_there_are_any(calls: list[str]) -> None:
    devices.settle(torch.ones(2))
    assert devices.event_of(torch.ones(2)) is None
    assert not calls
    devices.settle(torch.empty(2, device=GPU))
    wait = devices.event_of(torch.empty(2, device=GPU))
    assert wait is not None
    wait()
    assert calls == ["wait for stream", "event", "wait for event"]


class Direct:
    """A transport of one rank's side alone, which takes the memory of devices, and notes when it gets it."""

    def __init__(self, calls: list[str]) -> None:
        self.calls, self.rank = calls, 0

    def team(self, ranks: Sequence[int]) -> Team:
        return Team(self, tuple(ranks))  # type: ignore[arg-type]

    def home(self, device: torch.device) -> torch.device:
        return device

    def on_wire(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(wire.wire_dtype(tensor.dtype)).contiguous()

    def has(self, *arguments: Any) -> bool:
        return True

    def group(self, team: Team) -> Any:
        return None

    def requests(self, sends: Sequence[wire.Message], receives: Sequence[wire.Message]) -> Any:
        assert all(m.buffer.device == GPU and m.buffer is m._flat for m in (*sends, *receives))
        return SimpleNamespace(
            start=lambda source: self.calls.append("start"), receive=lambda: self.calls.append("end")
        )


def test_messages_of_a_device_lie_on_it_where_they_can_travel(calls: list[str]) -> None:
    line = Grid((2,), (0, 1))
    X, Y = balanced_blocks(line, (6,)), balanced_blocks(Grid((2,), (1, 0)), (6,))
    channel = PlannedChannel(Direct(calls), plan(X, Y, 0), torch.float32, GPU)  # type: ignore[arg-type]
    y = channel.finish(channel.start(torch.empty(3, device=GPU)))
    assert y.device == GPU
    assert calls == ["start", "end"]


def test_mpi_gets_memory_after_the_stream_has_written_it(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that still writes while a message leaves would be a wrong number."""
    group = pytest.importorskip("distdl_lite.transport.mpi.group", exc_type=(ImportError, RuntimeError))
    request = SimpleNamespace(Start=lambda: calls.append("start"), Free=lambda: None)
    comm = SimpleNamespace(
        Recv_init=lambda *a: request,
        Send_init=lambda *a: request,
        Allreduce=lambda *a: calls.append("sum"),
        rank=0,
        size=2,
    )
    monkeypatch.setattr(group, "as_bytes", lambda tensor: [])
    monkeypatch.setattr(group, "as_numbers", lambda tensor: [])
    x = torch.empty(3, device=GPU)
    group.MPIGroup(comm).all_reduce(x, torch.empty_like(x))
    message = SimpleNamespace(buffer=x, peer=1, pack=lambda source: calls.append("pack"))
    messages = group.PersistentMessages(comm, [message], [message])
    messages.start(None)
    messages._receiving, messages._sending = [], []
    assert calls == ["wait for stream", "sum", "wait for stream", "start", "pack", "wait for stream", "start"]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_groups_of_one_rank(device: str) -> None:
    """Every collective of the backends, which torch may name otherwise; the results are what was sent."""
    group = torch_dist.TorchGroup(torch.distributed.HashStore(), 0, 1, device == "cuda")
    for dtype in (torch.float32, torch.float64, torch.int64, torch.complex64):
        x = torch.arange(6, device=device).to(dtype)
        for call in (
            lambda y, x=x: group.all_reduce(x, y),
            lambda y, x=x: group.all_reduce(x, y, "max"),
            lambda y, x=x: group.reduce(x, y, 0),
            lambda y, x=x: group.all_gather(x, y, [6]),
            lambda y, x=x: group.reduce_scatter(x, y, [6]),
            lambda y, x=x: group.all_to_all(x.view(1, 6), y.view(1, 6)),
        ):
            y = torch.zeros_like(x)
            call(y)
            assert torch.equal(x, y)
        group.broadcast(x, 0)
        posted = group.post_all_reduce(x)
        posted.Wait()
        assert posted.Test()
        assert torch.equal(x, torch.arange(6, device=device).to(dtype))


def test_torch_makes_groups_by_name_from_a_store() -> None:
    """The calls for it are not public."""
    arguments = list(inspect.signature(c10d._new_process_group_helper).parameters)
    assert arguments[:6] == ["group_size", "group_rank", "global_ranks_in_group", "backend", "store", "group_name"]
    assert "timeout" in arguments
    assert isinstance(c10d._world.pg_group_ranks, dict)
    assert callable(c10d._get_default_store)
