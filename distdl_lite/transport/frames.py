"""Where this process is: the frames of its threads, the layer that they are in, and the line of the program."""

from __future__ import annotations

import linecache
import os
import socket
import sys
import sysconfig
import threading
import traceback
from collections.abc import Iterator, Sequence
from inspect import CO_OPTIMIZED
from itertools import takewhile
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import Any

import torch

from distdl_lite.plan import Plan
from distdl_lite.transport.calls import CALLS, Call
from distdl_lite.transport.hang import Told, team_text

OWN_THREADS = "distdl_lite"  # how the names of the library's threads begin: they wait for something to do
PROGRAM = "<distdl_lite program>"  # the file that compiled programs name
_LIBRARY = str(Path(__file__).parents[1]) + os.sep
_TRANSPORT = str(Path(__file__).parent) + os.sep
_TORCH = str(Path(torch.__file__).parent) + os.sep
_INSTALLED = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib", "platlib")})
_TELL = "sidechannel.py", "reports.py", "waiting.py"  # which wait for no call of another rank
_LONGEST_TEXT = 60
_MESSAGES = "messages of {}"


def waiting() -> FrameType | None:
    """The frame in which a thread of this process is in a transport's call, the main thread first; None if none is."""
    by_thread, main = sys._current_frames(), threading.main_thread()
    threads = sorted(threading.enumerate(), key=lambda thread: thread is not main)
    frames = [by_thread.get(thread.ident or 0) for thread in threads if not thread.name.startswith(OWN_THREADS)]
    callers = [_caller(frame) for frame in frames]
    return next((f for f in callers if f is not None and _is_transport(f.f_code.co_filename)), None)


def _is_transport(name: str) -> bool:
    return name.startswith(_TRANSPORT) and not name.endswith(_TELL)


def _caller(frame: FrameType | None) -> FrameType | None:
    """The frame that calls what of the standard library or of torch waits."""
    while frame is not None and frame.f_code.co_filename.startswith((socket.__file__, threading.__file__, _TORCH)):
        frame = frame.f_back
    return frame


def outward(frame: FrameType | None) -> Iterator[FrameType]:
    """A frame and those that called it."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def frames_of_library(frame: FrameType | None) -> Iterator[FrameType]:
    """The frames from one of the library's outwards up to the program's, whose locals would live on if they were read."""
    for inner in outward(frame):
        name = inner.f_code.co_filename
        if not (name.startswith((_LIBRARY, _TORCH)) or name == PROGRAM):
            return
        yield inner


def _variables(frame: FrameType, waits: bool) -> dict[str, Any]:
    """The variables of a frame, none of which lives longer for having been read where the frame `waits`."""
    found = frame.f_locals
    variables = dict(found)
    # A snapshot, which the frame keeps. A debugger that looks at the frame would write it back.
    if waits and frame.f_code.co_flags & CO_OPTIMIZED and isinstance(found, dict):
        found.clear()
    return variables


def _is_library(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(_LIBRARY)


def _is_program(frame: FrameType) -> bool:
    name = frame.f_code.co_filename
    return not (name.startswith((_LIBRARY, _TORCH, "<frozen", *_INSTALLED)) or name == PROGRAM)


def place_of(frames: Sequence[FrameType]) -> tuple[str, str]:
    """The innermost line of the program among frames, from the innermost outwards, and what stands there."""
    if not frames:
        return "nowhere", ""
    inner = next(filter(_is_program, frames), frames[0])
    name, line = inner.f_code.co_filename, inner.f_lineno
    text = linecache.getline(name, line, inner.f_globals).strip()
    here = os.getcwd() + os.sep
    return f"{name.removeprefix(here)}:{line}", text[:_LONGEST_TEXT]


def layer_of(frame: FrameType | None, waits: bool) -> str:
    """The module that a frame is in, by its path from the outermost one around it, whose name is the program's variable.

    Of a compiled program, and in backward, an operator knows the path or the kind of layer. Where there is neither, it is the
    function of the library that the program has called.
    """
    frames = list(outward(frame))
    variables = [_variables(inner, waits) for inner in frames]
    owners = [names.get("self") for names in variables]
    modules = [(at, owner) for at, owner in enumerate(owners) if issubclass(type(owner), torch.nn.Module)]
    label = next((str(owner.label) for owner in owners if type(owner).__module__ == "distdl_lite.operator"), "")
    is_backward = any(names.get("ctx") is not None for names in variables)
    if not modules:
        called = [one.f_code for one in takewhile(lambda one: not _is_program(one), frames) if _is_library(one)]
        name = getattr(called[-1], "co_qualname", called[-1].co_name) if called else ""
        return f"backward of {label}" if label and is_backward else label or ("" if name.startswith("_") else name)
    layer, (at, root) = modules[0][1], modules[-1]
    path = next((name for name, module in root.named_modules() if module is layer), "")
    program = [(names, inner) for inner, names in zip(frames[at:], variables[at:], strict=True) if _is_program(inner)]
    around = [some for names, inner in program for some in (names, inner.f_globals)]
    named = next((name for names in around for name, value in names.items() if value is root and name != "self"), "")
    own = "" if label in ("", type(layer).__name__) else label
    return ".".join(filter(None, [named or type(root).__name__, path, own]))


def _call_of(frame: FrameType, known: Sequence[Call]) -> Call | None:
    """The call, among the last ones, that waits in a frame: an operator's, or the last one that began."""
    owners = [_variables(inner, True).get("self") for inner in frames_of_library(frame)]
    plan = next((owner.plan for owner in owners if type(owner).__module__ == "distdl_lite.operator"), None)
    return next((call for call in known if call.whom is plan), next(iter(known), None))


