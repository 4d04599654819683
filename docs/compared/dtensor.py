"""torch's DTensor: ``python docs/compared/dtensor.py [words of a case's name]``."""

from __future__ import annotations

import torch
from cut_cases import Case, compare
from harness import main, mesh_of
from torch.distributed.tensor import DTensor, distribute_module, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode


def run(case: Case) -> str:
    (mesh, placements), gathers = mesh_of(case), list[str]()

    def prepare(model: torch.nn.Module) -> None:
        distribute_module(model, mesh)
        forward = model.forward

        def counted(*inputs: DTensor) -> DTensor:
            with CommDebugMode() as counts:
                y = forward(*inputs)
            gathers.extend(name for name in map(str, counts.get_comm_counts()) if "all_gather" in name)
            return y

        model.forward = counted

    def whole(t: torch.Tensor) -> torch.Tensor:
        return t.full_tensor() if isinstance(t, DTensor) else t

    verdict = compare(case, lambda x: distribute_tensor(x, mesh, placements(x)), whole, prepare)
    return verdict + (", gathers" if gathers else "")


if __name__ == "__main__":
    print(f"torch {torch.__version__}")
    main(run)
