"""JAX on four devices of one CPU: ``python docs/compared/jax_sharding.py``."""

from __future__ import annotations

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as S

jax.config.update("jax_enable_x64", True)
MESH = jax.make_mesh((4,), ("r",), axis_types=(jax.sharding.AxisType.Auto,))


def _conv(padding, stride=1, width=3, **options):
    def conv(x):
        w = jnp.sin(jnp.arange(3.0 * 2 * width).reshape(3, 2, width))
        return jax.lax.conv_general_dilated(x, w, (stride,), padding, **options)

    return conv


def _pool(x):
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 3), (1, 1, 2), ((0, 0), (0, 0), (1, 1)))


def _dropout(x):
    return x * jax.random.bernoulli(jax.random.key(0), 0.5, x.shape)


CASES = [
    ("conv 3, padding 1, 16 over 4", _conv([(1, 1)]), 16),
    ("conv 3, padding 1, 7 over 4", _conv([(1, 1)]), 7),
    ("conv 3, stride 2, padding 1, 12 over 4", _conv([(1, 1)], 2), 12),
    ("conv 3, dilation 2, padding 2", _conv([(2, 2)], rhs_dilation=(2,)), 16),
    ("conv 4 (even), padding (1, 2)", _conv([(1, 2)], width=4), 16),
    ("conv 7, padding 3, blocks of 2", _conv([(3, 3)], width=7), 8),
    ("conv transpose, stride 2, output_padding 1", _conv([(1, 2)], lhs_dilation=(2,)), 16),
    ("max pool 3, stride 2, padding 1", _pool, 16),
    ("bilinear x 2", lambda x: jax.image.resize(x, (2, 2, 32), "linear"), 16),
    ("batch norm", lambda x: (x - x.mean((0, 2), keepdims=True)) / x.std((0, 2), keepdims=True), 16),
    ("fft along the cut dim", lambda x: abs(jnp.fft.fft(x)), 16),
    ("softmax along the cut dim", lambda x: jax.nn.softmax(x), 16),
    ("circular pad 2", lambda x: jnp.pad(x, ((0, 0), (0, 0), (2, 2)), mode="wrap"), 16),
    ("roll along the cut dim", lambda x: jnp.roll(x, 1, -1), 16),
    ("cumsum along the cut dim", lambda x: jnp.cumsum(x, -1), 16),
    ("sort along the cut dim", lambda x: jnp.sort(x, -1), 16),
    ("argmax along the cut dim", lambda x: x * 0 + jnp.argmax(x, -1, keepdims=True), 16),
    ("slices: x[..., 1:] - x[..., :-1]", lambda x: x[..., 1:] - x[..., :-1], 16),
    ("index by a list along the cut dim", lambda x: x[..., jnp.array([5, 0, 2])], 16),
    ("dropout, the same key", _dropout, 16),
    ("mean of squares", lambda x: (x * x).mean(), 16),
]


def run(function, length: int, is_cut: bool):
    x = np.random.default_rng(0).normal(size=(2, 2, length))
    x = jax.device_put(x, NamedSharding(MESH, S(None, None, "r"))) if is_cut else jnp.array(x)
    loss = jax.jit(
        jax.grad(lambda x: (function(x) * jnp.cos(jnp.arange(function(x).size).reshape(function(x).shape))).sum())
    )
    forward = jax.jit(function)
    text = forward.lower(x).compile().as_text() if is_cut else ""
    return np.array(forward(x)), np.array(loss(x)), "all-gather" in text


def verdict(function, length: int) -> str:
    try:
        y, dx, gathers = run(function, length, True)
    except Exception as error:
        return f"error: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    worst = max(
        abs(a - b).max() / max(abs(b).max(), 1e-3) for a, b in zip((y, dx), run(function, length, False), strict=False)
    )
    return ("exact" if worst < 1e-9 else f"WRONG by {100 * worst:.2g}%") + (", gathers" if gathers else "")


if __name__ == "__main__":
    print(f"jax {jax.__version__}")
    for name, function, length in CASES:
        print(f"{name}: {verdict(function, length)}", flush=True)