def here(world: Any) -> Told:
    """What this process tells of itself to the ranks of a world."""
    frame = waiting()
    shown = frame or sys._current_frames().get(threading.main_thread().ident or 0)
    known = [Call(*entry) for entry in reversed(CALLS)]
    call = _call_of(frame, known) if frame else next(iter(known), None)
    place, text = place_of(list(outward(shown)))
    layer = layer_of(shown, frame is not None)
    is_here = call is not None and frame is not None and call.world is world
    awaited, team, meeting = _awaited(call) if call and is_here else ({}, (), "")
    named = layer or (call.what if call and frame else "")
    counts = {team_text(t.ranks): t.calls for t in world.local["teams"].values() if t.calls}
    return Told(
        rank=world.rank,
        waits=frame is not None,
        call=f"{named}, in another world" if frame and call and not is_here else named,
        place=place,
        text=text,
        awaited=awaited,
        team=team,
        meeting=meeting,
        counts=counts | {_MESSAGES.format(what): n for what, n in world.local.get("moved", {}).items()},
        seconds=perf_counter() - call.began if call else 0.0,
        calls=tuple(_said(one) for one in known),
        stack="".join(traceback.format_stack(shown)),
    )


def _awaited(call: Call) -> tuple[dict[int, int], tuple[int, ...], str]:
    """The bytes that are to come from each rank, if these are messages; else the ranks of the call; and how it is counted."""
    if not isinstance(call.whom, Plan):
        return {}, tuple(call.whom), team_text(call.whom)
    awaited = dict[int, int]()
    for edge in (edge for leg in call.whom.legs if not leg.team for edge in leg.receives):
        if edge.peer != call.whom.rank:
            awaited[edge.peer] = awaited.get(edge.peer, 0) + edge.size * call.itemsize
    return awaited, next((leg.team for leg in call.whom.legs if leg.team), ()), _MESSAGES.format(call.what)


def _said(call: Call) -> str:
    """A call as a report lists it."""
    ago = f"{perf_counter() - call.began:.1f} s ago"
    if isinstance(call.whom, Plan):
        return f"{call.what} {ago}"
    return f"{call.what} {call.number or ''} of {team_text(call.whom)} {ago}".replace("  ", " ")
