"""Regression with error bars by TAGI, on several ranks and beside one process: a curve, and scikit-learn's diabetes data.

    mpirun -n 2 python docs/examples/tagi_regression.py --out band.png

Weights are Gaussians, so a prediction has a variance: that of the network, which grows where there were no data, and that of
the observations, which is given. There is no gradient and no learning rate. Each rank gives its rows of every batch; with
``average=False`` the deltas of all ranks are added up, and the weights are those of one process on whole batches.
"""

from __future__ import annotations

import argparse
import itertools
import math
from typing import Any, NamedTuple

import sklearn.datasets
import torch
from matplotlib.figure import Figure

import distdl_lite as dl
from distdl_lite import tagi
from distdl_lite.data import permutation

Pair = tuple[torch.Tensor, torch.Tensor]


class Problem(NamedTuple):
    """Rows to train with and to test with, standardised by those to train with; `unit` is a standard deviation of y."""

    name: str
    train: Pair
    test: Pair
    hidden: int  # units of each of two layers
    epochs: int
    sigma: float  # of the observations' noise, standardised
    unit: float
    centre: tuple[float, float, float] = (0.0, 1.0, 0.0)  # of x: mean and deviation; of y: mean


def function(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(1.5 * x) + 0.4 * x


def curve(seed: int) -> Problem:
    """Noisy values of a function between -3 and 3."""
    generator = torch.Generator().manual_seed(seed)
    x = 6 * torch.rand(400, 1, generator=generator, dtype=torch.float64) - 3
    y = function(x) + 0.2 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return standardised("curve", x, y, train=200, hidden=64, epochs=50, noise=0.2)


def diabetes(seed: int) -> Problem:
    """How the illness of 442 patients has progressed after a year, from 10 measurements."""
    x, y = map(torch.tensor, sklearn.datasets.load_diabetes(return_X_y=True))
    order = permutation(len(x), seed)
    return standardised("diabetes", x[order], y[order, None], train=353, hidden=32, epochs=5, noise=52.0)


def standardised(
    name: str, x: torch.Tensor, y: torch.Tensor, train: int, hidden: int, epochs: int, noise: float
) -> Problem:
    (x_mean, x_unit), (y_mean, y_unit) = ((t[:train].mean(0), t[:train].std(0)) for t in (x, y))
    x, y = (x - x_mean) / x_unit, (y - y_mean) / y_unit
    unit = y_unit.item()
    centre = (x_mean[0].item(), x_unit[0].item(), y_mean.item())
    return Problem(name, (x[:train], y[:train]), (x[train:], y[train:]), hidden, epochs, noise / unit, unit, centre)


def network(problem: Problem, seed: int) -> tagi.Sequential:
    """In float64, so that ranks and one process can be compared."""
    torch.manual_seed(seed)
    sizes = (problem.train[0].shape[1], problem.hidden, problem.hidden)
    layers = [part for a, b in itertools.pairwise(sizes) for part in (tagi.Linear(a, b), tagi.ReLU())]
    return tagi.Sequential(*layers, tagi.Linear(sizes[-1], 1)).double()


def train(net: Any, problem: Problem, P: dl.Partition, options: argparse.Namespace) -> None:
    """A loop as for pytagi; of each batch this rank takes its rows."""
    updater, (x, y) = tagi.OutputUpdater(), problem.train
    for epoch in range(options.epochs or problem.epochs):
        for batch in permutation(len(x), options.seed, epoch).split(options.batch):
            mine = batch.tensor_split(P.size)[P.rank]
            net(x[mine])
            updater.update(
                output_states=net.output_z_buffer,
                mu_obs=y[mine],
                var_obs=problem.sigma**2,
                delta_states=net.input_delta_z_buffer,
            )
            net.backward()
            net.step()


def scores(net: Any, problem: Problem) -> tuple[float, float]:
    """On the test data, in the units of y: the root mean square error, and the mean log-likelihood."""
    x, y = problem.test
    mean, variance = net(x)
    total = variance + problem.sigma**2
    errors = (y - mean).square()
    likelihood = -(errors / total + torch.log(2 * math.pi * total)) / 2
    return errors.mean().sqrt().item() * problem.unit, likelihood.mean().item() - math.log(problem.unit)


def run(world: dl.Partition, options: argparse.Namespace) -> dict[str, tuple[float, float, float]]:
    """Train on all ranks, and then on rank 0 alone; for each problem both scores, and the largest difference of weights."""
    found, nets = {}, []
    for problem in (curve(options.seed), diabetes(options.seed)):
        net = tagi.DDPSequential(network(problem, options.seed), tagi.DDPConfig(P=world), average=False)
        train(net, problem, world, options)
        nets.append((problem, net))
        if world.rank == 0:
            serial = network(problem, options.seed)
            train(serial, problem, world.create_partition_inclusive([0]), options)
            pairs = zip(net.model.buffers(), serial.buffers(), strict=True)
            rmse, likelihood = scores(net, problem)
            found[problem.name] = rmse, likelihood, max((a - b).abs().max().item() for a, b in pairs)
            print(
                f"{problem.name} on {world.size} ranks: test RMSE {rmse:.4g}, log-likelihood {likelihood:.4f}; "
                f"largest difference to one process {found[problem.name][2]:.1e}"
            )
    if world.rank == 0 and options.out:
        draw(options.out, nets)
    return found


def draw(path: str, nets: list[tuple[Problem, Any]]) -> None:
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_curve(left, *nets[0])
    draw_diabetes(right, *nets[1])
    figure.savefig(path, dpi=100)


def draw_curve(axis: Any, problem: Problem, net: Any) -> None:
    """The function, the data, and what the network makes of them."""
    x_mean, x_unit, y_mean = problem.centre
    x = torch.linspace(-5, 5, 300, dtype=torch.float64)[:, None]
    mean, variance = (t[:, 0] for t in net((x - x_mean) / x_unit))
    mean = mean * problem.unit + y_mean
    shown = x[:, 0]
    for noise, label, shade in ((0.0, "mean ± 2 deviations", 0.4), (problem.sigma**2, "noise included", 0.2)):
        width = 2 * problem.unit * (variance + noise).sqrt()
        axis.fill_between(shown, mean - width, mean + width, color="tab:blue", alpha=shade, linewidth=0, label=label)
    axis.plot(shown, function(shown), color="black", linestyle="--", linewidth=1, label="function")
    axis.plot(shown, mean, color="tab:blue", label="mean")
    data = problem.train[0] * x_unit + x_mean, problem.train[1] * problem.unit + y_mean
    axis.plot(*data, ".", color="tab:red", markersize=3, label="training data")
    axis.set(title="A curve, and what lies beyond its data", xlabel="x", ylabel="y", xlim=(-5, 5), ylim=(-6, 6))
    axis.legend(fontsize=8, loc="upper left")


def draw_diabetes(axis: Any, problem: Problem, net: Any) -> None:
    """Predictions for the patients kept for the test, beside what happened."""
    mean, variance = (t[:, 0] for t in net(problem.test[0]))
    deviation = problem.unit * (variance + problem.sigma**2).sqrt()
    mean, truth = (t * problem.unit + problem.centre[2] for t in (mean, problem.test[1][:, 0]))
    axis.errorbar(truth, mean, deviation, fmt=".", color="tab:blue", ecolor="lightsteelblue", label="mean ± deviation")
    ends = truth.min(), truth.max()
    axis.plot(ends, ends, color="black", linestyle="--", linewidth=1, label="truth")
    axis.set(title="Diabetes: patients of the test", xlabel="observed progression", ylabel="predicted progression")
    axis.legend(fontsize=8, loc="upper left")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, help="50 for the curve, 5 for the patients")
    parser.add_argument("--batch", type=int, default=10, help="rows of all ranks together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="the picture to write")
    return parser.parse_args(arguments)


def main() -> None:
    dl.abort_on_exception()
    torch.set_num_threads(1)
    options = parse()
    run(dl.Partition.world(), options)


if __name__ == "__main__":
    main()
