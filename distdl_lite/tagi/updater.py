"""Updates of the output by observations."""

from __future__ import annotations

from typing import Any

import torch

from distdl_lite.tagi.states import DeltaStates, HiddenStates, tensor_of


class OutputUpdater:
    """Compares a model's output with observations; the first half of a backward.

    Parameters
    ----------
    device : torch.device or str, optional
        Where the model is. It need not be given.

    Raises
    ------
    ValueError
        If torch has no such device here.

    Examples
    --------
    >>> import torch
    >>> from distdl_lite import tagi
    >>> net = tagi.Sequential(tagi.Linear(2, 1))
    >>> mean, variance = net(torch.ones(3, 2))
    >>> tagi.OutputUpdater().update(net.output_z_buffer, torch.zeros(3, 1), 0.1, net.input_delta_z_buffer)
    >>> net.input_delta_z_buffer.delta_mu.shape
    torch.Size([3, 1])
    """

    def __init__(self, device: Any = None) -> None:
        try:
            self.device = None if device is None else torch.empty(0, device=device).device
        except (RuntimeError, AssertionError):  # the latter of a torch without CUDA
            raise ValueError(f"OutputUpdater: device must be a device that torch has here, not {device!r}") from None

    @torch.no_grad()
    def update(self, output_states: HiddenStates, mu_obs: Any, var_obs: Any, delta_states: DeltaStates) -> None:
        """Write the deltas of the output: ``J (y - mu) / (var + var_obs)`` and ``-J^2 / (var + var_obs)``.

        Parameters
        ----------
        output_states : HiddenStates
            The model's ``output_z_buffer``.
        mu_obs : array
            Observations of shape (B, features), or flat. NaN is none, which changes nothing.
        var_obs : array or float
            Variances of the observations, not standard deviations; as many, or what can be broadcast to (B, features): of
            shape (features,) one for each column, also where B is the same; of shape (B, 1) one for each row.
        delta_states : DeltaStates
            The model's ``input_delta_z_buffer``.

        Raises
        ------
        RuntimeError
            Before a forward.
        ValueError
            If the shapes do not fit, the states are on another device, or, on CPUs, a variance is negative.
        TypeError
            If the states are in each other's place.
        """
        if isinstance(output_states, DeltaStates) or isinstance(delta_states, HiddenStates):
            raise TypeError("OutputUpdater: output_states and delta_states are in each other's place")
        mu, var, jcb = output_states.mu_a, output_states.var_a, output_states.jcb
        if mu is None or var is None:
            raise RuntimeError("tagi: an update of the output needs a forward before it")
        if self.device is not None and self.device.type != mu.device.type:
            raise ValueError(f"OutputUpdater: the output is on {mu.device}, the updater on {self.device}")
        y, noise = tensor_of(mu_obs, mu), tensor_of(var_obs, mu)
        if y.shape != mu.shape and not (y.dim() == 1 and y.numel() == mu.numel()):
            raise ValueError(
                f"OutputUpdater: mu_obs of shape {tuple(y.shape)} does not fit an output of {tuple(mu.shape)}"
            )
        if noise.dim() == 1 and noise.numel() == mu.numel():
            noise = noise.view(mu.shape)
        try:
            total = var + noise.expand(mu.shape)
        except RuntimeError:
            raise ValueError(
                f"OutputUpdater: var_obs of shape {tuple(noise.shape)} does not fit an output of {tuple(mu.shape)}"
            ) from None
        if noise.device.type == "cpu" and (noise < 0).any():
            raise ValueError(f"OutputUpdater: var_obs must not be negative, but has {noise.min().item():.3g}")
        y = y.view(mu.shape)
        missing = y.isnan()
        delta_mu, delta_var = (y - mu).div_(total), total.reciprocal().neg_()
        if jcb is not None:
            delta_mu.mul_(jcb)
            delta_var.mul_(jcb).mul_(jcb)
        delta_states.delta_mu = delta_mu.masked_fill_(missing, 0)
        delta_states.delta_var = delta_var.masked_fill_(missing, 0)
