"""Data parallelism for models of Gaussians, with the interface of pytagi.nn.ddp, over MPI."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items
from typing import Any

import torch

from distdl_lite.agreement import check_alike, is_unanimous, raise_together, refused_together, vote_of
from distdl_lite.buckets import broadcast
from distdl_lite.model.replicas import checksum
from distdl_lite.partition import Partition, partition_of
from distdl_lite.tagi.layers import Layer
from distdl_lite.tagi.sequential import Sequential


class DDPConfig:
    """Which ranks train a model together, and on which devices; all of these ranks make it together.

    Parameters
    ----------
    device_ids : sequence of int, optional
        GPUs, one for each rank of a host in turn; one that stands there twice serves two ranks. Without effect on a machine
        that has none.
    backend : str
        "mpi".
    rank, world_size : int, optional
        Those of the communicator, which are the default.
    P : Partition or communicator, optional
        The ranks. None is the ambient world.

    Raises
    ------
    ValueError, TypeError
        On all ranks, with the same text, if one of them was given another backend, rank or size, or a GPU that it lacks.

    Examples
    --------
    >>> from distdl_lite import tagi
    >>> from distdl_lite.testing import spmd
    >>> spmd(2, lambda world: (tagi.DDPConfig().rank, tagi.DDPConfig().world_size))
    [(0, 2), (1, 2)]
    """

    def __init__(
        self,
        device_ids: Items[int] | None = None,
        backend: str = "mpi",
        rank: int | None = None,
        world_size: int | None = None,
        P: Any = None,
    ) -> None:
        self.P = partition_of(P)
        if not self.P.active:
            raise ValueError("DDPConfig: this rank is not in P")
        self.backend = backend
        self.rank = self.P.rank if rank is None else rank
        self.world_size = self.P.size if world_size is None else world_size
        with refused_together(self.P, "DDPConfig"):
            if not isinstance(device_ids, Iterable | None):
                raise TypeError(f"DDPConfig: device_ids must be a list of integers, such as [0, 1], not {device_ids!r}")
            self.device_ids = None if device_ids is None else list(device_ids)
            self._check()
        self.P.world_transport.local["DDPConfig"] = self.P

    def _check(self) -> None:
        P, gpus = self.P, torch.cuda.device_count()
        me = f"DDPConfig: rank {P.rank} of {P.size} was given"
        if self.backend != "mpi":
            raise ValueError(f'{me} backend={self.backend!r}; write backend="mpi", which serves CPUs and GPUs')
        if self.rank != P.rank:
            raise ValueError(f"{me} rank={self.rank!r}; leave it out, or write {P.rank} there")
        if self.world_size != P.size:
            raise ValueError(f"{me} world_size={self.world_size!r}; leave it out, or start {self.world_size!r} ranks")
        for device in self.device_ids or ():
            if not isinstance(device, int) or device < 0 or 0 < gpus <= device:
                raise ValueError(
                    f"{me} device_ids={self.device_ids}; {device!r} is none of the {gpus} GPUs that it sees"
                )

    @property
    def device(self) -> torch.device | None:
        """Where this rank's model is put; None: it stays where it is."""
        if not self.device_ids or not torch.cuda.device_count():
            return None
        return torch.device("cuda", self.device_ids[self.rank % len(self.device_ids)])

    def __repr__(self) -> str:
        return (
            f"DDPConfig(device_ids={self.device_ids}, backend={self.backend!r}, rank={self.rank}, "
            f"world_size={self.world_size})"
        )


