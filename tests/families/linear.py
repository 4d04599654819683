"""Linear layers and embeddings, whose weights are cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from generated import Cuts, Draw, Twins, block, even

import distdl_lite as dl
import distdl_lite.nn as dnn
from distdl_lite.grid import balanced
from distdl_lite.layout import ranges_of
from families.drawn import BATCHES, EPS, MOSTLY_DOUBLE, always, described


def linear(d: Draw) -> Twins:
    lead, kind = d.choice((0, 1, 1, 2, 3)), d.choice(("alone", "target", "work", "work"))
    P_x, P_y, P_w = d.partition(lead + 1), None, None
    if kind == "target":
        P_y = d.partition(lead + 1)
    elif kind == "work":
        *leads, out, ins = d.grid(lead + 2)
        P_x, P_y = d.over(d.grid(lead + 1, {lead: ins})), d.over((*leads, out))
        while leads and leads[-1] == 1 and d.chance(0.7):
            leads.pop()
        P_w = d.over((*leads, out, ins))
    n_in, n_out, bias = d.choice((1, 2, 5, 7)), d.choice((1, 3, 4, 8)), d.chance(0.7)
    dtype = d.choice((*MOSTLY_DOUBLE, torch.complex128))
    x = d.integers(*d.each(lead, *BATCHES), n_in, dtype=dtype)
    cuts = d.cuts(x.shape, P_x.shape)
    return Twins(
        described("Linear", (n_in, n_out, bias), [x], cuts, P_x, P_y, P_w),
        lambda: dnn.DistributedLinear(P_x, P_y, P_w, n_in, n_out, bias, dtype=dtype),
        lambda: torch.nn.Linear(n_in, n_out, bias, dtype=dtype),
        [x],
        [block(P_x, cuts)],
        even(P_y or P_x),
        [P for P in (P_x, P_y, P_w) if P],
        EPS[dtype] if dtype is torch.bfloat16 else 0.0,
    )


def parallel_linear(d: Draw, kind: str) -> Twins:
    """On one side, the input of rows and the output of columns, the features may be cut; on the other the last lead dim."""
    P = d.partition(d.choice((1, 2, 2, 3)))
    lead, line = d.each(P.dim - 1 + d.randrange(3), 0, 1, 2, 5, 7), P.shape[-1]
    n_in, n_out, bias = d.choice((1, 2, 5, 7)), d.choice((1, 3, 4, 8)), d.chance(0.7)
    dtype = d.choice(MOSTLY_DOUBLE)
    whole, rows_cut, of_columns = d.chance(0.5), d.chance(0.5) and len(lead) > 0, kind == "Column"
    names = ("gather_output", "sequence_parallel") if of_columns else ("input_is_parallel", "scatter_output")
    options = dict(zip(names, (whole == of_columns, rows_cut), strict=True))
    cuts, rows = on_lines(d, P, lead)
    wild = 0.0, 0.5  # outputs are in balanced blocks
    features = d.cuts((n_out if of_columns else n_in,), (line,), wild[not of_columns])[0]
    pieces = {r: d.cuts((r[1] - r[0],), (line,), wild[of_columns])[0] for r in ranges_of(cuts[-1])} if lead else {}
    some_features = some_rows = None
    if rows is not None:
        i = P.index[-1]
        some_features = (*rows, slice(None) if whole else slice(features[i], features[i + 1]))
        some_rows = (*rows, slice(None))
        if rows_cut:
            start = rows[-1].start
            piece = pieces[start, rows[-1].stop]
            some_rows = (*rows[:-1], slice(start + piece[i], start + piece[i + 1]), slice(None))
    x = d.integers(*lead, n_in, dtype=dtype)
    name = f"Distributed{kind}ParallelLinear"
    return Twins(
        described(name, (n_in, n_out, bias, options), [x], (cuts, pieces, features), P),
        lambda: getattr(dnn, name)(P, n_in, n_out, bias, dtype=dtype, **options),
        lambda: torch.nn.Linear(n_in, n_out, bias, dtype=dtype),
        [x],
        [always(some_rows if of_columns else some_features)],
        always(some_features if of_columns else some_rows),
        [P],
        EPS[dtype] if dtype is torch.bfloat16 else 0.0,
    )


def embedding(d: Draw) -> Twins:
    P, how = d.partition(d.choice((1, 2, 2, 3, 3))), d.choice(("vocabulary", "feature"))
    n, dim = d.choice(((7, 5), (3, 2), (12, 1), (6, 4), (1, 6)))
    dtype = d.choice(MOSTLY_DOUBLE)
    options: dict[str, Any] = {
        "padding_idx": d.choice((None, 0, n - 1, -1, n // 2)),
        "scale_grad_by_freq": d.chance(0.4),
        "dtype": dtype,
    }
    lead = d.each(P.dim - 1 + d.randrange(2), 0, 1, 2, 2, 5, 5, 9, 9)
    cuts, rows = on_lines(d, P, lead)
    index = d.integers(*lead, dtype=d.choice((torch.int32, torch.int64)), low=0, high=n)
    out = None
    if rows is not None:
        i, features = P.index[-1], balanced(dim, P.shape[-1])
        out = (*rows, slice(features[i], features[i + 1]) if how == "feature" else slice(None))
    return Twins(
        described("Embedding", (n, dim, how, options), [index], cuts, P),
        lambda: dnn.DistributedEmbedding(P, n, dim, cut=how, **options),
        lambda: torch.nn.Embedding(n, dim, **options),
        [index],
        [always(rows)],
        always(out),
        [P],
        EPS[dtype] if options["scale_grad_by_freq"] or dtype is torch.bfloat16 else 0.0,
    )


def on_lines(d: Draw, P: dl.Partition, lead: Sequence[int]) -> tuple[Cuts, tuple[slice, ...] | None]:
    """Cuts of the leading dims over all axes but the last, and this rank's block of them; axes are aligned at the end."""
    axes = (*(1,) * (len(lead) + 1 - P.dim), *P.shape)[:-1]
    cuts = d.cuts(lead, axes)
    if P.index is None:
        return cuts, None
    index = (*(0,) * (len(lead) + 1 - P.dim), *P.index)
    return cuts, tuple(slice(c[i], c[i + 1]) for c, i in zip(cuts, index, strict=False))
