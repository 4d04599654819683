"""Layers one after another, as pytagi's Sequential."""

from __future__ import annotations

from collections.abc import Iterator
from operator import is_
from typing import Any

import torch

from distdl_lite.tagi.layers import Activation, Layer, Linear
from distdl_lite.tagi.states import DeltaStates, HiddenStates, array_of, tensor_of


def cap_of(batch_size: int) -> float:
    """How many times smaller than a standard deviation an update must be: the reference's heuristic, not of the theory."""
    return 0.1 if batch_size <= 1 else 2.0 if batch_size < 256 else 3.0


class Sequential(torch.nn.Sequential):
    """Layers of `dl.tagi` one after another, in pytagi's way of working: forward, update of the output, backward, step.

    A `torch.nn.Sequential` in all else: length, iteration, indices, slices, ``.to``, ``.double``, ``state_dict``, which
    holds the means and variances. One may stand inside another. All layers are of one dtype. Halves work, and lose every update
    that is smaller than their precision, 0.4 % of a bfloat16.

    Parameters
    ----------
    *layers : Layer or Sequential

    Attributes
    ----------
    output_z_buffer : HiddenStates
        ``mu_a``, ``var_a`` and ``jcb`` of the last forward.
    input_delta_z_buffer : DeltaStates
        ``delta_mu`` and ``delta_var``, which an update of the output writes and backward uses up.
    flat : torch.Tensor or None
        What all deltas are views of, since the last `flat_deltas`, which each forward calls.
    batch_size : int
        The rows that the last backward was about, which the next step's cap follows.

    Raises
    ------
    TypeError
        For a layer of another kind.
    ValueError
        For a layer that stands in two places, or a `Linear` that takes another number of features than the one before gives.

    Examples
    --------
    >>> from distdl_lite import tagi
    >>> net = tagi.Sequential(tagi.Linear(2, 8), tagi.ReLU(), tagi.Linear(8, 1))
    >>> x, y = torch.randn(64, 2), torch.randn(64, 1)
    >>> mean, variance = net(x)
    >>> tagi.OutputUpdater().update(net.output_z_buffer, y, 0.1, net.input_delta_z_buffer)
    >>> net.backward()
    >>> net.step()
    """

    def __init__(self, *layers: Any) -> None:
        if layers and isinstance(layers[0], list | tuple):
            raise TypeError("tagi.Sequential: each layer is an argument; unpack the list: Sequential(*layers)")
        super().__init__(*layers)
        for layer in self:
            if not isinstance(layer, Layer | Sequential):
                raise TypeError(f"tagi.Sequential: layers of dl.tagi are needed, not {layer!r}")
        leaves = list(self.leaves())
        if len(set(leaves)) < len(leaves):
            raise ValueError("tagi.Sequential: a layer stands in two places, whose deltas would be one another's")
        _check_features(leaves)
        self.output_z_buffer, self.input_delta_z_buffer = HiddenStates(), DeltaStates()
        self.batch_size = 0
        self._is_fresh = False  # whether a backward came after the last step
        self.flat: torch.Tensor | None = None
        self._views: list[torch.Tensor] = []
        self.flat_deltas()

    @property
    def layers(self) -> list[Any]:
        return list(self)

    def leaves(self) -> Iterator[Layer]:
        """The layers, also of containers inside."""
        for layer in self._modules.values():
            if isinstance(layer, Sequential):
                yield from layer.leaves()
            else:
                yield layer

    def parameters(self, recurse: bool = True) -> list[tuple[torch.Tensor | None, ...]]:
        """``(mu_w, var_w, mu_b, var_b)`` of each `Linear`, as pytagi has them: the tensors themselves.

        They are buffers, without gradients, of which an optimizer of torch can make nothing.
        """
        linears = [layer for layer in self.leaves() if isinstance(layer, Linear)]
        return [tuple(getattr(layer, name) for name in Linear.NAMES) for layer in linears]

    @property
    def device(self) -> torch.device:
        return self.flat_deltas().device

    def flat_deltas(self, more: int = 0) -> torch.Tensor:
        """The one flat tensor that all layers' deltas are views of, and behind them so many more elements.

        It is made anew where the layers are others or hold other tensors than its views, as after a cast, with the numbers that
        they hold.

        Raises
        ------
        ValueError
            If not all layers are of one dtype and on one device.
        """
        self._leaves = list(self.leaves())
        self._linears = [layer for layer in self._leaves if isinstance(layer, Linear)]
        owners = [
            (layer._buffers, name) for layer in self._linears for name in _DELTAS if layer._buffers[name] is not None
        ]
        deltas = [buffers[name] for buffers, name in owners]
        sizes = [delta.numel() for delta in deltas]
        size = sum(sizes) + more
        is_flat = len(deltas) == len(self._views) and all(map(is_, deltas, self._views))
        if self.flat is None or self.flat.numel() < size or not is_flat:
            kinds = {f"{layer.mu_w.dtype} on {layer.mu_w.device}" for layer in self._linears}
            if len(kinds) > 1:
                raise ValueError(f"tagi.Sequential: all layers must be alike, not of {' and '.join(sorted(kinds))}")
            self.flat = (deltas[0] if deltas else torch.empty(0)).new_zeros(size)
            parts = self.flat[: sum(sizes)].split(sizes)
            self._views = [part.view(d.shape).copy_(d) for part, d in zip(parts, deltas, strict=True)]
            for (buffers, name), view in zip(owners, self._views, strict=True):
                buffers[name] = view
        return self.flat[:size]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "flat": None, "_views": []}

    @torch.no_grad()
    def forward(self, mu_x: Any, var_x: Any = None) -> tuple[Any, Any]:
        """Means and variances of the output.

        Parameters
        ----------
        mu_x, var_x : array
            Means and variances of the input, of shape (B, features), or flat as in pytagi; any float dtype and strides,
            NumPy's or torch's. None is no variance. Backward reads the means again, where they are not copied.

        Returns
        -------
        tuple of array
            Of shape (B, features) and the model's dtype, NumPy's if `mu_x` is.
        """
        like = self.flat_deltas()
        mu = self._rows("mu_x", mu_x, like)
        var = None if var_x is None else self._rows("var_x", var_x, like)
        if var is not None and var.shape != mu.shape:
            raise ValueError(
                f"tagi.Sequential: var_x of shape {tuple(var.shape)} does not fit mu_x of {tuple(mu.shape)}"
            )
        states = HiddenStates(mu, var)
        for layer in self._leaves:
            states = layer(states)
        mean = mu if states.mu_a is None else states.mu_a
        variance = torch.zeros_like(mean) if states.var_a is None else states.var_a
        output, deltas = self.output_z_buffer, self.input_delta_z_buffer
        output.mu_a, output.var_a, output.jcb = mean, variance, states.jcb
        deltas.delta_mu = deltas.delta_var = None
        found = mean.clone(), variance.clone()  # the caller's own
        return found if isinstance(mu_x, torch.Tensor) else (array_of(found[0]), array_of(found[1]))

    def _rows(self, name: str, array: Any, like: torch.Tensor) -> torch.Tensor:
        tensor, linears = tensor_of(array, like), self._linears
        width = linears[0].in_features if linears else None
        if tensor.dim() == 1 and width is not None and tensor.numel() % width == 0:
            tensor = tensor.view(-1, width)
        if tensor.dim() != 2 or (width is not None and tensor.shape[1] != width):
            raise ValueError(
                f"tagi.Sequential: {name} must be of shape (B, {width or 'features'}), not {tuple(tensor.shape)}"
            )
        return tensor

    def backward(self) -> None:
        """Find what the observations change in every weight: the deltas.

        Raises
        ------
        RuntimeError
            Unless a forward in training mode and an update of the output came before.
        ValueError
            If the output's mean or its deltas are not finite; on CPUs alone, as a GPU's host would have to wait for it.
        """
        self.find_deltas()

    @torch.no_grad()
    def find_deltas(self, factor: float = 1.0) -> None:
        """`backward`, of deltas that are multiplied by a factor."""
        given, leaves = self.input_delta_z_buffer, self._leaves
        if given.delta_mu is None or given.delta_var is None:
            raise RuntimeError("tagi: backward needs a forward and then an update of the output before it")
        linears = [n for n, layer in enumerate(leaves) if isinstance(layer, Linear)]
        if any(leaves[n]._saved is None for n in linears):
            raise RuntimeError("tagi: backward needs a forward in training mode before it; call train()")
        told = given.delta_mu, given.delta_var, self.output_z_buffer.mu_a
        if given.delta_mu.device.type == "cpu" and not all(bool(t.isfinite().all()) for t in told if t is not None):
            raise ValueError(
                "tagi: the output or its deltas are not finite: x or y has infinities, or x or var_obs NaN"
            )
        self.batch_size = given.delta_mu.shape[0]
        deltas = DeltaStates(given.delta_mu * factor, given.delta_var * factor)
        given.delta_mu = given.delta_var = None
        for n in range(len(leaves) - 1, linears[0] - 1 if linears else -1, -1):
            deltas = leaves[n].backward(deltas, wants_input=bool(linears) and n > linears[0])
        self._is_fresh = True

    @torch.no_grad()
    def step(self) -> None:
        """Update all weights by the deltas of the last backward.

        Raises
        ------
        RuntimeError
            If there was none since the last step.
        """
        if not self._is_fresh:
            raise RuntimeError("tagi: step needs a backward before it; the deltas of the last have been used")
        self._is_fresh = False
        for layer in self._linears:
            layer.step(cap_of(self.batch_size))


def _check_features(layers: list[Layer]) -> None:
    before: Linear | None = None
    for number, layer in enumerate(layers):
        if isinstance(layer, Linear):
            if before is not None and layer.in_features != before.out_features:
                raise ValueError(
                    f"tagi.Sequential: layer {number}, {layer}, takes {layer.in_features} features, and {before} before it gives "
                    f"{before.out_features}"
                )
            before = layer
        elif not isinstance(layer, Activation):
            before = None  # one of the user's


_DELTAS = [f"delta_{name}" for name in Linear.NAMES]
