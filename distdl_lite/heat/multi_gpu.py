"""Heat's container for DASO."""

from __future__ import annotations

from typing import Any

import torch

from distdl_lite.agreement import refused_together
from distdl_lite.buckets import broadcast, unwritable
from distdl_lite.heat.daso import DASO
from distdl_lite.partition import partition_of


class DataParallelMultiGPU(torch.nn.Module):
    """A model whose gradients are averaged within each node, and whose parameters `DASO` averages across nodes.

    Heat's call, on any device. The model stays where it is, and no weight is drawn anew: the first rank's weights and
    buffers are copied to all. In `DASO`'s phases in which a node averages after every batch, `DASO.step` puts the mean of the
    node's gradients into ``.grad``, so that its ranks take the same step; else each rank steps alone between averages.

    Parameters
    ----------
    module : torch.nn.Module
        The same on all ranks, which make this together.
    optimizer : DASO
        Over the module's parameters.
    comm : Partition or communicator, optional
        If given, the one that `optimizer` was made with.

    Raises
    ------
    TypeError, ValueError
        If an argument of some rank is none of the above, or the modules differ in names, shapes or dtypes, on all ranks.

    Notes
    -----
    Gradients are local until `DASO.step`, also for clipping. A GradScaler is given to `DASO.add_scaler`. A parameter that
    no rank of the node has a gradient of keeps None.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     model = torch.nn.Linear(3, 1, bias=False)
    ...     optimizer = dl.DASO(torch.optim.SGD(model.parameters(), lr=1.0), total_epochs=9, steps_per_epoch=1)
    ...     net = dl.DataParallelMultiGPU(model, optimizer)
    ...     net(torch.full((2, 3), 1.0 + world.rank)).mean().backward()
    ...     optimizer.step()
    ...     return model.weight.grad.tolist()
    >>> dl.testing.spmd(2, body)
    [[[1.5, 1.5, 1.5]], [[1.5, 1.5, 1.5]]]
    """

    def __init__(self, module: torch.nn.Module, optimizer: DASO, comm: Any = None) -> None:
        super().__init__()
        P = optimizer._P if isinstance(optimizer, DASO) else partition_of(comm)
        with refused_together(P, type(self).__name__):
            if not isinstance(module, torch.nn.Module):
                raise TypeError(f"module must be a torch.nn.Module, not {module!r}")
            if not isinstance(optimizer, DASO):
                raise TypeError(f"optimizer must be a DASO, not {optimizer!r}")
            if reason := unwritable([*module.named_parameters(), *module.named_buffers()]):
                raise ValueError(reason)
            if comm is not None and partition_of(comm).team is not P.team:
                ranks = list(partition_of(comm).ranks)
                raise ValueError(f"comm has the ranks {ranks}, the optimizer {list(optimizer._P.ranks)}")
        team = optimizer.levels.team
        tensors = [*module.named_parameters(), *module.named_buffers()]
        told = team.world.gather_objects(team, [(name, tuple(t.shape), t.dtype) for name, t in tensors])
        for rank, other in zip(team, told, strict=True):
            if other != told[0]:
                differ = sorted({name for name, *_ in set(other) ^ set(told[0])})
                raise ValueError(f"DataParallelMultiGPU: the modules of ranks {team[0]} and {rank} differ in {differ}")
        broadcast(team, [tensor for _, tensor in tensors])
        self.module = module
        self.optimizer = optimizer
        optimizer.set_model(module)
        optimizer._means_gradients = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)
