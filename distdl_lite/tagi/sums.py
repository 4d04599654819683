"""The sums of a model's deltas over ranks, in one message each.

Beside the deltas travels, in a slot for each rank, the number of rows that they are about. It is cut to what the dtype holds
exactly: 2^24 in float32, and still 256 in bfloat16, from which on it is the same to the cap.
"""

from __future__ import annotations

import torch

from distdl_lite.tagi.sequential import Sequential
from distdl_lite.transport import Transport
from distdl_lite.transport.shared import shared_sums


class OwnDeltas:
    """The deltas of a `Sequential`, which are made views of the tensor that is summed; all ranks of the team make it together.

    Where ranks of one host train a model of float32 or float64, that tensor lies in memory that they share.
    """

    def __init__(self, model: Sequential, transport: Transport, team: tuple[int, ...]) -> None:
        self._model, self._transport, self._team = model, transport, team
        self._allot()

    def _allot(self) -> None:
        like, ranks = self._model.flat_deltas(), len(self._team)
        size = sum(b.numel() for n, b in self._model.named_buffers() if "delta_" in n) + ranks
        self._shared = shared_sums(self._transport, self._team, size, like.dtype, like.device)
        self._flat = like.new_zeros(size) if self._shared is None else self._shared.mine
        self._model.place_deltas(self._flat)
        self._slots, self._most = self._flat[-ranks:], _largest_exact(like.dtype)
        self._mine = torch.eye(ranks, dtype=like.dtype, device=like.device)[self._team.index(self._transport.rank)]
        self._told = {"deltas": f"{size - ranks} of {like.dtype} on {like.device.type}"}

    def find(self, factor: float) -> dict[str, str]:
        """This rank's deltas times a factor; returns in words what ranks of like models have in common."""
        self._model.find_deltas(factor)  # which are linear in those of the output, the few that are multiplied
        self.rows, own = self._model.batch_size, self._flat
        if self._model.flat is not own or not self._model.is_flat():
            flat = self._model.flat_deltas()
            if (flat.dtype, flat.device, flat.numel() + len(self._team)) == (own.dtype, own.device, own.numel()):
                self._model.place_deltas(own)  # a slice, or a container around the model, had taken its layers' deltas
        self._is_new = self._model.flat is not own  # after a cast
        if self._is_new:
            return {"deltas": f"{flat.numel()} of {flat.dtype} on {flat.device.type}, moved"}
        self._tell()
        return self._told

    def sum(self) -> list[int]:
        """Sum them over the team, all of which have found theirs; returns the ranks' numbers of rows."""
        if self._is_new:
            self._allot()
            self._tell()
            self._transport.agree(self._team, 0)
        if self._shared is None:
            self._transport.all_reduce(self._team, self._flat)
        else:
            self._shared.add_up()
        return list(map(int, self._slots.tolist()))

    def _tell(self) -> None:
        torch.mul(self._mine, min(self.rows, self._most), out=self._slots)


def _largest_exact(dtype: torch.dtype) -> int:
    """Up to which integers are exact."""
    return int(2 / torch.finfo(dtype).eps)
