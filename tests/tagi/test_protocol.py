"""Models of other libraries, here in NumPy alone."""

from __future__ import annotations

import copy
from typing import Any

import numpy
import pytest
from gaussians import difference, linears, network, refusals, tagi
from ranks import on_ranks

import distdl_lite as dl


class Stage:
    """A linear layer, whose arrays are another library's."""

    def __init__(self, arrays: dict[str, Any]) -> None:
        self.__dict__.update(arrays)
        self.delta_mu_w = self.delta_var_w = numpy.zeros_like(self.mu_w)
        self.delta_mu_b = self.delta_var_b = numpy.zeros_like(self.mu_b)
        self.mu_of_something_else = "no Gaussian"


class Block:
    def __init__(self, *layers: Any) -> None:
        self.layers = list(layers)


class Foreign:
    """Linear - ReLU - Linear after the equations of the papers, with layers inside a container."""

    def __init__(self, like: Any, has_size: bool = True) -> None:
        stages = [Stage({n: getattr(layer, n).numpy().copy() for n in layer.NAMES}) for layer in linears(like)]
        self.layers = [stages[0], Block(object(), stages[1])]
        self.stages, self.is_training = stages, True
        if has_size:
            self.batch_size = 0

    def forward(self, mu_x: Any, var_x: Any = None) -> tuple[Any, Any]:
        one, two = self.stages
        z, var_z = mu_x @ one.mu_w.T + one.mu_b, mu_x**2 @ one.var_w.T + one.var_b
        self.x, self.J = mu_x, (z > 0).astype(z.dtype)
        self.a, var_a = self.J * z, self.J * var_z
        self.mean = self.a @ two.mu_w.T + two.mu_b
        self.variance = var_a @ (two.mu_w**2 + two.var_w).T + self.a**2 @ two.var_w.T + two.var_b
        return self.mean, self.variance

    def update(self, y: Any, var_obs: float) -> None:
        self.d_mu, self.d_var = (y - self.mean) / (self.variance + var_obs), -1 / (self.variance + var_obs)

    def backward(self) -> None:
        one, two = self.stages
        mu, var = self.d_mu, self.d_var
        hidden = self.J * (mu @ two.mu_w), self.J * (var @ two.mu_w**2)
        for stage, a, d_mu, d_var in ((two, self.a, mu, var), (one, self.x, *hidden)):
            stage.delta_mu_w, stage.delta_var_w = stage.var_w * (d_mu.T @ a), stage.var_w**2 * (d_var.T @ a**2)
            stage.delta_mu_b, stage.delta_var_b = stage.var_b * d_mu.sum(0), stage.var_b**2 * d_var.sum(0)

    def step(self) -> None:
        cap = tagi.sequential.cap_of(getattr(self, "batch_size", len(self.x)))
        for stage in self.stages:
            for kind in "wb":
                mu, var = getattr(stage, f"mu_{kind}"), getattr(stage, f"var_{kind}")
                c = numpy.sqrt(var) / cap
                mu += numpy.clip(getattr(stage, f"delta_mu_{kind}"), -c, c)
                var += numpy.clip(getattr(stage, f"delta_var_{kind}"), -c, c)
                var[var <= 0] = 1e-5

    def train(self) -> None:
        self.is_training = True

    def eval(self) -> None:
        self.is_training = False

    def arrays(self) -> list[Any]:
        return [getattr(stage, name) for stage in self.stages for name in tagi.Linear.NAMES]


@on_ranks(3, mpi=True)
def test_a_model_of_numpy_trains_as_ours(world: dl.Partition) -> None:
    config = tagi.DDPConfig(P=world)
    rows = [2, 0, 3][world.rank]
    mine = slice([0, 2, 2][world.rank], [2, 2, 5][world.rank])
    for average in (False, True):
        with dl.count() as building:
            ours = tagi.DDPSequential(network(3, 6, 2).double(), config, average)
            theirs = tagi.DDPSequential(Foreign(network(3, 6, 2, seed=world.rank).double()), config, average)
        assert building.messages == 2
        generator = numpy.random.default_rng(0)
        for _ in range(30):
            x, y = generator.normal(size=(5, 3)), generator.normal(size=(5, 2))
            assert difference(theirs(x[mine]), ours(x[mine])) < 1e-9
            tagi.OutputUpdater().update(ours.output_z_buffer, y[mine], 0.1, ours.input_delta_z_buffer)
            theirs.model.update(y[mine], 0.1)
            with dl.count() as counted:
                ours.backward()
                theirs.backward()
            assert counted.messages == 2
            assert theirs.model.batch_size == (3 if average else 5)
            ours.step()
            theirs.step()
        assert difference(theirs.model.arrays(), [t for four in ours.parameters() for t in four]) < 1e-9
        told = world.allgather_data([array.tolist() for array in theirs.model.arrays()])
        assert told[0] == told[world.rank]
        assert len(theirs.get_outputs()[0]) == rows
    theirs.eval()
    assert not theirs.model.is_training
    theirs.train()
    assert theirs.model.is_training
    theirs.barrier()
    theirs.output_to_host()
    assert theirs.get_device_with_index() == "cpu"
    with pytest.raises(RuntimeError, match="step needs a backward"):
        theirs.step()


