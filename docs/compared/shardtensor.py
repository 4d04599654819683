"""PhysicsNeMo's ShardTensor on CPUs: ``python docs/compared/shardtensor.py [words of a case's name]``."""

from __future__ import annotations

from importlib.metadata import version

import torch
from cut_cases import Case, compare
from harness import main, mesh_of
from physicsnemo.domain_parallel import ShardTensor, register_custom_ops
from torch.distributed.tensor import distribute_module, distribute_tensor

register_custom_ops()  # the package does so itself, but only where there is a GPU


def run(case: Case) -> str:
    mesh, placements = mesh_of(case)

    def cut(x: torch.Tensor) -> ShardTensor:
        block = distribute_tensor(x, mesh, placements(x)).to_local()
        # By the default, "infer", ranks exchange the shapes on GPUs.
        return ShardTensor.from_local(block, mesh, placements(x), "chunk", x.shape).detach()

    def whole(t: torch.Tensor) -> torch.Tensor:
        return t.full_tensor() if hasattr(t, "full_tensor") else t

    return compare(case, cut, whole, lambda model: distribute_module(model, mesh))


if __name__ == "__main__":
    print(f"nvidia-physicsnemo {version('nvidia-physicsnemo')}, torch {torch.__version__}")
    main(run)
