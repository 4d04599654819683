"""The options of `DataParallel` that concern sums."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from distdl_lite.parallel.replicas.bucket import Bucket

BAD_WEIGHT = "DataParallel: the loss_weight of some rank is negative or not finite"


@dataclass(frozen=True)
class Options:
    """What a synchroniser must know; `DataParallel` says what each means."""

    average: str = "samples"
    sync_buffers: str = "root"
    engine: str = "auto"
    overlap: bool = True
    bucket_bytes: int = 4 << 20
    comm_hook: Callable[[Bucket], None] | None = None
    timeout: float | None = None
    waits: bool = True  # for the sums, when backward ends: until then the gradients stay as they are

    @property
    def seconds(self) -> float:
        """The time to wait for other ranks."""
        return 1800.0 if self.timeout is None else self.timeout


def as_weight(value: Any) -> float:
    """A rank's weight in the mean; where it is none, what makes the sum of all ranks' tell them so."""
    weight = float(value)
    return weight if 0 <= weight < math.inf else math.nan