class DDPSequential(torch.nn.Module):
    """A `Sequential` of which each rank has a copy, and each gives its rows of the batch; all ranks take the same steps.

    A delta is a sum over the batch. With ``average=False`` those of all ranks are added up: P ranks with B / P rows each take the
    step of one process with B rows, the faithful Bayesian update, also where some rank has no rows. With ``average=True``,
    the default as in pytagi, the sum is divided by P: an observation counts as 1/P of one.

    `backward` sums all deltas in one message, in place in the tensor that they are views of. Each rank's number of rows
    travels with them, so that the cap of the next step follows one number: all ranks' rows together, or the largest number of
    a rank with ``average=True``. The numbers of rows may change from call to call. Replicas stay equal bit by bit.

    Parameters
    ----------
    model : Sequential
        All ranks build the same; the values are those of the first rank, which are sent in one message.
    config : DDPConfig, optional
    average : bool

    Raises
    ------
    ValueError
        On all ranks if they hold different models, or are given different ``average``.
    TypeError
        On all ranks if one's `model` or `config` is something else, the latter on those of the last `DDPConfig` that this one
        has made. One that makes the default, None, where others have a smaller team's, waits.

    Examples
    --------
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     net = dl.tagi.Sequential(dl.tagi.Linear(1, 4), dl.tagi.ReLU(), dl.tagi.Linear(4, 1))
    ...     net = dl.tagi.DDPSequential(net, average=False)
    ...     x = torch.ones(3 - world.rank, 1)  # 3 rows, 2 rows
    ...     net(x)
    ...     dl.tagi.OutputUpdater().update(net.output_z_buffer, 2 * x, 0.1, net.input_delta_z_buffer)
    ...     net.backward()
    ...     net.step()
    ...     return net(torch.ones(1, 1))[0].item()
    >>> first, second = dl.testing.spmd(2, body)
    >>> first == second
    True
    """

    def __init__(self, model: Sequential, config: DDPConfig | None = None, average: bool = True) -> None:
        super().__init__()
        self.config = DDPConfig() if config is None else config
        self.model, self.average = model, average
        with refused_together(_told_of(self.config), "DDPSequential"):
            if not isinstance(self.config, DDPConfig):
                raise TypeError(f"config must be a DDPConfig, not {self.config!r}")
            if not isinstance(model, Sequential):
                raise TypeError(f"model must be a tagi.Sequential, not a {type(model).__name__}")
            if not isinstance(average, bool):
                raise TypeError(f"average must be a bool, not {average!r}")
            if self.config.device is not None:
                model.to(self.config.device)
        P, arrays = self.config.P, model.state_dict()
        _check_alike(P, {"average": average, **_described(model)})
        if P.size > 1:
            broadcast(P.team, list(arrays.values()), P.ranks[0])
        self._outputs: tuple[Any, Any] | None = None
        self._is_fresh = False
        self._steps, self._is_loaded = 0, False  # the latter since the last backward

    @property
    def output_z_buffer(self) -> Any:
        """The model's."""
        return self.model.output_z_buffer

    @property
    def input_delta_z_buffer(self) -> Any:
        """The model's."""
        return self.model.input_delta_z_buffer

    def forward(self, mu_x: Any, var_x: Any = None) -> tuple[Any, Any]:
        """The model's, of this rank's rows."""
        self._outputs = None
        self._outputs = self.model.forward(mu_x, var_x)
        return self._outputs

    def backward(self) -> None:
        """The model's, and the sum, or mean, of all ranks' deltas, in one message; all ranks call it.

        Deltas that no `step` has used are dropped. After `load_state_dict` it is `check_replicas` too, once.

        Raises
        ------
        RuntimeError
            On all ranks, with the same text, if on one of them backward failed, for example for want of a forward and an
            update; other kinds of errors are raised as they are. Also if they have taken different numbers of steps, hold
            models of different sizes or dtypes, or one has loaded what others have not.
        """
        P, vote = self.config.P, 0
        told = {"number of steps": str(self._steps)}
        error: Exception | None = None
        self._is_fresh = False
        try:
            self.model.find_deltas(1 / P.size if self.average else 1.0)
            deltas = self.model.flat_deltas(P.size)
            told["deltas"] = f"{deltas.numel() - P.size} of {deltas.dtype} on {deltas.device.type}"
            vote = vote_of(repr((told, self._is_loaded)))
        except Exception as found:
            error = found
        is_agreed = is_unanimous(P.team, vote) and error is None
        if not is_agreed:
            raise_together(P.team, error, f"DDPSequential: rank {P.rank}")
            _check_alike(P, told, RuntimeError)
        if self._is_loaded or not is_agreed:
            self.check_replicas()
            self._is_loaded = False
        rows = self._summed(deltas)
        self.model.batch_size = max(rows) if self.average else sum(rows)
        self._is_fresh = True

    def _summed(self, deltas: torch.Tensor) -> list[int]:
        """Sum the deltas over the ranks in place; returns the ranks' numbers of rows, which travel in the elements behind them.

        A number is cut to what the dtype holds exactly: 2^24 in float32, and still 256 in bfloat16, from which on it is the same
        to the cap.
        """
        P = self.config.P
        rows = deltas[-P.size :].zero_()
        rows[P.rank] = min(self.model.batch_size, int(2 / torch.finfo(deltas.dtype).eps))
        if P.size > 1:
            P.world_transport.all_reduce(P.team, deltas)
        return list(map(int, rows.tolist()))

    def step(self) -> None:
        """Update the weights by the deltas, alike on all ranks.

        Raises
        ------
        RuntimeError
            If there was no backward since the last step.
        """
        if not self._is_fresh:
            raise RuntimeError("DDPSequential: step needs a backward before it; the deltas of the last have been used")
        self._is_fresh = False
        self.model.step()
        self._steps += 1

    def barrier(self) -> None:
        """Wait for all ranks, which call it together."""
        self.config.P.world_transport.agree(self.config.P.team, 0)

    def get_outputs(self) -> tuple[Any, Any]:
        """What the last forward returned.

        Raises
        ------
        RuntimeError
            Before a forward.
        """
        if self._outputs is None:
            raise RuntimeError("DDPSequential: get_outputs needs a forward before it")
        return self._outputs

    def output_to_host(self) -> None:
        """Let `get_outputs` return them in host memory."""
        mean, variance = self.get_outputs()
        if isinstance(mean, torch.Tensor):
            self._outputs = mean.cpu(), variance.cpu()

    def get_device_with_index(self) -> str:
        """The model's device, such as "cuda:0"."""
        return str(self.model.device) if torch.cuda.device_count() else "cpu"

    def parameters(self, recurse: bool = True) -> Any:
        """The model's."""
        return self.model.parameters()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's, with its own names."""
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's; all ranks load the same, which the next `backward` checks."""
        self._is_loaded = True
        return self.model.load_state_dict(*args, **kwargs)

    def check_replicas(self) -> None:
        """Raise RuntimeError, on all ranks, unless they hold the same means and variances, bit by bit; all ranks call it."""
        checksums = {name: f"of checksum {checksum(t):08x}" for name, t in self.model.state_dict().items()}
        _check_alike(self.config.P, checksums, RuntimeError)


