"""torch's own collectives on the same ranks, to compare with."""

from __future__ import annotations

import os

from distdl_lite.partition import Partition


def start(P: Partition) -> str:
    """Make gloo torch.distributed's default group, once; the reason on all ranks where it cannot be had."""
    import torch.distributed as dist

    if not dist.is_available() or dist.is_initialized():
        return "" if dist.is_available() else "torch was built without torch.distributed"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # Not a FileStore: the last rank to leave would wait, holding the GIL, for a file that the first has removed.
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False) if P.rank == 0 else None
    port, reason = P.broadcast_data(store and store.port), ""
    try:
        store = store or dist.TCPStore("localhost", port)
        dist.init_process_group("gloo", store=store, rank=P.rank, world_size=P.size)
    except (RuntimeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
    return next((found for found in P.allgather_data(reason) or () if found), "")
