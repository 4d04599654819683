"""Data parallelism for models of Gaussians, with the interface of pytagi.nn.ddp, over MPI."""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any

import torch

from distdl_lite.parallel.copies import broadcast
from distdl_lite.partition import Partition, partition_of
from distdl_lite.tagi.protocol import arrays_of, deltas_of, described, missing_members
from distdl_lite.tagi.sequential import Sequential
from distdl_lite.tagi.sums import OthersDeltas, OwnDeltas


class DDPConfig:
    """Which ranks train a model together, and on which devices; all of these ranks make it together.

    Parameters
    ----------
    device_ids : sequence of int, optional
        GPUs, one for each rank of a host in turn. Without effect on a machine that has none.
    backend : str
        "mpi".
    rank, world_size : int, optional
        Those of the communicator, which are the default.
    P : Partition or mpi4py.MPI.Comm, optional
        The ranks. None is the ambient world.

    Raises
    ------
    ValueError
        On all ranks, with the same text, if one of them was given another backend, rank or size, or a GPU that it lacks.
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
        self.device_ids = None if device_ids is None else list(device_ids)
        self.backend = backend
        self.rank = self.P.rank if rank is None else rank
        self.world_size = self.P.size if world_size is None else world_size
        agree(self.P, self._error())

    def _error(self) -> str | None:
        """What is wrong on this rank."""
        P, gpus = self.P, torch.cuda.device_count()
        me = f"DDPConfig: rank {P.rank} of {P.size} was given"
        if self.backend != "mpi":
            return f'{me} backend={self.backend!r}; write backend="mpi", which serves CPUs and GPUs'
        if self.rank != P.rank:
            return f"{me} rank={self.rank!r}; leave it out, or write {P.rank} there"
        if self.world_size != P.size:
            return f"{me} world_size={self.world_size!r}; leave it out, or start {self.world_size!r} ranks"
        for device in self.device_ids or ():
            if not isinstance(device, int) or device < 0 or 0 < gpus <= device:
                return f"{me} device_ids={self.device_ids}; {device!r} is none of the {gpus} GPUs that it sees"
        return None

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
        All ranks build the same; the values are those of the first rank, which are sent in one message. Or another
        library's model: see `distdl_lite.tagi.protocol`.
    config : DDPConfig, optional
    average : bool

    Raises
    ------
    ValueError
        On all ranks if they hold different models, or are given different ``average``.
    TypeError
        On all ranks if one's model lacks what is asked of it.

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

    def __init__(self, model: Any, config: DDPConfig | None = None, average: bool = True) -> None:
        super().__init__()
        self.config = DDPConfig() if config is None else config
        if not isinstance(self.config, DDPConfig):
            raise TypeError(f"DDPSequential: config must be a DDPConfig, not {config!r}")
        self.model, self.average = model, average
        self._outputs: tuple[Any, Any] | None = None
        self._is_fresh = False
        arrays, error = self._arrays()
        agree(self.config.P, error, {"average": repr(average), **described(arrays)}, TypeError)
        if self.config.device is not None and isinstance(model, torch.nn.Module):
            model.to(self.config.device)
            arrays, _ = self._arrays()
        if self.config.world_size > 1:
            broadcast(self.config.P.world_transport, self._team, list(arrays.values()))
        self._deltas: OwnDeltas | OthersDeltas | None = None
        self._prepare()

    def _arrays(self) -> tuple[dict[str, torch.Tensor], str | None]:
        """The model's means and variances, or why they cannot be had."""
        lacks = missing_members(self.model)
        if lacks:
            return {}, f"DDPSequential: {type(self.model).__name__} has no {', '.join(lacks)}"
        if not isinstance(self.average, bool):
            return {}, f"DDPSequential: average must be a bool, not {self.average!r}"
        try:
            deltas_of(self.model)
            return dict(arrays_of(self.model)), None
        except TypeError as error:
            return {}, str(error)

    @property
    def _team(self) -> tuple[int, ...]:
        return tuple(sorted(self.config.P.ranks))

    def _prepare(self) -> OwnDeltas | OthersDeltas:
        """What sums the deltas; in a copy all ranks make it anew, together."""
        if self._deltas is None:
            kind = OwnDeltas if isinstance(self.model, Sequential) else OthersDeltas
            self._deltas = kind(self.model, self.config.P.world_transport, self._team)
        return self._deltas

    # ---- pytagi's interface ------------------------------------------------------------------------------------------

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
        if isinstance(self._deltas, OthersDeltas):
            self._deltas.rows = len(mu_x)
        return self._outputs

    def backward(self) -> None:
        """The model's, and the sum, or mean, of all ranks' deltas, in one message; all ranks call it.

        Raises
        ------
        RuntimeError
            On all ranks if on one of them backward failed, for example for want of a forward and an update.
        """
        deltas, ranks, rows = self._prepare(), self.config.world_size, -1
        error: Exception | None = None
        self._is_fresh = False
        try:
            rows = deltas.find(1 / ranks if self.average else 1.0)
        except Exception as found:
            error = found
        sizes = deltas.sum(rows) if ranks > 1 else [rows]
        if error is not None:
            raise error
        failed = [rank for rank, size in zip(self._team, sizes, strict=True) if size < 0]
        if failed:
            raise RuntimeError(f"DDPSequential: backward failed on ranks {failed}, whose deltas are lacking")
        if hasattr(self.model, "batch_size"):
            self.model.batch_size = max(sizes) if self.average else sum(sizes)
        self._is_fresh = True

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

    def train(self, mode: bool = True) -> DDPSequential:
        """Training mode."""
        super().train(mode)
        if not isinstance(self.model, torch.nn.Module):
            getattr(self.model, "train" if mode else "eval", lambda: None)()
        return self

    def barrier(self) -> None:
        """Wait for all ranks, which call it together."""
        self.config.P.world_transport.agree(self._team, 0)

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
        return str(getattr(self.model, "device", "cpu")) if torch.cuda.device_count() else "cpu"

    def __getstate__(self) -> dict[str, Any]:
        """Without what is shared with other ranks."""
        return {**self.__dict__, "_deltas": None}

    # ---- the model's own ---------------------------------------------------------------------------------------------

    def parameters(self, recurse: bool = True) -> Any:
        """The model's."""
        return self.model.parameters()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's, with its own names."""
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's; all ranks load the same."""
        return self.model.load_state_dict(*args, **kwargs)


def agree(
    P: Partition, error: str | None, alike: dict[str, str] | None = None, kind: type[Exception] = ValueError
) -> None:
    """Raise on all ranks of P what is wrong on the first of them that has an error, or where they differ."""
    told = P.allgather_data((error, alike or {}))
    assert told is not None
    for text, _ in told:
        if text is not None:
            raise kind(text)
    first = told[0][1]
    for rank, (_, other) in enumerate(told):
        for name in [*first, *other]:
            if first.get(name) != other.get(name):
                raise ValueError(
                    f"DDPSequential: the ranks hold different models: rank {rank} has {name} {other.get(name, 'not')}, "
                    f"rank 0 {first.get(name, 'not')}"
                )