def _described(model: Sequential) -> dict[str, str]:
    """The layers, and the shapes and kinds of their means and variances, in words."""
    layers = {
        f"layer {name}": repr(layer) if isinstance(layer, Layer) else type(layer).__name__
        for name, layer in model.named_modules()
        if name
    }
    arrays = {
        name: f"{tuple(t.shape)} of {str(t.dtype).removeprefix('torch.')} on {t.device.type}"
        for name, t in model.state_dict().items()
    }
    return {**layers, **arrays}


def _check_alike(P: Partition, told: Mapping[str, Any], kind: type[Exception] = ValueError) -> None:
    """Raise on all ranks of P unless all tell the same; what differs first is named."""
    everyones = P.allgather_data(told)
    assert everyones is not None
    for name in dict.fromkeys(name for one in everyones for name in one):
        values = {rank: one.get(name, "missing") for rank, one in enumerate(everyones)}
        try:
            check_alike(f"DDPSequential's {name}", values)
        except ValueError as found:
            raise kind(str(found)) from None


def _told_of(config: Any) -> Partition:
    """Whom an error concerns: the ranks of a config, or of what stands in its place, else of the last config, else all."""
    world = Partition.world()
    try:
        return partition_of(getattr(config, "P", config) or "nobody")
    except TypeError:
        return world.world_transport.local.get("DDPConfig", world)
