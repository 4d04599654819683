"""Traces: what ranks note, the file, and where the time went."""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import Any

import pytest
import torch
from ranks import on_ranks, shared_folder

import distdl_lite as dl
import distdl_lite.nn as dnn
from distdl_lite.testing import count, spmd
from distdl_lite.timeline.chrome import events
from distdl_lite.timeline.notes import Notes, Span, Wait
from distdl_lite.timeline.times import Late, times
from distdl_lite.timeline.trace import _shifted
from distdl_lite.transport.sidechannel import clock_ahead


def noted() -> list[Notes]:
    """Rank 0 sends to rank 1 at 5 s, which has computed since 1 s and waits from 3 s until 6 s; then both meet."""
    meeting = "agreement", "ranks 0, 1", 1
    first = Notes(0, 0.0, 10.0, posted={(0, 1, 1): 5.0, meeting: 7.0}, sizes={(0, 1, 1): 80})
    first.spans += [Span("a", "a", "forward", 0.0, 4.0, 4.0), Span("halo", "a", "pack", 4.0, 5.0)]
    first.spans += [Span("agreement", "b", "wait", 7.0, 8.5)]
    first.waits += [Wait(2, 7.0, (meeting,))]
    second = Notes(1, 0.0, 10.0, posted={meeting: 8.0})
    second.spans += [Span("a", "a", "forward", 1.0, 3.0, 2.0), Span("halo", "a", "wait", 3.0, 6.0)]
    second.spans += [Span("agreement", "b", "wait", 8.0, 8.5)]
    second.waits += [Wait(1, 3.0, ((0, 1, 1),)), Wait(2, 8.0, (meeting,))]
    return [first, second]


def test_who_came_late_and_what_it_cost() -> None:
    found = times(noted())
    a, b = found.layers
    assert (a.layer, a.computing, a.packing, a.moving, a.waiting) == ("a", 3.0, 0.5, 0.5, 1.0)
    assert (b.layer, b.computing, b.packing, b.moving, b.waiting) == ("b", 0.0, 0.0, 0.5, 0.5)
    assert a.balance == 0.75
    assert (a.late, b.late) == ({0: 2.0}, {1: 1.0})
    assert found.late == (Late(0, 1, 2.0, {"a": 2.0}), Late(1, 1, 1.0, {"b": 1.0}))
    assert (found.ranks, found.seconds, found.hidden) == (2, 10.0, 0.0)
    text = str(found)
    assert "rank 0 came late 1 times, which cost the others 2 s, 2 s of that in a" in text
    assert json.loads(json.dumps(found.to_dict()))["layers"][0]["moving"] == 0.5
    # A message that was there long before it was waited for.
    early = noted()
    early[0].posted[0, 1, 1] = 1.0
    early[1].waits[0] = Wait(1, 0.5, ((0, 1, 1),))
    assert times(early).hidden == pytest.approx(2.0 / (2.0 + 3.0 + 0.5 + 0.5))
    # Another clock changes nothing once it is known how far it is ahead.
    ahead = _shifted(early[1], -100.0)
    assert times([early[0], _shifted(ahead, 100.0)]) == times(early)
    assert times([Notes(0)]).layers == ()


def test_events_of_the_file() -> None:
    shown = list(events(noted(), 0.0))
    slices = [(e["pid"], e["tid"], e["name"], e["ts"], e["dur"]) for e in shown if e["ph"] == "X"]
    assert (1, 1, "halo", 3e6, 3e6) in slices
    assert (0, 0, "a", 0.0, 4e6) in slices
    arrows = {(e["ph"], e["id"]): (e["pid"], e["ts"], e["args"]["bytes"]) for e in shown if e["ph"] in "sf"}
    assert arrows["s", 2], arrows["f", 2] == ((0, 5e6, 80), (1, 6e6, 80))
    assert len(arrows) == 6  # of the message, and to each rank in the agreement from the other
    assert {e["args"]["name"] for e in shown if e["name"] == "process_name"} == {"rank 0", "rank 1"}


class Pause(torch.nn.Module):
    """Lets a rank come late to what follows."""

    def __init__(self, is_late: bool) -> None:
        super().__init__()
        self.is_late = is_late

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.05 * self.is_late)
        return x


