"""The seven primitives and scatter and gather, against plain indexing of the whole tensor."""

from __future__ import annotations

import re
from typing import Any

import numpy
import pytest
import torch
from blocks import NOTHING, grown
from cases import integers
from ranks import on_ranks
from torch.autograd import forward_ad
from twins import assert_refused

import distdl_lite as dl
import distdl_lite.nn as dnn
from distdl_lite.grid import indices, unravel
from distdl_lite.nn.movement import Movement
from distdl_lite.partition import Partition
from distdl_lite.testing import adjoint_test, spmd


def of_rank(P: Partition, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of its own for each rank of a partition."""
    return integers(shape, seed=P.rank) if P.active else NOTHING.clone()


def check_adjoint(layer: Movement, x: torch.Tensor, P: Partition) -> None:
    assert adjoint_test(layer, x, P=P) < 1e-14
    assert adjoint_test(layer, x * (1 + 2j), P=P) < 1e-14


# ---- what each does --------------------------------------------------------------------------------------------------


def source_of(index: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Where NumPy's broadcasting of `shape` finds the entry at `index`."""
    return tuple(0 if n == 1 else i for i, n in zip(index[len(index) - len(shape) :], shape, strict=True))


@on_ranks(4)
def test_broadcast_and_sum_reduce(world: Partition) -> None:
    for small, large, ranks in (
        ((1,), (4,), [0]),
        ((1,), (2, 2), [2]),
        ((2, 1), (2, 2), [3, 0]),
        ((1, 2), (2, 2), [1, 2]),
        ((2,), (2, 2), [0, 1]),
        ((2, 2), (2, 2), [3, 1, 0, 2]),
        ((1, 1), (1, 3), [3]),
    ):
        P_x, P_y = world.grid(small, ranks), world.grid(large)
        x = of_rank(P_x, (3, 2))
        y = dnn.Broadcast(P_x, P_y)(x)
        if P_y.active:
            position = P_x.grid_of_ranks.ranks.index(P_x.grid_of_ranks.rank(source_of(P_y.index, small)))
            assert torch.equal(y, integers((3, 2), seed=position))
        else:
            assert y.shape == (x.shape[0], 0)
        check_adjoint(dnn.Broadcast(P_x, P_y), x, world)

        y = of_rank(P_y, (3, 2))
        total = dnn.SumReduce(P_y, P_x)(y)
        if P_x.active:
            parts = [
                integers((3, 2), i) for i, index in enumerate(indices(large)) if source_of(index, small) == P_x.index
            ]
            assert torch.equal(total, sum(parts))
        check_adjoint(dnn.SumReduce(P_y, P_x), y, world)


@on_ranks(4)
def test_transposed_broadcast(world: Partition) -> None:
    """A transposed partition's shape and index are read in reverse."""
    row, column, square = world.grid((1, 2)), world.grid((2, 1)), world.grid((2, 2))
    y = dnn.Broadcast(row, square, transpose_src=True)(of_rank(row, (3,)))
    assert torch.equal(y, integers((3,), seed=square.index[0]))
    y = dnn.Broadcast(row, square, transpose_dest=True)(of_rank(row, (3,)))
    assert torch.equal(y, integers((3,), seed=square.index[0]))
    y = dnn.Broadcast(column, square, transpose_src=True, transpose_dest=True)(of_rank(column, (3,)))
    assert torch.equal(y, integers((3,), seed=square.index[0]))
    total = dnn.SumReduce(square, row, transpose_dest=True)(of_rank(square, (3,)))
    if row.active:
        assert torch.equal(total, sum(integers((3,), seed=2 * row.rank + i) for i in range(2)))
    check_adjoint(dnn.Broadcast(row, square, transpose_src=True), of_rank(row, (3,)), world)
    with pytest.raises(ValueError, match=r"transposed, with axes .0, 1. matched, it is ambiguous"):
        dnn.Broadcast(square, square, transpose_src=True)


@on_ranks(4)
def test_all_sum_reduce(world: Partition) -> None:
    P = world.grid((2, 2), [3, 1, 0, 2])
    for axes in ((), (0,), (1,), (0, 1), (-1,)):
        reduced = [axis % 2 for axis in axes]
        layer = dnn.AllSumReduce(P, axes_reduce=axes)
        x = integers((2, 3), seed=P.rank)
        same = [r for r in range(4) if all(unravel(r, (2, 2))[a] == P.index[a] for a in range(2) if a not in reduced)]
        assert torch.equal(layer(x), sum(integers((2, 3), seed=r) for r in same))
        kept = dnn.AllSumReduce(P, axes_keep=[a for a in range(2) if a not in reduced])
        assert torch.equal(kept(x), layer(x))
        check_adjoint(layer, x, world)
    with pytest.raises(ValueError, match="exactly one of axes_reduce and axes_keep must be given"):
        dnn.AllSumReduce(P)
    with pytest.raises(ValueError, match=r"axes \[2\] are not all axes"):
        dnn.AllSumReduce(P, axes_reduce=(2,))


@on_ranks(4)
def test_all_gather_and_reduce_scatter(world: Partition) -> None:
    for shape in ((3, 5), (7, 1), (0, 4), (4, 4)):
        P, x = world.grid((2, 2), [2, 0, 3, 1]), integers(shape)
        for axes in ((0,), (1,), (0, 1), ()):
            keep = [a for a in range(2) if a not in axes]
            block = P.block(shape)
            wanted = x[tuple(block[a] if a in keep else slice(None) for a in range(2))]
            gather, scatter = dnn.AllGather(P, axes), dnn.ReduceScatter(P, axes)
            assert torch.equal(gather(P.cut(x)), wanted)
            check_adjoint(gather, P.cut(x), world)

            parts = wanted * (P.rank + 1)
            factor = sum(
                r + 1 for r in range(4) if all(unravel(r, (2, 2))[a] == P.index[a] for a in range(2) if a in keep)
            )
            assert torch.equal(scatter(parts), P.cut(x) * factor)
            check_adjoint(scatter, parts, world)


@on_ranks(4)
def test_repartition(world: Partition) -> None:
    """Scatter, gather, transpose, move: disjoint, overlapping and equal grids, uneven and empty blocks."""
    grids = [world.grid(shape, ranks) for shape, ranks in (
        ((1, 1), [0]), ((1, 1), [3]), ((4, 1), None), ((1, 4), [3, 1, 0, 2]), ((2, 2), None), ((2, 1), [0, 1]),
        ((1, 2), [2, 3]), ((3, 1), [1, 2, 3]),
    )]  # fmt: skip
    x = integers((5, 3))
    for P_x in grids:
        for P_y in grids:
            layer = dnn.Repartition(P_x, P_y)
            y = layer(P_x.cut(x))
            if P_y.active:
                assert torch.equal(y, P_y.cut(x)), (P_x, P_y)
            else:
                assert y.numel() == 0
        check_adjoint(layer, P_x.cut(x), world)
    P = world.grid((4,))
    x, cuts = integers((10,)), (0, 7, 7, 8, 10)
    uneven = x[cuts[P.rank] : cuts[P.rank + 1]].clone()
    assert torch.equal(dnn.Repartition(P, P)(uneven), P.cut(x))
    assert torch.equal(dnn.Repartition(P, P, bounds=[cuts])(P.cut(x)), uneven)
    for shape in ((0,), (1,), (3,)):
        x, pair = integers(shape), world.grid((2,), [3, 1])
        assert torch.equal(dnn.Repartition(P, pair)(P.cut(x)).reshape(-1), pair.cut(x))


@on_ranks(4)
def test_halo_exchange(world: Partition) -> None:
    """Several hops, corners, other widths to the left and right, a tensor smaller than the grid."""
    for P, shape, halo in (
        (world.grid((2, 2)), (5, 4), ((1, 1), (1, 1))),
        (world.grid((2, 2), [2, 3, 1, 0]), (7, 5), ((0, 2), (3, 1))),
        (world.grid((1, 4)), (3, 10), ((0, 0), (4, 7))),
        (world.grid((4, 1)), (5, 2), ((3, 4), (1, 0))),
        (world.grid((4, 1)), (3, 4), ((2, 2), (0, 1))),
        (world.grid((1, 3), [3, 0, 1]), (2, 8), ((1, 1), (2, 3))),
    ):
        x = integers(shape)
        for boundary in ("none", "zeros", "circular", "reflect", "replicate"):
            layer = dnn.HaloExchange(P, halo, boundary)
            y = layer(P.cut(x))
            if P.active:
                assert torch.equal(y, grown(P, x, halo, boundary)), (P, boundary)
            check_adjoint(layer, P.cut(x), world)
    assert torch.equal(dnn.HaloExchange(world.grid((4,)), [1])(integers((2,))), grown_line(world.rank))


def grown_line(rank: int) -> torch.Tensor:
    """Four blocks of two points, each the same, with one point from each neighbour."""
    a, b = integers((2,)).tolist()
    return torch.tensor([[a, b, a], [b, a, b, a], [b, a, b, a], [b, a, b]][rank], dtype=torch.float64)


@on_ranks(4, mpi=True)
def test_scatter_and_gather(world: Partition) -> None:
    x, P = integers((5, 3)), world.grid((2, 1), [3, 1])
    for root in (0, 3):
        whole = x.clone().requires_grad_() if world.rank == root else None
        block = dl.scatter(whole, P, root)
        assert torch.equal(block.to(x), P.cut(x)) if P.active else block.numel() == 0
        back = dl.gather(2 * block, P, root)  # not None outside P, which would leave the block out of the graph
        assert back.shape == ((5, 3) if world.rank == root else (0,))
        if back.requires_grad:  # not on a rank that has no part in it
            (back * (x if world.rank == root else 1)).sum().backward()
        if whole is not None:
            assert torch.equal(back, 2 * x)
            assert torch.equal(whole.grad, 2 * x)
    with pytest.raises(ValueError, match="root 4 is not a rank of a world of 4"):
        dl.scatter(None, P, 4)
    with pytest.raises(TypeError, match="scatter: a Partition is needed, not 4"):
        dl.scatter(None, 4)


@on_ranks(4, mpi=True)
def test_data_on_the_wrong_ranks(world: Partition) -> None:
    """The texts name the root and what the user passed, not the partition of one rank that stands for the root."""
    x, P, outside = integers((5, 3)), world.grid((2, 1), [3, 1]), world.rank == 2
    how = "scatter: pass the whole tensor on rank 0, None elsewhere; rank {} passed {}"
    blocks = "gather: pass blocks on ranks [3, 1], None elsewhere; rank 2 passed a tensor of shape (5, 3)"
    of_shape = "a tensor of shape (5, 3)"

    def at_root(value: Any) -> Any:
        return value if world.rank == 0 else None

    for attempt, error, text, text_outside in (
        (lambda: dl.scatter(x, P), ValueError, how.format(1, of_shape), how.format(2, of_shape)),
        (lambda: dl.scatter(None, P), TypeError, how.format(0, "NoneType"), None),
        (lambda: dl.scatter(at_root([1.0]), P), TypeError, how.format(0, "list"), None),
        (lambda: dl.scatter(at_root(x[0]), P), ValueError, "scatter: a tensor of shape (3,) cannot be cut over", None),
        (lambda: dl.gather(x, P), ValueError, "gather: rank 0 passed a tensor of shape (5, 3), but is outside", blocks),
        (lambda: dl.gather(None, P), TypeError, "gather: rank 1 passed NoneType, a tensor is needed", None),
    ):
        if not outside:
            with pytest.raises(error) as found:
                attempt()
            assert text in str(found.value)
        elif text_outside is not None:
            with pytest.raises(ValueError, match=re.escape(text_outside)):
                attempt()
        else:
            assert attempt().shape == (0,)
    block = dl.scatter(at_root(x), P)  # the ranks are still together
    assert torch.equal(block.to(x), P.cut(x)) if P.active else block.numel() == 0


# ---- who holds nothing -----------------------------------------------------------------------------------------------


@on_ranks(4)
def test_what_ranks_without_data_get(world: Partition) -> None:
    P_x, P_y = world.grid((2, 1), [0, 1]), world.grid((1, 2), [1, 2])
    x = P_x.cut(integers((5, 3))) if P_x.active else dl.zero_volume_tensor(7, dtype=torch.float64)
    for preserve, shapes in ((True, {0: (3, 0), 3: (7, 0)}), (False, {0: (0,), 3: (7, 0)})):
        y = dnn.Repartition(P_x, P_y, preserve_batch=preserve)(x)
        assert y.shape == {1: (5, 2), 2: (5, 1), **shapes}[world.rank]
        assert y.dtype is torch.float64
    assert dl.zero_volume_tensor().shape == (0,)
    assert dl.zero_volume_tensor(3, torch.int8).dtype is torch.int8
    # a rank outside P_x need not know the dtype
    x = P_x.cut(integers((5, 3))) if P_x.active else torch.empty(0, dtype=torch.float32)
    y = dnn.Repartition(P_x, P_y)(x)
    assert y.dtype is (torch.float64 if world.rank < 3 else torch.float32)


@on_ranks(4, mpi=True)
def test_gradients_where_only_one_rank_asks_for_them(world: Partition) -> None:
    """All ranks get a graph node, so that none stays out of the others' backward; the one gets its gradient."""
    P = world.grid((4,))
    for asking in range(4):
        for layer in (
            dnn.HaloExchange(P, [1], "circular"),
            dnn.AllSumReduce(P, [0]),
            dnn.Repartition(P, world.grid((1,))),
        ):
            x = integers((2,), world.rank).requires_grad_(world.rank == asking)
            y = layer(x)
            assert y.requires_grad
            y.sum().backward()
            wanted = {"HaloExchange": 2.0, "AllSumReduce": 4.0, "Repartition": 1.0}[type(layer).__name__]
            if world.rank == asking:
                wanted = torch.full((2,), wanted, dtype=torch.float64)
                assert torch.equal(x.grad, wanted)
            else:
                assert x.grad is None


@on_ranks(4)
def test_empty_blocks_and_batches(world: Partition) -> None:
    """A rank inside a partition whose block is empty takes part, and gets a zero-volume gradient, not None."""
    P_x, P_y = world.grid((1, 4)), world.grid((2, 2))
    for shape in ((0, 5), (3, 2), (3, 0), (1, 1)):
        x = P_x.cut(integers(shape)).requires_grad_()
        for layer in (dnn.Repartition(P_x, P_y), dnn.AllGather(P_x, [1]), dnn.HaloExchange(P_x, [0, 1], "zeros")):
            y = layer(x)
            x.grad = None
            y.sum().backward()
            assert x.grad is not None
            assert x.grad.shape == x.shape
        y = dnn.Repartition(P_x, P_y)(x)
        assert torch.equal(y, P_y.cut(integers(shape)))
    total = dnn.AllSumReduce(P_x, [1])(torch.empty(0, 3, dtype=torch.float64))
    assert total.shape == (0, 3)


# ---- errors ----------------------------------------------------------------------------------------------------------


@on_ranks(4, mpi=True)
def test_errors_have_the_same_text_on_all_ranks(world: Partition) -> None:
    P, line, rank = world.grid((2, 2)), world.grid((4,)), world.rank
    x = integers((2, 2))
    small = world.grid((2,), [0, 1])
    wrong = {
        "the blocks form no tensor product": lambda: dnn.Repartition(P, P)(integers((2 + (rank == 3), 2))),
        "rank 2: dtype torch.float32, others torch.float64": lambda: dnn.AllSumReduce(P, [0])(
            x.float() if rank == 2 else x
        ),
        "rank 1 passed str": lambda: dnn.AllGather(P, [0])("x" if rank == 1 else x),
        "rank 3: number of dims 1, others 2": lambda: dnn.Repartition(P, P)(x[0] if rank == 3 else x),
        "cannot add shape": lambda: dnn.AllSumReduce(P, [0])(x[:1] if rank == 2 else x),
        "has 1 dims, its partition of shape (2, 2) has 2 axes": lambda: dnn.Repartition(P, P)(x[0]),
        "rank 3 passed a tensor of shape (1, 2), but is outside the partition of shape (2,) over ranks [0, 1], where "
        "P.block(shape) is None": lambda: dnn.Repartition(small, line)(
            x[0][small.block((2,))] if rank in (0, 1, 3) else NOTHING
        ),
        "bool tensors can be moved but not added": lambda: dnn.AllSumReduce(P, [0])(x > 0),
        "circular boundary of 5 needs more than the 4 points": lambda: dnn.HaloExchange(P, [5, 0], "circular")(x),
        "do not cut a tensor of shape (8,)": lambda: dnn.Repartition(line, line, bounds=[(0, 1, 2, 3, 4)])(x[0]),
        "Repartition: partitions of shape (2, 2) and (4,) differ in number of axes": lambda: dnn.Repartition(P, line),
        "Broadcast: a partition of shape (2, 2) has more axes than one of shape (4,)": lambda: dnn.Broadcast(P, line),
        "AllSumReduce: axes_reduce=0 is no sequence of axes": lambda: dnn.AllSumReduce(P, 0),
        "AllGather: axes [2] are not all axes of a partition of 2 axes": lambda: dnn.AllGather(P, [2]),
        "HaloExchange: a halo of [-1, 0] does not fit": lambda: dnn.HaloExchange(P, [-1, 0]),
        "HaloExchange: a halo of [(1, 2, 3), 0] does not fit": lambda: dnn.HaloExchange(P, [(1, 2, 3), 0]),
        "HaloExchange: a halo of [1.5, 0] does not fit": lambda: dnn.HaloExchange(P, [1.5, 0]),
        "HaloExchange.__init__() missing 1 required positional argument: 'halo'": lambda: dnn.HaloExchange(P),
        "cannot match a partition of shape (4,) to (2, 2): axes [1] differ": lambda: dnn.Broadcast(line, P),
        "does not fit a partition of shape (2, 2)": lambda: dnn.HaloExchange(P, [1]),
        "HaloExchange: halo=1 is no sequence, a number or a pair": lambda: dnn.HaloExchange(P, 1),
        "boundary 'mirror' is none of": lambda: dnn.HaloExchange(P, [1, 1], "mirror"),
        "lengths [2, 3] along dim 0 differ": lambda: dnn.ReduceScatter(P, [0])(integers((2 + P.index[0], 2))),
    }
    for text, call in wrong.items():
        assert_refused(world, world, call, text, (ValueError, TypeError))
    # and the ranks are still together, also with a layer that refused before
    layer = dnn.AllSumReduce(P, [0, 1])
    for _ in range(2):
        assert_refused(
            world, P, lambda: layer(x[:1] if rank == 2 else x), "AllSumReduce: cannot add shape (1, 2) of rank 2"
        )
        assert torch.equal(layer(x), 4 * x)


@on_ranks(4, mpi=True)
def test_a_rank_outside_that_passes_data_raises_alone(world: Partition) -> None:
    P = world.grid((2,), [0, 1])
    layer, x = dnn.AllSumReduce(P, [0]), integers((3,))
    if world.rank == 2:
        with pytest.raises(ValueError, match=r"rank 2 passed a tensor of shape .3,., but is outside"):
            layer(x)
    else:
        y = layer(x if P.active else NOTHING)
        assert torch.equal(y, 2 * x) if P.active else y.numel() == 0


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # which torch itself calls
@on_ranks(2, mpi=True)
def test_transforms_of_functions_are_refused(world: Partition) -> None:
    """Before anything is set up, also after a change on one rank, or where one rank alone transforms; not of one rank."""
    P, text = world.grid((1, 1, 2)), r"torch.func's transforms \(grad, vmap, jvp, ...\) see the graph of one rank alone"
    layers = [dnn.AllGather(P, (2,)), dnn.HaloExchange(P, (0, 0, 1)), dnn.DistributedSoftmax(P, 2)]
    layers += [dnn.DistributedConv1d(P, 2, 2, 3), dnn.DistributedMaxPool1d(P, 2), dnn.DistributedBatchNorm(P, 2)]
    torch.func.vmap(torch.sin)(torch.ones(2, 2))  # torch compiles on first use
    for layer in (*layers, torch.nn.Sequential(*layers[3:])):
        for length in (4, 4 + 2 * world.rank, 4):
            x = torch.ones(2, 2, length)
            for transform in (
                lambda layer, x: torch.func.grad(lambda x: layer(x).sum())(x),
                lambda layer, x: torch.func.vmap(layer)(x[None]),
                lambda layer, x: torch.func.jvp(layer, (x,), (x,)),
            ):
                with pytest.raises(RuntimeError, match=text):
                    transform(layer, x)
            assert layer(x).shape[:2] == (2, 2)
        with pytest.raises(ValueError, match=r"mode training, torch\.func, others training"):
            transform(layer, x) if world.rank == 1 else layer(x)
    if world.rank == 0:
        pool = dnn.DistributedMaxPool1d(world.grid((1, 1, 1)), 2)
        assert torch.func.grad(lambda x: pool(x).sum())(x).sum() == 8


@on_ranks(2)
def test_transforms_of_operators_are_refused(world: Partition) -> None:
    layer = dnn.AllSumReduce(world.grid((2,)), axes_reduce=(0,))
    layer(torch.ones(3, requires_grad=True))
    operator, _ = layer._operator(torch.ones(3))
    with pytest.raises(RuntimeError, match=r"torch\.func's transforms"):
        torch.func.grad(lambda x: operator(x).sum())(torch.ones(3))


@on_ranks(2, mpi=True)
def test_batches_of_gradients_are_refused(world: Partition) -> None:
    """On all ranks, also where one of them has nothing to send back and would wait; the layers of one rank take them."""
    P, first, second = world.grid((1, 1, 2)), world.grid((1, 1, 1), [0]), world.grid((1, 1, 1), [1])
    x = torch.ones(2, 2, 4)

    def batched(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = layer(x.requires_grad_())
        return torch.autograd.grad(y, x, torch.ones(3, *y.shape), is_grads_batched=True)[0]

    layers = [dnn.AllGather(P, (2,)), dnn.HaloExchange(P, (0, 0, 1)), dnn.DistributedSoftmax(P, 2)]
    layers += [dnn.DistributedConv1d(P, 2, 2, 3), dnn.DistributedMaxPool1d(P, 3), dnn.DistributedBatchNorm(P, 2)]
    for layer in (*layers, dnn.Repartition(first, second)):
        mine = NOTHING.clone() if isinstance(layer, dnn.Repartition) and world.rank == 1 else x.clone()
        with pytest.raises(RuntimeError, match="is_grads_batched=True"):
            batched(layer, mine)
        layer(mine).sum().backward()  # after which it is as good as new
    if world.rank == 0:
        assert batched(dnn.DistributedConv1d(first, 2, 2, 3, padding=1), x).shape == (3, 2, 2, 4)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # which torch itself calls
def test_forward_mode_is_refused() -> None:
    def body(world: Partition) -> None:
        P = world.create_cartesian_topology_partition((1, 1, 2))
        convolution = dnn.DistributedConv1d(P, 1, 1, 3, padding=1).requires_grad_(False)
        for layer in (dnn.HaloExchange(P, (0, 0, 1)), convolution, dnn.DistributedSoftmax(P, 2)):
            with pytest.raises(NotImplementedError, match="jvp"):
                layer(forward_ad.make_dual(torch.ones(1, 1, 2), torch.ones(1, 1, 2)))

    with forward_ad.dual_level():  # one for the whole process
        spmd(2, body)


@on_ranks(2)
def test_numbers_of_numpy(world: Partition) -> None:
    """Halos, shapes, ranks, axes and bounds as arrays; numbers that are no integers are refused, not cut."""
    array = numpy.array
    P, x = world.grid(array([1, 2]), ranks=array([1, 0]), periods=array([False, True])), torch.ones(1, 3)
    for halo in (array([[0, 0], [1, 2]]), [(0, 0), array([1, 2])], (numpy.int64(0), (1, numpy.int32(2)))):
        layer = dnn.HaloExchange(P, halo, "zeros")
        assert repr(layer) == repr(dnn.HaloExchange(P, (0, (1, 2)), "zeros"))
        assert torch.equal(layer(x), dnn.HaloExchange(P, (0, (1, 2)), "zeros")(x))
    assert dnn.HaloExchange(P, array([0, 1]))(x).shape == (1, 4)
    move = dnn.Repartition(P, P, bounds=(array([0, 1]), array([0, 4, 6])))
    assert move(x).shape == (1, 4 if P.rank == 0 else 2)
    assert dnn.AllSumReduce(P, axes_reduce=array([1]))(x).tolist() == [[2.0] * 3]
    with pytest.raises(ValueError, match="does not fit a partition of shape"):
        dnn.HaloExchange(P, array([0.5, 1.0]))
    for attempt in (lambda: world.grid((1, 2.5)), lambda: world.create_partition_inclusive([0.5])):
        with pytest.raises(TypeError, match="no sequence of integers"):
            attempt()
