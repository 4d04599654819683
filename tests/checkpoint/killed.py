"""Jobs of three ranks that save without a pause are killed at random moments; each goes on from what the last has left.

    python tests/checkpoint/killed.py FOLDER 200

Prints how many complete checkpoints were found, after which it would raise at the first that is torn, old or lost.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

import torch

import distdl_lite as dl
from distdl_lite.checkpoint.files import faults

RANKS = 3


def job(folder: Path, done: int, seed: int) -> None:
    """Save again and again; the number of each step that is complete goes into a pipe."""
    world = dl.Partition.world()
    draw = random.Random(seed)
    net = torch.nn.Sequential(
        dl.nn.DistributedLinear(world.grid((1, 1)), world.grid((1, RANKS)), world.grid((RANKS, 1)), 300, 700),
        torch.nn.Linear(30, 20),
    )
    step = 0
    latest = dl.latest_checkpoint(folder)
    if latest is not None:
        step = dl.load(latest, model=net).extra
        assert all((tensor == step).all() for tensor in net.state_dict().values()), f"rank {world.rank}: a mixed load"
    while True:
        saving = None
        step += 1
        with torch.no_grad():
            for tensor in net.state_dict().values():
                tensor.fill_(step)
        saving = dl.save(folder / f"step_{step}", model=net, extra=step, keep=3, wait=draw.random() < 0.5)
        if draw.random() < 0.5:
            saving.wait()
        if world.rank == 0 and saving.path.is_dir():
            os.write(done, f"{step}\n".encode())


def start(folder: Path, done: int, seed: int) -> list[int]:
    """The ranks of a job, which are copies of this process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(RANKS):
        child = os.fork()
        if child:
            ranks.append(child)
            continue
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="killed",
        )  # fmt: skip
        try:
            job(folder, done, seed)
        finally:
            os._exit(1)
    return ranks


def main(folder: Path, kills: int) -> None:
    torch.set_num_threads(1)
    draw, last = random.Random(int(os.environ.get("SEED", "0"))), 0
    for number in range(kills):
        reads, writes = os.pipe()
        ranks = start(folder, writes, number)
        os.close(writes)
        told = os.read(reads, 10**6)  # the first is complete
        time.sleep(draw.uniform(0, 0.3))
        victims = ranks if draw.random() < 0.5 else [draw.choice(ranks)]
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        time.sleep(draw.uniform(0, 0.1))
        for rank in ranks:
            os.kill(rank, signal.SIGKILL)
            os.waitpid(rank, 0)
        while more := os.read(reads, 10**6):
            told += more
        os.close(reads)
        last = max(last, *map(int, told.split()))
        latest = dl.latest_checkpoint(folder)
        assert latest is not None
        made = dl.read_checkpoint(latest)
        assert made.objects["extra"] >= last, (made, last)
        assert not faults(latest), faults(latest)
        assert all((made[name] == made.objects["extra"]).all() for name in made)
        assert sum(not path.name.startswith(".") for path in folder.iterdir()) <= 4
    print(f"{kills} jobs were killed, {last} checkpoints were complete")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
