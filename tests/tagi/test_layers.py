"""Layers, updates and steps in one process, beside the equations written out."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from typing import Any

import numpy
import pytest
import torch
from gaussians import difference, linears, network, tagi, teach, weights

ACTIVATIONS = ["ReLU", "MixtureReLU", "Tanh", "Sigmoid"]
Pair = tuple[numpy.ndarray, numpy.ndarray]


def phi(a: float) -> float:
    return float(numpy.exp(-a * a / 2) / numpy.sqrt(2 * numpy.pi))


def activated(kind: str, mu: float, var: float) -> tuple[float, float, float]:
    """Mean, variance and J of one unit."""
    if kind == "ReLU":
        return max(mu, 0.0), var if mu > 0 else 0.0, float(mu > 0)
    if kind == "MixtureReLU":
        s = var**0.5
        Phi = float(torch.special.ndtr(torch.tensor(mu / s, dtype=torch.float64)))
        mean = mu * Phi + s * phi(mu / s)
        variance = -(mean**2) + 2 * mean * mu - mu * s * phi(mu / s) + (var - mu**2) * Phi
        return max(mean, 1e-6), max(variance, 1e-6), Phi
    f = numpy.tanh(mu) if kind == "Tanh" else 1 / (1 + numpy.exp(-mu))
    slope = 1 - f * f if kind == "Tanh" else f * (1 - f)
    return f, slope**2 * var, slope


def by_hand(net: Any, x: Any, var_x: Any, y: Any, var_obs: float, cap: float) -> tuple[list[Any], list[Any], Any]:
    """Deltas, weights after the step, and the output, from loops over the equations of the papers."""
    mu, var = x, numpy.zeros_like(x) if var_x is None else var_x
    J, trail = numpy.ones_like(x), []
    for layer in net.leaves():
        if isinstance(layer, tagi.Linear):
            Mw, Vw = layer.mu_w.numpy(), layer.var_w.numpy()
            mb, vb = (0.0, 0.0) if layer.mu_b is None else (layer.mu_b.numpy(), layer.var_b.numpy())
            trail.append((layer, mu, J))
            mu, var, J = mu @ Mw.T + mb, var @ (Mw**2 + Vw).T + mu**2 @ Vw.T + vb, None
        else:
            kind = type(layer).__name__
            both = numpy.array(
                [[activated(kind, m, v) for m, v in zip(*row, strict=True)] for row in zip(mu, var, strict=True)]
            )
            mu, var, slope = both.reshape(*mu.shape, 3).transpose(2, 0, 1)
            J = slope if J is None else J * slope
    output = mu, var
    J = numpy.ones_like(mu) if J is None else J
    seen = ~numpy.isnan(y)
    d_mu = numpy.where(seen, J * (numpy.where(seen, y, 0) - mu) / (var + var_obs), 0)
    d_var = numpy.where(seen, -(J**2) / (var + var_obs), 0)
    deltas, after = [], []
    for layer, a, before in trail[::-1]:
        own = [d_mu.T @ a, d_var.T @ a**2, d_mu.sum(0), d_var.sum(0)]
        Mw = layer.mu_w.numpy()
        d_mu, d_var = d_mu @ Mw, d_var @ Mw**2
        d_mu, d_var = (d_mu * before, d_var * before**2) if before is not None else (d_mu, d_var)
        for kind in ("w", "b")[: 2 if layer.mu_b is not None else 1]:
            m, v = getattr(layer, f"mu_{kind}").numpy(), getattr(layer, f"var_{kind}").numpy()
            one, two = (v * own[0], v**2 * own[1]) if kind == "w" else (v * own[2], v**2 * own[3])
            c = numpy.sqrt(v) / cap
            new = v + numpy.clip(two, -c, c)
            deltas.append((one, two))
            after.append((m + numpy.clip(one, -c, c), numpy.where(new <= 0, 1e-5, new)))
    return deltas, after, output


def in_their_order(net: Any, prefix: str) -> list[Pair]:
    """Pairs of mean and variance, from the last layer to the first."""
    return [
        tuple(getattr(layer, f"{prefix}{name}_{kind}").clone().numpy() for name in ("mu", "var"))
        for layer in linears(net)[::-1]
        for kind in ("w", "b")
        if layer.mu_b is not None or kind == "w"
    ]


def stacks() -> list[list[Any]]:
    L = tagi.Linear
    made = [
        [L(3, 5), getattr(tagi, a)(), L(5, 4), getattr(tagi, b)(), L(4, 2)]
        for a, b in itertools.product(ACTIVATIONS, repeat=2)
    ]
    made += [
        [L(3, 5), getattr(tagi, a)(), L(5, 2), getattr(tagi, a)()] for a in ACTIVATIONS
    ]  # one after the last Linear
    made += [[getattr(tagi, a)(), L(3, 2)] for a in ACTIVATIONS]  # and before the first
    made += [
        [L(3, 2)],
        [L(3, 4), L(4, 2)],  # none between
        [L(3, 4), tagi.Tanh(), tagi.Sigmoid(), L(4, 2), tagi.MixtureReLU(), tagi.Tanh()],  # two in a row
        [L(3, 4, bias=False), tagi.ReLU(), L(4, 2, bias=False)],
        [tagi.Sequential(L(3, 4), tagi.Sequential(tagi.Tanh())), L(4, 2)],
    ]
    return made


@pytest.mark.parametrize(("rows", "cap"), [(1, 0.1), (2, 2.0), (255, 2.0), (256, 3.0), (0, 1.0)])
def test_steps_are_those_of_the_equations(rows: int, cap: float) -> None:
    generator = numpy.random.default_rng(0)
    for number, layers in enumerate(stacks() if rows < 100 else stacks()[::5]):
        net = tagi.Sequential(*layers).double()
        x, y = generator.normal(size=(rows, 3)), generator.normal(size=(rows, 2))
        y[generator.random(y.shape) < 0.2] = numpy.nan
        var_x = generator.random((rows, 3)) if number % 2 or isinstance(layers[0], tagi.MixtureReLU) else None
        deltas, after, output = by_hand(net, x, var_x, y, 0.3, cap)
        found = teach(net, x, y, 0.3, var_x, steps=False)
        assert difference(found, output) < 1e-10
        ours = in_their_order(net, "delta_")
        net.step()
        for a, b in [*zip(ours, deltas, strict=True), *zip(in_their_order(net, ""), after, strict=True)]:
            assert difference(a, b) < 1e-10


@pytest.mark.parametrize("block", [1, 2, 5, 7])
def test_large_layers_step_block_by_block(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    nets = [network(3, 8, 2) for _ in range(2)]
    for net in nets:
        teach(net, torch.ones(4, 3), torch.ones(4, 2), steps=False)
    nets[0].step()
    monkeypatch.setattr(tagi.layers, "BLOCK", block)
    nets[1].step()
    assert all(map(torch.equal, weights(nets[0]), weights(nets[1])))


def test_variances_that_would_vanish() -> None:
    net = tagi.Sequential(tagi.Linear(1, 1)).double()
    net[0].var_w.fill_(1e-12)
    net[0].var_b.fill_(4.0)
    net(torch.ones(1, 1, dtype=torch.float64))
    net.input_delta_z_buffer.delta_mu = torch.full((1, 1), 0.5, dtype=torch.float64)
    net.input_delta_z_buffer.delta_var = torch.full((1, 1), -1e30, dtype=torch.float64)
    before = net[0].mu_b.item()
    net.backward()
    net.step()
    assert net[0].var_w.item() == net[0].var_b.item() == 1e-5  # the cap of one row lets 10 standard deviations through
    assert net[0].mu_b.item() == pytest.approx(before + 2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_moments_of_mixture_relu(dtype: torch.dtype) -> None:
    """Against integrals over the Gaussian, also far out, where the usual formula subtracts large numbers."""
    mu = torch.tensor([-30, -8, -3, -1, -0.1, 0, 0.1, 1, 3, 8, 100, 3e4], dtype=torch.float64).repeat(4)
    var = torch.tensor([1e-4, 0.3, 1, 40], dtype=torch.float64).repeat_interleave(12)
    u = torch.linspace(-12, 12, 24_001, dtype=torch.float64)
    weight = torch.exp(-u * u / 2) * (u[1] - u[0]) / (2 * torch.pi) ** 0.5
    z = mu[:, None] + var.sqrt()[:, None] * u
    a = z.clamp_min(0)
    mean = a @ weight
    centred = a - mean[:, None]
    variance, J = (centred * centred) @ weight, ((z - mu[:, None]) * centred) @ weight / var
    found = tagi.MixtureReLU().moments(mu.to(dtype), var.to(dtype))
    rtol = 1e-5 if dtype is torch.float32 else 1e-6  # the integrals'
    for value, reference in zip(found, (mean.clamp_min(1e-6), variance.clamp_min(1e-6), J), strict=True):
        torch.testing.assert_close(value.double(), reference, rtol=rtol, atol=1e-6)
    at_zero = tagi.MixtureReLU().moments(torch.tensor([-1.0, 0.0, 2.0]), torch.zeros(3))
    assert at_zero[0].tolist() == pytest.approx([1e-6, 1e-6, 2.0])
    assert at_zero[1].tolist() == pytest.approx([1e-6] * 3)


def test_arrays_of_any_kind() -> None:
    net, x = network(3, 4, 2), numpy.random.default_rng(0).normal(size=(6, 3))
    mean, variance = net(x)
    assert isinstance(mean, numpy.ndarray)
    assert mean.dtype == variance.dtype == numpy.float32
    frozen = x.astype("f4")
    frozen.flags.writeable = False
    wide = numpy.zeros((6, 6))
    wide[:, ::2] = x
    for same in (
        x.astype("f4"),
        x.astype(">f8"),
        x.astype(numpy.longdouble),
        numpy.asfortranarray(x),
        x[::-1].copy()[::-1],
        wide[:, ::2],
        frozen,
        x.reshape(-1),
        x.tolist(),
    ):
        assert difference(net(same), (mean, variance)) < 1e-6
    for tensor in (torch.tensor(x), torch.tensor(x).t().contiguous().t(), torch.tensor(x, requires_grad=True)):
        found = net(tensor)
        assert all(isinstance(t, torch.Tensor) and t.dtype is torch.float32 and not t.requires_grad for t in found)
        assert difference(found, (mean, variance)) < 1e-6
    for dtype, tolerance in ((torch.float16, 1e-2), (torch.bfloat16, 1e-1)):
        half = copy.deepcopy(net).to(dtype)
        assert difference(teach(half, x, x[:, :2]), (mean, variance)) < tolerance
        assert half(x)[0].dtype == (numpy.float16 if dtype is torch.float16 else numpy.float32)


def test_outputs_are_the_callers_own() -> None:
    net, other = network(3, 4, 2), network(3, 4, 2)
    x = numpy.ones((2, 3), "f4")
    mean, variance = net(x)
    mean += 5
    variance += 5
    for model in (net, other):
        if model is other:
            model(x)
        tagi.OutputUpdater("cpu").update(model.output_z_buffer, x[:, :2], 0.1, model.input_delta_z_buffer)
        model.backward()
    assert all(map(torch.equal, weights(net, "delta_"), weights(other, "delta_")))


def test_observations_of_any_shape() -> None:
    net, x, y = network(3, 4, 2), torch.randn(5, 3), torch.randn(5, 2)
    noise = torch.full((5, 2), 0.25)
    teach(net, x, y, noise, steps=False)
    expected = weights(net, "delta_")
    for other in (
        0.25,
        numpy.float64(0.25),
        noise.reshape(-1),
        noise.numpy().reshape(-1),
        torch.full((2,), 0.25),
        noise[:1],
    ):
        teach(net, x, y.reshape(-1).double().numpy(), other, steps=False)
        assert all(map(torch.equal, weights(net, "delta_"), expected))


def test_observations_that_are_missing() -> None:
    """They count as rows of the batch, and change nothing else."""
    nan = float("nan")
    net, x = network(3, 4, 2), torch.randn(4, 3)
    before = weights(net)
    teach(net, x, torch.full((4, 2), nan))
    assert all(map(torch.equal, weights(net), before))
    y = torch.randn(4, 2)
    y[1:] = nan
    teach(net, x, y, steps=False)
    some = weights(net, "delta_")
    teach(net, x[:1], y[:1], steps=False)
    assert difference(weights(net, "delta_"), some) < 1e-6


def test_autocast_and_inference_mode_change_nothing() -> None:
    net, x = network(3, 4, 2), torch.randn(5, 3)
    expected = net(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert difference(teach(net, x, x[:, :2], steps=False), expected) == 0
    with torch.inference_mode():
        assert difference(net(x), expected) == 0


def is_flat(net: Any) -> bool:
    flat = net.flat_deltas()
    memory = flat.untyped_storage().data_ptr()
    views = [getattr(layer, f"delta_{name}") for layer in linears(net) for name in layer.NAMES]
    found = [view for view in views if view is not None]
    return sum(v.numel() for v in found) == flat.numel() and all(
        v.untyped_storage().data_ptr() == memory and v.dtype == flat.dtype for v in found
    )


def test_all_deltas_are_views_of_one_tensor() -> None:
    net = tagi.Sequential(network(3, 4, 5), tagi.Sequential(tagi.ReLU(), tagi.Linear(5, 2, bias=False)))
    x, y = torch.randn(6, 3), torch.randn(6, 2)
    teach(net, x, y, steps=False)
    deltas = weights(net, "delta_")
    stream = io.BytesIO()
    torch.save(net, stream)
    stream.seek(0)
    copies = [copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(stream, weights_only=False)]
    for other in [net, *copies, copy.deepcopy(net).double().float()]:
        assert is_flat(other)
        assert all(map(torch.equal, weights(other, "delta_"), deltas))
        other.step()  # that of the backward before the copy
        assert all(map(torch.equal, weights(other), weights(net)))
    assert is_flat(net.double())
    assert net.flat_deltas().dtype is torch.float64
    net.float()[0][0].double()
    with pytest.raises(ValueError, match=r"must be alike, not of torch\.float32 on cpu and torch\.float64 on cpu"):
        teach(net, x, y)
    net.float()
    net.append(tagi.Linear(2, 3))
    teach(net, x, torch.randn(6, 3))
    assert is_flat(net)
    first = net[:1]
    teach(first, x, torch.randn(6, 5))
    assert is_flat(first)
    assert len(pickle.dumps(network(100, 100))) < 6 * 4 * 100 * 100


def test_state_dicts() -> None:
    net, other = network(3, 4, 2), network(3, 4, 2, seed=1)
    state = net.state_dict()
    assert list(state) == [f"{n}.{kind}_{of}" for n in (0, 2) for of in "wb" for kind in ("mu", "var")] or set(
        state
    ) == {f"{n}.{kind}_{of}" for n in (0, 2) for of in "wb" for kind in ("mu", "var")}
    x, y = torch.randn(6, 3), torch.randn(6, 2)
    for assign in (False, True):
        other.load_state_dict({k: v.clone() for k, v in state.items()}, assign=assign)
        assert all(map(torch.equal, weights(net), weights(other)))
    for model in (net, other):
        teach(model, x, y)
    assert all(map(torch.equal, weights(net), weights(other)))
    assert [len(four) for four in net.parameters()] == [4, 4]
    assert net.parameters()[1][2] is net[2].mu_b
    assert not list(net.named_parameters())


def test_training_and_evaluation() -> None:
    net, x, y = network(3, 4, 2), torch.randn(6, 3), torch.randn(6, 2)
    assert not net.eval().training
    with pytest.raises(RuntimeError, match="a forward in training mode"):
        teach(net, x, y)
    teach(net.train(), x, y)
    assert len(net) == 3
    assert isinstance(net[1], tagi.ReLU)
    assert [*net] == net.layers
    assert net.device == torch.device("cpu")
    assert "3, 4, bias=True" in repr(net)


def test_the_order_of_calls() -> None:
    net, x, y = network(3, 4, 2), torch.randn(6, 3), torch.randn(6, 2)
    updater = tagi.OutputUpdater()
    with pytest.raises(RuntimeError, match="needs a forward before it"):
        updater.update(net.output_z_buffer, y, 0.1, net.input_delta_z_buffer)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="backward needs a forward and then an update"):
            net.backward()
        with pytest.raises(RuntimeError, match="step needs a backward before it"):
            net.step()
        net(x)
        with pytest.raises(RuntimeError, match="backward needs a forward and then an update"):
            net.backward()
        teach(net, x, y)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="init_method must be one of He, Xavier, not 'Glorot'"):
        tagi.Linear(3, 4, init_method="Glorot")
    with pytest.raises(ValueError, match="0 and 4 features"):
        tagi.Linear(0, 4)
    with pytest.raises(TypeError, match=r"layers of dl\.tagi are needed, not ReLU\(\)"):
        tagi.Sequential(torch.nn.ReLU())
    for wrong, text in [
        (
            [tagi.Linear(3, 4), tagi.Linear(5, 1)],
            r"layer 1, Linear\(5, 1, bias=True\), takes 5 features, and .* gives 4",
        ),
        ([network(3, 4), tagi.ReLU(), network(5, 1)], r"layer 2, .* takes 5 features, and Linear\(3, 4, .* gives 4"),
    ]:
        with pytest.raises(ValueError, match=text):
            tagi.Sequential(*wrong)
        with pytest.raises(TypeError, match=r"unpack the list: Sequential\(\*layers\)"):
            tagi.Sequential(wrong)
    shared = tagi.Linear(3, 3)
    with pytest.raises(ValueError, match="stands in two places"):
        tagi.Sequential(shared, tagi.ReLU(), tagi.Sequential(shared))
    net, x, y = network(3, 4, 2), torch.randn(6, 3), torch.randn(6, 2)
    for wrong in (torch.randn(6, 4), torch.randn(2, 3, 3), torch.randn(7)):
        with pytest.raises(ValueError, match=r"mu_x must be of shape \(B, 3\), not"):
            net(wrong)
    with pytest.raises(ValueError, match=r"var_x of shape \(5, 3\) does not fit mu_x of \(6, 3\)"):
        net(x, x[:5])
    with pytest.raises(ValueError, match=r"mu_obs of shape \(1, 2\) does not fit an output of \(6, 2\)"):
        teach(net, x, y[:1])
    with pytest.raises(ValueError, match=r"var_obs of shape \(5, 2\) does not fit an output of \(6, 2\)"):
        teach(net, x, y, y[:5])
    for device in ("abacus", "cuda:99"):
        with pytest.raises(ValueError, match=f"must be a device that torch has here, not '{device}'"):
            tagi.OutputUpdater(device)
    output, deltas = net.output_z_buffer, net.input_delta_z_buffer
    with pytest.raises(ValueError, match="the output is on cpu, the updater on meta"):
        tagi.OutputUpdater("meta").update(output, y, 0.1, deltas)
    with pytest.raises(TypeError, match="output_states and delta_states are in each other's place"):
        tagi.OutputUpdater().update(output_states=deltas, mu_obs=y, var_obs=0.1, delta_states=output)
    with pytest.raises(ValueError, match=r"var_obs must not be negative, but has -0\.1"):
        teach(net, x, y, -0.1)


def test_numbers_that_are_not_finite_are_refused() -> None:
    net, x, y = network(3, 4, 2), torch.randn(6, 3), torch.randn(6, 2)
    before, inf, nan = weights(net), float("inf"), float("nan")
    for wrong_x, wrong_y, var_obs in [
        (inf, 0.0, 0.1),
        (nan, 0.0, 0.1),
        (nan, nan, 0.1),
        (0.0, -inf, 0.1),
        (0.0, 0.0, nan),
    ]:
        for rows in (slice(6), slice(1)):
            bad_x, bad_y = x.clone(), y.clone()
            bad_x[rows], bad_y[rows] = wrong_x, wrong_y
            with pytest.raises(ValueError, match="the output or its deltas are not finite"):
                teach(net, bad_x, bad_y, var_obs)
    teach(net, x, y, inf)  # which says nothing
    assert all(map(torch.equal, weights(net), before))


def test_how_weights_start() -> None:
    torch.manual_seed(0)
    layer = tagi.Linear(400, 600, gain_weight=0.5, gain_bias=2.0)
    assert layer.mu_w.std().item() == pytest.approx(1 / 20, rel=0.01)
    assert torch.all(layer.var_w == (0.5 / 20) ** 2)
    assert torch.allclose(layer.var_b, torch.tensor((2 / 20) ** 2))
    xavier = tagi.Linear(400, 600, init_method="Xavier")
    assert xavier.mu_w.std().item() == pytest.approx((2 / 1000) ** 0.5, rel=0.01)
    assert torch.allclose(xavier.var_w, torch.tensor(2 / 1000))
