"""A step of a cut convolution with JAX on two devices of a host: python jax_before.py"""

# launch
import os

os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=2"
)
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import (
    PartitionSpec as Spec,
)

mesh = jax.make_mesh((2,), ("h",))
cut = jax.NamedSharding(
    mesh, Spec(None, None, "h", None)
)
everywhere = jax.NamedSharding(mesh, Spec())

# data
rng = np.random.default_rng(1)
x = rng.standard_normal((2, 1, 10, 6))
x = jax.device_put(
    jnp.asarray(x, jnp.float32), cut
)

# model
weight = jnp.full((1, 1, 3, 3), 0.1)
weight = jax.device_put(weight, everywhere)


def net(weight, x):
    return jnp.tanh(
        jax.lax.conv(
            x, weight, (1, 1), "SAME"
        )
    )


# step
def measure(weight, x):
    return jnp.mean(
        (net(weight, x) - x) ** 2
    )


@jax.jit
def step(weight, x):
    loss, slope = jax.value_and_grad(
        measure
    )(weight, x)
    return weight - 0.5 * slope, loss


for _ in range(20):
    weight, loss = step(weight, x)

# evaluate
print(f"mean {measure(weight, x):.5f}")


# own
def means(
    block,
):  # of a block: a sum over devices
    return (
        jax.lax.psum(block.sum((2, 3)), "h")
        / 60
    )


spec = Spec(None, None, "h", None)
means = jax.shard_map(
    means,
    mesh=mesh,
    in_specs=spec,
    out_specs=Spec(),
)
print(f"{means(x)[0, 0]:.5f}")

# end
