"""Models of other libraries: what `DDPSequential` asks of them, and how their deltas are summed.

A model has ``layers``, which may have ``layers`` again, ``forward(mu_x, var_x)``, ``backward()`` and ``step()``. The Gaussians
of a layer are arrays ``mu_*`` and ``var_*``, for which there are ``delta_mu_*`` and ``delta_var_*`` of the same shapes; None and
empty ones are passed over. Arrays are NumPy's or torch's. They are written in place; backward may put other deltas in
place of the last. The number of rows is the length of ``mu_x``. If the model has an attribute ``batch_size``, it is set
before each step to the number of rows that the step's cap is to follow; else the cap follows what the model knows itself.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy
import torch

from distdl_lite.tagi.layers import Layer

MEMBERS = "layers", "forward", "backward", "step"


def arrays_of(model: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The names and values of all means and variances, as tensors over the same memory."""
    return ((name, _tensor(layer, kind, name)) for name, layer, kind in _found(model, prefix))


def kinds_of(model: Any, prefix: str = "") -> dict[str, str]:
    """The layers, of another library their types alone."""
    kinds = {}
    for number, layer in enumerate(model.layers):
        inner = f"{prefix}{number}"
        kinds[f"layer {inner}"] = repr(layer) if isinstance(layer, Layer) else type(layer).__name__
        if hasattr(layer, "layers"):
            kinds.update(kinds_of(layer, f"{inner}."))
    return kinds


def deltas_of(model: Any) -> list[torch.Tensor]:
    """Their deltas."""
    deltas = []
    for name, layer, kind in _found(model, ""):
        delta, shape = _tensor(layer, f"delta_{kind}", f"the delta of {name}"), tuple(getattr(layer, kind).shape)
        if tuple(delta.shape) != shape:
            raise ValueError(f"the delta of {name} is of shape {tuple(delta.shape)}, not {shape}")
        deltas.append(delta)
    return deltas


def _found(model: Any, prefix: str) -> Iterator[tuple[str, Any, str]]:
    for number, layer in enumerate(model.layers):
        inner = f"{prefix}{number}."
        for kind in dir(layer):
            if kind.startswith(("mu_", "var_")) and hasattr(layer, f"delta_{kind}"):
                value = getattr(layer, kind)
                if value is not None and len(value):
                    yield f"{inner}{kind}", layer, kind
        if hasattr(layer, "layers"):
            yield from _found(layer, inner)


def _tensor(layer: Any, kind: str, name: str) -> torch.Tensor:
    value = getattr(layer, kind)
    if isinstance(value, numpy.ndarray):
        return torch.from_numpy(value)
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be an array of NumPy or a tensor, not {type(value).__name__}")
    return value.detach()


def missing_members(model: Any) -> list[str]:
    return [name for name in MEMBERS if not hasattr(model, name)]


def described(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """What must be the same on all ranks, in words."""
    return {
        name: f"{tuple(t.shape)} of {str(t.dtype).removeprefix('torch.')} on {t.device.type}"
        for name, t in tensors.items()
    }


def checksums(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Of the bits of each tensor, in words."""
    bits = {name: t.cpu().contiguous().view(-1).view(torch.uint8).numpy() for name, t in tensors.items()}
    return {name: f"of checksum {zlib.crc32(b):08x}" for name, b in bits.items()}
