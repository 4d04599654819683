"""Batch normalisation of a batch whose samples are cut over ranks, for models that every rank holds whole."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from distdl_lite.layout import Layout, Shape
from distdl_lite.nn.norm.running import DistributedBatchNorm
from distdl_lite.partition import Partition, partition_of


class SyncBatchNorm(DistributedBatchNorm):
    """Batch normalisation over the samples of all ranks: torch.nn.SyncBatchNorm on any device, for any local batches.

    Input and output ``(N, C, *space)`` with any number of spatial dims; ranks may have different numbers of samples, also
    none, and samples of different sizes unless `P` cuts space. It equals torch's BatchNorm1d/2d/3d on the whole batch in
    every option, gradient and running statistic, as each rank's values count alike.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, device, dtype, bias
        As in torch.nn.BatchNorm1d/2d/3d.
    P : Partition or communicator, optional
        The ranks that share the batch. A grid is that of ``(N, C, *space)``: its first axis cuts the samples, further
        axes cut channels and space, and axes of length one are added for further dims of the input. None is the ambient
        world.

    Raises
    ------
    ValueError, TypeError
        As `DistributedBatchNorm`, of which this is one whose grid follows from the input.

    Notes
    -----
    The gradients of weight and bias that a rank finds when ``backward()`` returns are sums over all ranks, as are all
    gradients of distributed layers: a container that adds up or averages gradients leaves them alone. They are those of the
    sum of the ranks' losses, so a mean over the batch is the sum of local losses divided by the *global* number of samples.

    Collectives as of `DistributedBatchNorm`: in training one all-reduce forward and one backward, with running statistics
    none forward.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     x = torch.tensor([[1.0], [2.0], [6.0]])
    ...     norm = dl.SyncBatchNorm(1)
    ...     norm(x[:1] if world.rank else x[1:])
    ...     return round(norm.running_mean.item(), 4)  # a tenth of 3
    >>> dl.testing.spmd(2, body)
    [0.3, 0.3]
    """

    _distdl_is_cut = False  # but for the batch, in blocks of any shape

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        P: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        P = partition_of(P)
        P_x = _with_dims(P, 2)
        super().__init__(P_x, num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        self.P = P

    def _distdl_module_setup(self, input: tuple[Any, ...]) -> Any:
        P_x = _with_dims(self.P, input[0].dim()) if isinstance(input[0], torch.Tensor) else self.P
        self.__dict__["P_x"] = P_x  # an option that follows the input
        return super()._distdl_module_setup(input)

    def _distdl_options(self) -> str:
        return super()._distdl_options().rpartition(", P_x=")[0]

    def blocks(self, shapes: Mapping[int, Shape]) -> Layout:
        if self.P_x.dim < 2:
            raise ValueError(f"expected at least 2D input (got {self.P_x.dim}D input)")
        if math.prod(self.P_x.shape[2:]) == 1 and len({shape[2:] for shape in shapes.values()}) > 1:
            # Only the number of values counts: each point of a sample may be a sample.
            shapes = {rank: (n * math.prod(s), c, *[1] * len(s)) for rank, (n, c, *s) in shapes.items()}
        return super().blocks(shapes)

    @classmethod
    def convert(cls, module: torch.nn.Module, P: Any = None) -> torch.nn.Module:
        """Put a SyncBatchNorm in the place of every BatchNorm1d/2d/3d in a module, as torch's ``convert_sync_batchnorm``.

        Parameters
        ----------
        module : torch.nn.Module
            A model that every rank of `P` holds whole; they call this together.
        P : Partition or communicator, optional
            As of the class.

        Returns
        -------
        torch.nn.Module
            The module itself, or its SyncBatchNorm if it is a BatchNorm. Weights and buffers are the same objects as
            before, so an optimizer that was made goes on; their values become those of the first rank of `P`. Training flag,
            dtypes, devices and ``requires_grad`` stay. Hooks on a BatchNorm are not carried over. On a rank outside `P` the
            new layers hold nothing.

        Raises
        ------
        ValueError
            If `P` cuts channels, or a lazy BatchNorm has not seen data.
        """
        P = partition_of(P)
        if P.dim > 1 and P.shape[1] > 1:
            raise ValueError(f"SyncBatchNorm.convert keeps whole weights, which P of shape {P.shape} cuts by channels")
        made: dict[torch.nn.Module, torch.nn.Module] = {}
        for parent in list(module.modules()):
            for name, child in parent._modules.items():
                if isinstance(child, _BatchNorm):
                    if child not in made:
                        made[child] = cls._of(child, P)
                    parent._modules[name] = made[child]
        return cls._of(module, P) if isinstance(module, _BatchNorm) else module

    @classmethod
    def _of(cls, norm: _BatchNorm, P: Partition) -> SyncBatchNorm:
        if isinstance(norm, LazyModuleMixin):
            raise ValueError(f"SyncBatchNorm.convert: {norm} has not seen data")
        held = {**norm._parameters, **norm._buffers}
        dtype = next((t.dtype for t in held.values() if t is not None and t.is_floating_point()), None)
        device = next((t.device for t in held.values() if t is not None), None)
        options = norm.eps, norm.momentum, norm.affine, norm.track_running_stats
        layer = cls(norm.num_features, *options, P, device, dtype, bias=norm.bias is not None)
        layer.train(norm.training)
        for name, tensor in held.items():
            if tensor is None:
                setattr(layer, name, None)
            elif P.active:
                with torch.no_grad():
                    P.world_transport.broadcast(P.team, tensor, P.ranks[0])
                setattr(layer, name, tensor)
        return layer


def _with_dims(P: Partition, dims: int) -> Partition:
    """The partition as a grid with axes of length one behind its own."""
    shape = (*P.shape, *[1] * (dims - P.dim))
    return P.create_cartesian_topology_partition(shape, (*P.periods, *[False] * (len(shape) - P.dim)))
