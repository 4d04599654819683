"""The data that travels between layers, forward and backward, and arrays in and out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy
import torch


@dataclass(eq=False)
class HiddenStates:
    """Means and variances of a layer's output.

    Attributes
    ----------
    mu_a, var_a : torch.Tensor or None
        Of shape (B, features). `var_a` None of an input is 0 everywhere.
    jcb : torch.Tensor or None
        cov(a, z) / var z of the activations since the last `Linear`, of the same shape; None is 1.
    """

    mu_a: torch.Tensor | None = None
    var_a: torch.Tensor | None = None
    jcb: torch.Tensor | None = None


@dataclass(eq=False)
class DeltaStates:
    """What observations change in the output of a `Linear`, relative to its variance; None before an update.

    Attributes
    ----------
    delta_mu, delta_var : torch.Tensor or None
        Of shape (B, features).
    """

    delta_mu: torch.Tensor | None = None
    delta_var: torch.Tensor | None = None


def tensor_of(array: Any, like: torch.Tensor) -> torch.Tensor:
    """An array of any library, float dtype and strides, or a number, as a tensor of the dtype and device of `like`."""
    if not isinstance(array, torch.Tensor):
        array = numpy.asarray(array)
        dtype = array.dtype.newbyteorder("=") if array.dtype.itemsize <= 8 else numpy.float64
        # torch takes no negative strides, no longdouble, and warns of memory that must not be written to.
        array = torch.from_numpy(numpy.require(array, dtype, ("C", "W")))
    return array.detach().to(like)


def array_of(tensor: torch.Tensor) -> Any:
    """The tensor's numbers in NumPy, which has no bfloat16: these are float32 there."""
    tensor = tensor.float() if tensor.dtype is torch.bfloat16 else tensor
    return tensor.cpu().numpy()