@on_ranks(4, mpi=True)
def test_a_rank_that_comes_late(world: dl.Partition) -> None:
    """It is named, with its cost and where; the file holds all ranks by one clock."""
    P = world.grid((1, 1, 2, 2))
    first, second = (dnn.DistributedConv2d(P, 1, 1, 3, padding=1) for _ in range(2))
    net = torch.nn.Sequential(first, Pause(world.rank == 2), second)
    x = torch.ones(1, 1, 8, 8)
    net(x).sum().backward()
    with shared_folder(world) as folder:
        began = time.perf_counter()
        profile = world.world_transport.name != "threads of one process"
        with dl.trace(folder / "trace.json", world, profile=profile) as t:
            for _ in range(4):
                net(x).sum().backward()
        lasted = time.perf_counter() - began
        found = t.times
        worst = next(late for late in found.late if late.rank == 2)
        assert 0.1 < worst.layers["2"] < 3 * lasted
        assert worst is found.late[0] or not profile, str(found)  # threads wait for their turns as well
        assert [row.layer for row in found.layers if row.layer.isdigit()] == ["0", "1", "2"]
        assert world.allgather_data(str(found)) == [str(found)] * 4
        if world.rank == 0:
            shown = json.loads((folder / "trace.json").read_text())["traceEvents"]
            assert {event["pid"] for event in shown} == set(range(4))
            ends = Counter((event["ph"], event["id"]) for event in shown if event["ph"] in "sf")
            assert set(ends.values()) == {1}
            # Of each exchange of halos 2 messages from each rank (3 with the corner), forward and backward, 2 layers, 4 times.
            messages = [event for event in shown if event["ph"] == "s" and event["args"]["bytes"]]
            assert len(messages) == 4 * 3 * 3 * 4, len(messages)
            assert all(event["ts"] >= 0 for event in shown if "ts" in event)
            assert max(event["ts"] for event in shown if "ts" in event) < 1e6 * lasted
            convolutions = [event for event in shown if event["name"] == "aten::convolution"]
            assert {event["pid"] for event in convolutions} == (set(range(4)) if profile else set())
            inside = [
                event for event in shown if event["name"] == "0" and event["cat"] == "forward" and event["pid"] == 0
            ]
            for event in [one for one in convolutions if one["pid"] == 0][:1]:
                assert inside[0]["ts"] - 300 < event["ts"] < inside[0]["ts"] + inside[0]["dur"] + 300
        world.allgather_data(0)
    addresses = world.world_transport.local.get("addresses")
    if addresses:  # as if the others were on other hosts
        known = world.world_transport.local["addresses"] = [
            a._replace(host="elsewhere", network="127.0.0.1") for a in addresses
        ]
        try:
            assert all(abs(clock_ahead(world.world_transport, rank)) < 0.01 for rank in range(len(known)))
            world.allgather_data(0)
        finally:
            world.world_transport.local["addresses"] = addresses


def test_traces_of_programs_and_sums() -> None:
    """Compiled networks are known by the model's paths; each message counted has been noted."""

    def body(world: dl.Partition) -> Any:
        model = torch.nn.Sequential(
            torch.nn.Conv2d(1, 2, 3, padding=1), torch.nn.BatchNorm2d(2), torch.nn.Conv2d(2, 1, 3, padding=1)
        )
        net = dl.distribute(model, world.grid((1, 1, 2, 1)))
        x = torch.ones(1, 1, 4, 6)
        net(x).sum().backward()
        with dl.trace(P=world) as t, count() as c:
            net(x).sum().backward()
        with dl.trace(P=world) as both:
            net(x).sum().backward()
            dl.nn.DistributedMSELoss(world.grid((1, 1, 2, 1)))(x, x)
            torch.nn.Sequential(torch.nn.ReLU())(x)
        names = {span.name for span in both._recorder.notes.spans if span.kind == "forward"}
        assert names == {"0", "1", "2", "distribute(Sequential)", "DistributedMSELoss", "Sequential", "Sequential.0"}, (
            names
        )
        sent = [key for key in t._recorder.notes.posted if len(key) == 3 and isinstance(key[0], int)]
        return [row.layer for row in t.times.layers], len(sent), c.messages - c.by_label["sums"].messages, c.collectives

    for layers, sent, messages, _ in spmd(2, body):
        assert {"0", "1", "2", "gradients"} <= set(layers)
        assert sent == messages


def test_traces_that_cannot_be() -> None:
    def body(world: dl.Partition) -> None:
        with dl.trace(P=world), pytest.raises(RuntimeError, match="a trace is on already"), dl.trace(P=world):
            pass
        with (
            pytest.raises(RuntimeError, match="trace: FileNotFoundError: there is no folder /no/such/folder"),
            dl.trace("/no/such/folder/trace.json", world),
        ):
            pass
        with pytest.raises(RuntimeError, match="needs ranks that are processes"), dl.trace(P=world, profile=True):
            pass
        with pytest.raises(ArithmeticError), dl.trace(P=world):
            raise ArithmeticError
        some = world.create_partition_inclusive([1])
        with dl.trace(P=some) as t:
            torch.nn.Linear(2, 2)(torch.ones(2))
        assert hasattr(t, "times") == (world.rank == 1)
        assert not world.world_transport.local["tallies"]
        assert "trace" not in world.world_transport.local

    spmd(3, body)
    assert not torch.nn.modules.module._global_forward_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks
