"""Rides: the layers inside a module share its one agreement."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from distdl_lite.transport import Team

Place = tuple[Any, int]  # a layer, and how often it was called before in this forward


class Ride:
    """The agreement of a module whose forward runs.

    Attributes
    ----------
    team : Team
        The ranks that have agreed.
    keys : dict from place to int
        What the layers inside have agreed on in an earlier forward of the same structure.
    """

    def __init__(self, team: Team, keys: dict[Place, int]) -> None:
        self.team, self.keys = team, keys
        self._calls: dict[Any, int] = {}

    def place(self, layer: Any) -> Place:
        """Count this call of a layer, and return where the forward has come to."""
        number = self._calls.get(layer, 0)
        self._calls[layer] = number + 1
        return layer, number


@contextmanager
def riding(team: Team, keys: dict[Place, int]) -> Iterator[None]:
    """Let the layers that are called inside ride on an agreement of their ranks."""
    local = team.world.local
    outer = local.get("ride")
    local["ride"] = Ride(team, keys)
    try:
        yield
    finally:
        local["ride"] = outer


def ride_of(team: Team) -> Ride | None:
    """The innermost agreement around this code, if all ranks of the team have taken part in it."""
    ride: Ride | None = team.world.local.get("ride")
    return ride if ride is not None and team.is_inside(ride.team) else None
