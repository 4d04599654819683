"""
Regression with error bands
===========================

The weights of these networks are Gaussians, so that a prediction is a mean and a variance; there is no gradient and no learning
rate. Four ranks share each batch, and have the weights of one process.
"""

import math
from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import sklearn.datasets
import torch

import distdl_lite as dl
from distdl_lite import tagi
from distdl_lite.data import permutation
from distdl_lite.testing import launch

# %%
# There are two problems: 200 noisy values of a function between -3 and 3; and how the illness of 442 patients has progressed
# after a year, from ten measurements, where a fifth of the patients is kept for the test. The rows to train with have mean 0 and
# deviation 1.


def function(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(1.5 * x) + 0.4 * x


def problem(x: torch.Tensor, y: torch.Tensor, train: int, noise: float, hidden: int) -> SimpleNamespace:
    """Standardised rows, the first `train` of them to train with; `noise` is the deviation of an observation."""
    (x_mean, x_unit), (y_mean, y_unit) = ((t[:train].mean(0), t[:train].std(0)) for t in (x, y))
    x, y = (x - x_mean) / x_unit, (y - y_mean) / y_unit
    return SimpleNamespace(**locals())


chance = torch.Generator().manual_seed(0)
x = 6 * torch.rand(200, 1, generator=chance, dtype=torch.float64) - 3
y = function(x) + 0.2 * torch.randn(x.shape, generator=chance, dtype=torch.float64)
curve = problem(x, y, train=200, noise=0.2, hidden=64)

x, y = map(torch.from_numpy, sklearn.datasets.load_diabetes(return_X_y=True))
order = permutation(len(x))
diabetes = problem(x[order], y[order, None], train=353, noise=52.0, hidden=32)

# %%
# The loop is that of one process. ``DDPSequential`` adds up what the observations of all ranks change; ``average=False``, as each
# observation counts once, on however many ranks.


def network(data: SimpleNamespace) -> tagi.Sequential:
    torch.manual_seed(0)
    first, middle = tagi.Linear(data.x.shape[1], data.hidden), tagi.Linear(data.hidden, data.hidden)
    layers = [first, tagi.ReLU(), middle, tagi.ReLU(), tagi.Linear(data.hidden, 1)]
    return tagi.Sequential(*layers).double()  # so that ranks and one process can be compared


def train(net: Any, data: SimpleNamespace, P: dl.Partition, epochs: int) -> None:
    updater = tagi.OutputUpdater()
    for epoch in range(epochs):
        for batch in permutation(data.train, epoch=epoch).split(10):
            mine = batch.tensor_split(P.size)[P.rank]  # two or three rows
            net(data.x[mine])
            updater.update(net.output_z_buffer, data.y[mine], (data.noise / data.y_unit) ** 2, net.input_delta_z_buffer)
            net.backward()
            net.step()


def body(world: dl.Partition, steps: int = 30) -> list[tuple[tagi.Sequential, tagi.Sequential]]:
    """The networks of both problems, each trained on all ranks and on rank 0 alone."""
    found = []
    for data, epochs in ((curve, steps), (diabetes, 5)):
        net, serial = tagi.DDPSequential(network(data), tagi.DDPConfig(P=world), average=False), network(data)
        train(net, data, world, epochs)
        if world.rank == 0:
            train(serial, data, world.create_partition_inclusive([0]), epochs)
        found.append((net.model, serial))
    return found


nets = launch(4, body)

# %%
# The difference is that of all means and variances of the weights. The errors are those of the function itself, between -3 and 3,
# and of patients that the network has not seen.


def predicted(net: tagi.Sequential, data: SimpleNamespace, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean and the variance of predictions for standardised x, in the units of y."""
    mean, variance = (t.detach()[:, 0] for t in net(x))
    return mean * data.y_unit + data.y_mean, variance * data.y_unit**2


pairs = [pair for net, serial in nets for pair in zip(net.buffers(), serial.buffers(), strict=True)]
difference, TOLERANCE = max((a - b).abs().max().item() for a, b in pairs), 1e-10  # in float64
print(f"largest difference of the weights to one process: {difference:.1e}")

at = torch.linspace(-5, 5, 301, dtype=torch.float64)
middle, spread = predicted(nets[0][0], curve, (at[:, None] - curve.x_mean) / curve.x_unit)
rmse_curve = (middle - function(at))[at.abs() <= 3].square().mean().sqrt().item()
mean, variance = predicted(nets[1][0], diabetes, diabetes.x[diabetes.train :])
truth, total = diabetes.y[diabetes.train :, 0] * diabetes.y_unit + diabetes.y_mean, variance + diabetes.noise**2
rmse_patients = (mean - truth).square().mean().sqrt().item()
likelihood = -((mean - truth).square() / total + (2 * math.pi * total).log()).mean().item() / 2
print(f"curve: root mean square error {rmse_curve:.3f}")
print(f"patients: root mean square error {rmse_patients:.1f}, log-likelihood {likelihood:.3f} each")

# %%
# The band grows where there were no data, and is too narrow there all the same: training for many epochs counts each observation
# many times.

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), width_ratios=[1.5, 1], layout="constrained")
for noise, label, shade in ((0.0, "mean ± 2 deviations", 0.4), (curve.noise, "with noise of observations", 0.2)):
    width = 2 * (spread + noise**2).sqrt()
    band = at.numpy(), (middle - width).numpy(), (middle + width).numpy()
    left.fill_between(*band, color="C0", alpha=shade, linewidth=0, label=label)
left.plot(at.numpy(), middle.numpy(), color="C0")
left.plot(at.numpy(), function(at).numpy(), color="black", linestyle="--", linewidth=1, label="function")
seen = curve.x * curve.x_unit + curve.x_mean, curve.y * curve.y_unit + curve.y_mean
left.plot(*(t.numpy() for t in seen), ".", color="C3", markersize=4, label="observations")
left.set(
    title=f"four ranks: difference to one process {difference:.0e}", xlabel="x", ylabel="y", xlim=(-5, 5), ylim=(-6, 6)
)
left.legend(loc="upper left", fontsize=8)
right.errorbar(truth.numpy(), mean.numpy(), total.sqrt().numpy(), fmt=".", ecolor="lightsteelblue")
right.axline((150, 150), slope=1, color="black", linestyle="--", linewidth=1)
right.set(title="patients of the test: mean ± deviation", xlabel="observed progression", ylabel="predicted progression")
figure.savefig("tagi_bands.png")
