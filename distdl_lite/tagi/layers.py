"""Layers of Gaussian units: means and variances forward, changes of them backward, all in closed form.

Sources: Goulet, Nguyen & Amiri, Tractable approximate Gaussian inference for Bayesian neural networks, JMLR 22 (2021),
paper 20-1009; Nguyen & Goulet, Analytically tractable hidden-states inference in Bayesian neural networks, JMLR 23 (2022),
paper 21-0758. All covariances are diagonal.
"""

from __future__ import annotations

import math

import torch

from distdl_lite.tagi.states import DeltaStates, HiddenStates

LEAST = 1e-6  # a mean and a variance that MixtureReLU gives on
BLOCK = 1 << 18  # weights that are updated at a time
STEADY = 1e-5  # the variance of a weight that an update would have taken to 0 or below


class Layer(torch.nn.Module):
    """A layer of `Sequential`."""

    def forward(self, states: HiddenStates) -> HiddenStates:
        raise NotImplementedError

    def backward(self, deltas: DeltaStates, wants_input: bool) -> DeltaStates:
        """The deltas of the layer before; those of an activation are in its ``jcb``, which `Linear` and updates apply."""
        return deltas


class Linear(Layer):
    """Weights and biases with a mean and a variance each: ``mu_z = mu_a Mw^T + mb``, ``var_z`` accordingly.

    Parameters
    ----------
    in_features, out_features : int
    bias : bool
    gain_weight, gain_bias : float
        By what the standard deviations at the start are multiplied.
    init_method : {"He", "Xavier"}
        Means are drawn from N(0, scale^2), and variances are (gain scale)^2, where scale is sqrt(1 / in_features), or
        sqrt(2 / (in_features + out_features)).

    Attributes
    ----------
    mu_w, var_w : torch.Tensor
        Buffers of shape (out_features, in_features).
    mu_b, var_b : torch.Tensor or None
        Buffers of shape (out_features,).
    delta_mu_w, delta_var_w, delta_mu_b, delta_var_b : torch.Tensor or None
        What the last backward found. They are in no ``state_dict``.

    Raises
    ------
    ValueError
        If there is no feature, or no such `init_method`.

    Examples
    --------
    >>> from distdl_lite import tagi
    >>> layer = tagi.Linear(3, 2)
    >>> layer.mu_w.shape, bool((layer.var_w > 0).all())
    (torch.Size([2, 3]), True)
    """

    NAMES = ("mu_w", "var_w", "mu_b", "var_b")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        gain_weight: float = 1.0,
        gain_bias: float = 1.0,
        init_method: str = "He",
    ) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ValueError(f"tagi.Linear: {in_features} and {out_features} features: at least 1 of each is needed")
        scales = {"He": 1 / in_features, "Xavier": 2 / (in_features + out_features)}
        if init_method not in scales:
            raise ValueError(f"tagi.Linear: init_method must be one of {', '.join(scales)}, not {init_method!r}")
        self.in_features, self.out_features = in_features, out_features
        scale = math.sqrt(scales[init_method])
        shapes = {"w": (out_features, in_features), "b": (out_features,) if bias else None}
        gains = {"w": gain_weight, "b": gain_bias}
        for kind, shape in shapes.items():
            mean = None if shape is None else torch.randn(shape).mul_(scale)
            variance = None if shape is None else torch.full(shape, (gains[kind] * scale) ** 2)
            self.register_buffer(f"mu_{kind}", mean)
            self.register_buffer(f"var_{kind}", variance)
        for name in self.NAMES:
            value = getattr(self, name)
            delta = None if value is None else torch.zeros_like(value)
            self.register_buffer(f"delta_{name}", delta, persistent=False)
        self._saved: tuple[torch.Tensor | None, ...] | None = None

    def forward(self, states: HiddenStates) -> HiddenStates:
        mu, var, own = states.mu_a, states.var_a, self._buffers
        assert mu is not None
        squares, mean_squares = mu * mu, None
        mu_z = _affine(mu, own["mu_w"], own["mu_b"])
        if var is None:
            var_z = _affine(squares, own["var_w"], own["var_b"])
        else:
            mean_squares = own["mu_w"] * own["mu_w"]
            var_z = _affine(squares + var, own["var_w"], own["var_b"]).addmm_(var, mean_squares.t())
        self._saved = (mu, squares, states.jcb, mean_squares) if self.training else None
        return HiddenStates(mu_z, var_z)

    def backward(self, deltas: DeltaStates, wants_input: bool) -> DeltaStates:
        """Fill in the layer's deltas; those of its input are found only where they are wanted."""
        assert self._saved is not None
        (mu, squares, jcb, mean_squares), self._saved = self._saved, None
        d_mu, d_var, own = deltas.delta_mu, deltas.delta_var, self._buffers
        assert d_mu is not None
        assert d_var is not None
        var = own["var_w"]
        torch.mm(d_mu.t(), mu, out=own["delta_mu_w"]).mul_(var)
        torch.mm(d_var.t(), squares, out=own["delta_var_w"]).mul_(var).mul_(var)
        var = own["var_b"]
        if var is not None:
            torch.sum(d_mu, 0, out=own["delta_mu_b"]).mul_(var)
            torch.sum(d_var, 0, out=own["delta_var_b"]).mul_(var).mul_(var)
        if not wants_input:
            return DeltaStates()
        if mean_squares is None:
            mean_squares = own["mu_w"] * own["mu_w"]
        back_mu = torch.mm(d_mu, own["mu_w"], out=torch.empty_like(mu))
        back_var = torch.mm(d_var, mean_squares, out=torch.empty_like(mu))
        if jcb is not None:
            back_mu.mul_(jcb)
            back_var.mul_(jcb).mul_(jcb)
        return DeltaStates(back_mu, back_var)

    def step(self, cap: float) -> None:
        """Add the deltas, each at most the standard deviation over `cap` in size."""
        own = self._buffers
        for kind in "wb":
            var = own[f"var_{kind}"]
            if var is not None:
                tensors = own[f"mu_{kind}"], var, own[f"delta_mu_{kind}"], own[f"delta_var_{kind}"]
                rows = max(1, BLOCK // math.prod(var.shape[1:]))
                for block in zip(*(tensor.split(rows) for tensor in tensors), strict=True):
                    _clipped_step(*block, cap)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.mu_b is not None}"

    def __getstate__(self) -> dict[str, object]:
        """With deltas of their own, lest each brings the memory of all that it is a view of."""
        buffers = {n: b.clone() if n.startswith("delta") and b is not None else b for n, b in self._buffers.items()}
        return {**self.__dict__, "_buffers": buffers}


