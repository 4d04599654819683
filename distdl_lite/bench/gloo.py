"""torch's own collectives on the same ranks, to compare with."""

from __future__ import annotations

import os
import tempfile

from distdl_lite.partition import Partition


def start(P: Partition) -> str:
    """Make gloo torch.distributed's default group, once; the reason on all ranks where it cannot be had."""
    folder = P.broadcast_data(tempfile.mkdtemp() if P.rank == 0 else None)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    reason = ""
    try:
        import torch.distributed as dist

        if not dist.is_initialized():
            store = dist.FileStore(os.path.join(folder, "store"), P.size)
            dist.init_process_group("gloo", store=store, rank=P.rank, world_size=P.size)
    except (ImportError, RuntimeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
    return next((found for found in P.allgather_data(reason) or [] if found), "")
