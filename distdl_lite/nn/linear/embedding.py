"""The embedding, its table cut along the vocabulary or along the features."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from distdl_lite import layout as lay
from distdl_lite.agreement import raise_together
from distdl_lite.autograd import reduce_from_team
from distdl_lite.grid import balanced
from distdl_lite.layout import Dim, Layout, ranges_of
from distdl_lite.nn.blocks import connected_zeros
from distdl_lite.nn.draws import normal
from distdl_lite.nn.inputs import agreed_inputs, zero_volume_tensor
from distdl_lite.nn.linear.parallel_linear import line_of
from distdl_lite.nn.module import Call
from distdl_lite.nn.options import booleans, integers
from distdl_lite.nn.parameter import Layer
from distdl_lite.partition import Partition


class DistributedEmbedding(Layer):
    """torch's Embedding with the table cut over the last axis of `P`, along its rows or its columns.

    The ranks that differ along the last axis alone form a line. Input of indices ``(*lead)``, int32 or int64, cut along the
    leading axes of `P` in blocks of any sizes; the ranks of a line pass the same block. Output ``(*lead, embedding_dim)``, the
    leading dims as in the input. With ``cut="feature"`` the line cuts the features in balanced blocks; with
    ``cut="vocabulary"`` each rank is shown all features, and passes back the whole gradient, as of the other layers' tensors
    that are whole along a line. Ranks outside `P` pass and get zero-volume tensors.

    Parameters
    ----------
    P : Partition
        ``[*P_lead, p]``; axes of length one for leading dims may be left out in front.
    num_embeddings, embedding_dim, padding_idx, scale_grad_by_freq, device, dtype
        As in torch.nn.Embedding. Frequencies are global, which takes one all-reduce of ``num_embeddings`` numbers over the
        leading axes in forward, if any of them is cut.
    max_norm, norm_type, sparse
        Must be None and False: `max_norm` would change rows on those ranks alone that look them up, and sparse gradients
        cannot be summed over replicas.
    cut : {"vocabulary", "feature"}
        What the line cuts: the table's rows or its columns, in balanced blocks.

    Raises
    ------
    ValueError
        In the constructor for an option that is refused or that torch refuses; at set-up if the blocks do not fit. On all
        ranks alike.
    TypeError
        At set-up, on all ranks, if the indices are neither int32 nor int64.
    IndexError
        In forward, on all ranks, if an index of any of them is not in ``range(num_embeddings)``.

    Notes
    -----
    Forward agrees on the indices by 8 bytes and, with the vocabulary cut, adds up the line's rows in one all-reduce; backward
    communicates nothing but the sum of the table's gradient over the leading axes. The table starts from the serial layer's
    values for the same seed.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     table = dl.nn.DistributedEmbedding(world.grid((2,)), 7, 4)
    ...     return tuple(table.weight.shape), tuple(table(torch.tensor([6, 0, 3])).shape)
    >>> dl.testing.spmd(2, body)
    [((4, 4), (3, 4)), ((3, 4), (3, 4))]
    """

    def __init__(
        self,
        P: Partition,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        *,
        cut: str = "vocabulary",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(P)
        if cut not in ("vocabulary", "feature"):
            raise self._refuse(f"cut={cut!r} is neither 'vocabulary' nor 'feature'")
        if max_norm is not None:
            raise self._refuse(
                f"max_norm={max_norm} is refused: the ranks would rescale rows that the others do not look up"
            )
        booleans(self, sparse=sparse, scale_grad_by_freq=scale_grad_by_freq)
        if sparse:
            raise self._refuse("sparse=True is refused: the gradient of a table on several ranks is dense")
        integers(self, 0, num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        integers(self, padding_idx=0 if padding_idx is None else padding_idx)
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise self._refuse(f"padding_idx={padding_idx} is not within num_embeddings={num_embeddings}")
        self.P, self.cut, self.scale_grad_by_freq = P, cut, scale_grad_by_freq
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        sizes, at = (num_embeddings, embedding_dim), ("vocabulary", "feature").index(cut)
        dims = [Dim(((0, n),)) for n in sizes]
        dims[at] = Dim(ranges_of(balanced(sizes[at], P.shape[-1])), (P.dim - 1,))
        layout = Layout(P.grid_of_ranks, tuple(dims))
        self.place("weight", layout, normal(num_embeddings * embedding_dim), dtype, device)
        box = layout.box(P.world_transport.rank)
        self._rows = (0, 0) if box is None else box[0]
        if self.padding_idx is not None and self._rows[0] <= self.padding_idx < self._rows[1]:
            with torch.no_grad():
                self.weight[self.padding_idx - self._rows[0]] = 0

    def _distdl_module_setup(self, input: tuple[Any, ...]) -> Call:
        grid, transport = self.P.grid_of_ranks, self._distdl_transport
        inputs = agreed_inputs(self, self.P)
        if inputs.dtype not in (torch.int32, torch.int64):
            raise self._refuse(f"the indices have dtype {inputs.dtype}, int32 or int64 is needed", TypeError)
        shapes = {rank: (*shape, 1) for rank, shape in inputs.shapes.items()}
        dims = len(next(iter(shapes.values())))
        if dims < grid.dim:
            raise self._refuse(f"indices of {dims - 1} dims do not fit P of shape {self.P.shape}")
        lay.cuts_from_shapes(grid.padded(dims), shapes)
        if self._distdl_team.size == 1 and inputs.device == "cpu":  # elsewhere torch does not say which index is wrong
            return type(self)._alone
        line = transport.team(line_of(grid, transport.rank))
        replicas = transport.team(self._distdl_places["weight"].layout.replicas(transport.rank))

        def run(layer: DistributedEmbedding, index: torch.Tensor) -> torch.Tensor:
            layer._check_range(index)
            y = layer._looked_up(index)
            if layer.scale_grad_by_freq:
                counts = torch.bincount(index.reshape(-1), minlength=layer.num_embeddings)
                counts = transport.all_reduce(replicas, counts)[index].unsqueeze(-1)
                if y.requires_grad:
                    y.register_hook(lambda gradient: gradient / counts)
            return y if layer.cut == "feature" or line.size == 1 else reduce_from_team(y, line)

        return run

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The rows of the table."""
        return self._distdl_run(input)

    def _distdl_outside(self, input: torch.Tensor) -> torch.Tensor:
        return zero_volume_tensor(dtype=self.weight.dtype, device=self.weight.device)

    def _alone(self, index: torch.Tensor) -> torch.Tensor:
        """torch's own function, which looks at the indices itself."""
        try:
            return F.embedding(index, self.held("weight"), self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)
        except IndexError:
            self._check_range(index)
            raise

    def _check_range(self, index: torch.Tensor) -> None:
        wrong = index[(index < 0) | (index >= self.num_embeddings)]
        if self._distdl_transport.agree(self._distdl_team, wrong.numel()):
            error = None
            if wrong.numel():
                error = self._refuse(f"index {wrong[0].item()} is not in range({self.num_embeddings})", IndexError)
            raise_together(self._distdl_team, error)

    def _looked_up(self, index: torch.Tensor) -> torch.Tensor:
        """This rank's part of the output; zero where another rank holds the row."""
        weight = self.use("weight")
        assert weight is not None
        return rows_of(
            weight, index, self._rows, self.num_embeddings, -1 if self.padding_idx is None else self.padding_idx
        )

    def extra_repr(self) -> str:
        given = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        given += ", scale_grad_by_freq=True" if self.scale_grad_by_freq else ""
        return f"{self.num_embeddings}, {self.embedding_dim}{given}, cut={self.cut!r}, P={self.P.shape}"


def rows_of(
    table: torch.Tensor, index: torch.Tensor, rows: tuple[int, int], total: int, padding_idx: int = -1
) -> torch.Tensor:
    """The rows of a table of so many that the indices name, zero where another rank holds them; `table` has some of its rows."""
    start, stop = rows
    if not table.numel():
        return connected_zeros((*index.shape, table.shape[1]), table)
    padding = padding_idx - start if start <= padding_idx < stop else None
    if stop - start == total:
        return F.embedding(index, table, padding)
    is_elsewhere = (index < start) | (index >= stop)
    found = F.embedding((index - start).masked_fill_(is_elsewhere, 0), table, padding)
    return found.masked_fill_(is_elsewhere.unsqueeze(-1), 0)