def _clipped_step(
    mu: torch.Tensor, var: torch.Tensor, delta_mu: torch.Tensor, delta_var: torch.Tensor, cap: float
) -> None:
    """Eight passes over memory that is soon there already: fresh pages would take longer than all of them."""
    most, least, change = var.new_empty(3, *var.shape)
    torch.neg(torch.sqrt(var, out=most).div_(cap), out=least)
    mu.add_(torch.clamp(delta_mu, least, most, out=change))
    var.add_(torch.clamp(delta_var, least, most, out=change))
    torch.threshold_(var, 0.0, STEADY)


def _affine(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x weight^T + bias; autocast leaves alone what is told where to write."""
    into = x.new_empty(x.shape[0], weight.shape[0])
    return torch.mm(x, weight.t(), out=into) if bias is None else torch.addmm(bias, x, weight.t(), out=into)


class Activation(Layer):
    """A layer that works elementwise; one that gives its `tangent` is replaced by that at the mean."""

    def forward(self, states: HiddenStates) -> HiddenStates:
        assert states.mu_a is not None
        mu, var, jcb = self.moments(states.mu_a, states.var_a)
        return HiddenStates(mu, var, jcb if states.jcb is None else jcb * states.jcb)

    def moments(
        self, mu: torch.Tensor, var: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """The activation's mean and variance, and its covariance with z over that of z."""
        value, slope = self.tangent(mu)
        return value, None if var is None else slope * slope * var, slope

    def tangent(self, mu: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The function's value and slope."""
        raise NotImplementedError


class ReLU(Activation):
    """max(0, z), linearised at the mean: ``J = [mu_z > 0]``.

    Examples
    --------
    >>> import torch
    >>> from distdl_lite import tagi
    >>> mean, variance = tagi.Sequential(tagi.ReLU())(torch.tensor([[-1.0, 2.0]]))
    >>> [round(value, 3) for value in mean[0].tolist()]
    [0.0, 2.0]
    """

    def tangent(self, mu: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return mu.relu(), (mu > 0).to(mu.dtype)


class Tanh(Activation):
    """tanh z, linearised at the mean.

    Examples
    --------
    >>> import torch
    >>> from distdl_lite import tagi
    >>> mean, variance = tagi.Sequential(tagi.Tanh())(torch.tensor([[-1.0, 2.0]]))
    >>> [round(value, 3) for value in mean[0].tolist()]
    [-0.762, 0.964]
    """

    def tangent(self, mu: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        value = mu.tanh()
        return value, 1 - value * value


class Sigmoid(Activation):
    """1 / (1 + exp(-z)), linearised at the mean.

    Examples
    --------
    >>> import torch
    >>> from distdl_lite import tagi
    >>> mean, variance = tagi.Sequential(tagi.Sigmoid())(torch.tensor([[-1.0, 2.0]]))
    >>> [round(value, 3) for value in mean[0].tolist()]
    [0.269, 0.881]
    """

    def tangent(self, mu: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        value = mu.sigmoid()
        return value, value * (1 - value)


class MixtureReLU(Activation):
    """max(0, z) with its exact mean and variance for a Gaussian z, both at least 1e-6; ``J = Phi(mu_z / s)``.

    With a = mu_z / s the variance is written as var_z (P + a^2 P (1 - P) + a phi (1 - 2 P) - phi^2), which is the same as the
    usual ``-mu_a^2 + 2 mu_a mu_z - mu_z s phi + (var_z - mu_z^2) P``, but no difference of large numbers for a large mean.

    Examples
    --------
    >>> import torch
    >>> from distdl_lite import tagi
    >>> mean, variance = tagi.Sequential(tagi.MixtureReLU())(torch.tensor([[-1.0, 2.0]]), torch.ones(1, 2))
    >>> [round(value, 3) for value in (*mean[0].tolist(), *variance[0].tolist())]
    [0.083, 2.008, 0.068, 0.96]
    """

    def moments(
        self, mu: torch.Tensor, var: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        var = torch.zeros_like(mu) if var is None else var
        s = var.sqrt()
        # Beyond 50 standard deviations nothing changes any more, and squares of infinity are not met.
        a = (mu / s.clamp_min(torch.finfo(mu.dtype).tiny)).clamp_(-50, 50)
        P, Q = torch.erfc(a * -math.sqrt(0.5)) / 2, torch.erfc(a * math.sqrt(0.5)) / 2
        phi = torch.exp(a * a / -2) / math.sqrt(2 * math.pi)
        share = P + a * a * P * Q + a * phi * (Q - P) - phi * phi
        return (mu * P + s * phi).clamp_min_(LEAST), (var * share).clamp_min_(LEAST), P
