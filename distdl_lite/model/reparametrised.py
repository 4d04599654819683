"""Cut weights that something has put another tensor in the place of, as torch's parametrizations and pruning do."""

from __future__ import annotations

import torch

from distdl_lite.layout import global_shape_of, shape_of


def reparametrised_cut_weight(module: torch.nn.Module) -> ValueError | None:
    """The error of a module with such a weight, if it has one.

    Of the tensors from which the weight is made now nobody knows how they are cut. Those of a weight that every rank holds
    whole are whole too.
    """
    for path, inner in module.named_modules():
        for name, place in getattr(inner, "_distdl_places", {}).items():
            if name in inner._parameters or name in inner._buffers:
                continue
            whole = global_shape_of(place.layout)
            boxes = (place.layout.box(rank) for rank in place.layout.grid.ranks)
            if any(box is None or shape_of(box) != whole for box in boxes):
                return ValueError(
                    f"{path}.{name}".lstrip(".")
                    + f" of shape {whole} is cut over ranks, and is no parameter any more: how what a parametrization or "
                    "pruning has put in its place is cut is not known"
                )
    return None