@on_ranks(2, mpi=True)
def test_copies_train_on(world: dl.Partition) -> None:
    net = tagi.DDPSequential(Foreign(network(3, 6, 2)), tagi.DDPConfig(P=world), average=False)
    other = copy.deepcopy(net)
    for each in (net, other):
        each(numpy.ones((2, 3), "f4"))
        each.model.update(numpy.ones((2, 2), "f4"), 0.1)
        each.backward()
        assert each.model.batch_size == 4
        each.step()
    assert difference(net.model.arrays(), other.model.arrays()) == 0


@on_ranks(3, mpi=True)
def test_what_one_model_alone_does_is_refused_on_all_ranks(world: dl.Partition) -> None:
    config, model, odd = tagi.DDPConfig(P=world), Foreign(network(3, 6, 2)), world.rank == 1
    text = refusals(world, ValueError, lambda: tagi.DDPSequential(network(3, 6, 2) if odd else model, config))
    assert "rank 1: DDPSequential's model ours, others of another library" in text
    other = copy.deepcopy(model)
    other.layers[1].layers[0] = "no layer" if odd else object()
    assert "rank 1: DDPSequential's layer 1.0 str, others object" in refusals(
        world, ValueError, lambda: tagi.DDPSequential(other, config)
    )
    model.stages[1].mu_w = model.stages[1].mu_w[:: -1 if odd else 1]
    assert "stride" in refusals(world, ValueError, lambda: tagi.DDPSequential(model, config))
    for change, kind, text in [
        (
            lambda layer: setattr(layer, "delta_mu_b", layer.delta_mu_b[:1]),
            ValueError,
            "1.1.mu_b is of shape (1,), not",
        ),
        (
            lambda layer: setattr(layer, "delta_mu_b", layer.delta_mu_b.astype("f8")),
            RuntimeError,
            "rank 1: DDPSequential's delta 4 (2,) of float64 on cpu, others (2,) of float32 on cpu",
        ),
        (lambda layer: delattr(layer, "delta_mu_b"), RuntimeError, "rank 1: DDPSequential's delta 4 (2, 6) of float32"),
        (lambda layer: layer.lacks, AttributeError, "DDPSequential: rank 1: 'Stage' object has no attribute 'lacks'"),
    ]:
        net = tagi.DDPSequential(Foreign(network(3, 6, 2)), config)
        net.model.backward = lambda net=net, change=change: change(net.model.stages[1]) if odd else None
        net(numpy.ones((2, 3), "f4"))
        assert text in refusals(world, kind, net.backward)


@on_ranks(2, mpi=True)
def test_what_the_protocol_asks_for(world: dl.Partition) -> None:
    config, model = tagi.DDPConfig(P=world), Foreign(network(3, 6, 2), has_size=False)
    net = tagi.DDPSequential(copy.deepcopy(model), config)
    with pytest.raises(RuntimeError, match="backward needs a forward before it"):
        net.backward()
    net(numpy.ones((2, 3), "f4"))
    with pytest.raises(AttributeError, match="d_mu"):  # on all ranks by itself
        net.backward()
    net(numpy.ones((2, 3), "f4"))
    net.model.update(numpy.ones((2, 2), "f4"), 0.1)
    net.backward()
    net.step()
    assert not hasattr(net.model, "batch_size")
    short = copy.deepcopy(model)
    short.stages[0].delta_mu_w = numpy.zeros(3)
    with pytest.raises(ValueError, match=r"the delta of 0\.mu_w is of shape \(3,\), not \(6, 3\)"):
        tagi.DDPSequential(short, config)
    if world.rank == 1:
        model.stages[1].mu_w = model.stages[1].mu_w.tolist()
    with pytest.raises(TypeError, match=r"1\.1\.mu_w must be an array of NumPy or a tensor, not list"):
        tagi.DDPSequential(model, config)
