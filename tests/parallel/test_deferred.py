"""Deferred updates: bit by bit what immediate ones give, whatever is done in between."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch.optim.optimizer import register_optimizer_step_post_hook

import distdl_lite as dl

BUCKET = 160 / 2**20  # 20 numbers of float64
optim = torch.optim

OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "SGD": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": lambda p: optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW": lambda p: optim.AdamW(p, lr=0.01, foreach=False),
    "Adamax": lambda p: optim.Adamax(p, lr=0.01),
    "NAdam": lambda p: optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: optim.RAdam(p, lr=0.01),
    "Adagrad": lambda p: optim.Adagrad(p, lr=0.01),
    "Adadelta": lambda p: optim.Adadelta(p, lr=0.5),
    "ASGD": lambda p: optim.ASGD(p, lr=0.01),
    "RMSprop": lambda p: optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "Rprop": lambda p: optim.Rprop(p, lr=0.01),
    "Adafactor": lambda p: optim.Adafactor(p, lr=0.01),
    "Muon": lambda p: optim.Muon([q for q in p if q.dim() == 2], lr=0.01),
}


def net() -> torch.nn.Module:
    torch.manual_seed(3)
    return torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 6), torch.nn.Tanh(),
        torch.nn.Linear(6, 2),
    ).double()  # fmt: skip


def groups(module: torch.nn.Module) -> list[dict[str, Any]]:
    parameters = list(module.parameters())
    return [{"params": parameters[:3], "lr": 0.02}, {"params": parameters[3:]}]


def pair(
    world: dl.Partition,
    make: Callable[[Any], optim.Optimizer],
    build: Callable[[], torch.nn.Module] = net,
    **options: Any,
) -> Iterator[tuple[dl.DataParallel, dl.DataParallelOptimizer]]:
    """The same model with immediate and with deferred updates."""
    for update in ("now", "deferred"):
        module = build()
        given = list(module.parameters()) if not options.get("grouped") else groups(module)
        optimizer = dl.DataParallelOptimizer(make(given))
        more = {"engine": "thread", **{key: value for key, value in options.items() if key != "grouped"}}
        yield dl.DataParallel(module, world, optimizer, update=update, bucket_mb=BUCKET, **more), optimizer


def batch(world: dl.Partition, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * step + world.rank)
    return torch.randn(2 + world.rank, 4, dtype=torch.float64, generator=generator)


def assert_same(first: dl.DataParallel, second: dl.DataParallel, what: str = "") -> None:
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), (name, what)


def train(
    world: dl.Partition, dp: Any, optimizer: Any, steps: int = 4, scheduler: Any = None, between: Any = None
) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        dp(batch(world, step)).square().mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        if between is not None:
            between(dp, optimizer)


@pytest.mark.check("A26")
@on_ranks(2, mpi=True)
def test_every_dense_optimizer(world: dl.Partition) -> None:
    for name, make in OPTIMIZERS.items():
        made = list(pair(world, make, grouped=name != "Muon"))
        for dp, optimizer in made:
            train(world, dp, optimizer)
        assert made[1][0]._deferral.places, "nothing was deferred"
        assert_same(made[0][0], made[1][0])
        for dp, _ in made:
            dp.check_replicas()


@pytest.mark.check("A26")
@on_ranks(2, mpi=True)
def test_whatever_is_done_between_the_steps(world: dl.Partition) -> None:
    def evaluates(dp: Any, optimizer: Any) -> None:
        dp.eval()
        with torch.no_grad():
            seen.append(dp(batch(world, 99)))
        dp.train()

    def evaluates_in_training_mode(dp: Any, optimizer: Any) -> None:
        with torch.no_grad():
            seen.append(dp(batch(world, 99)))

    def saves(dp: Any, optimizer: Any) -> None:
        seen.extend(v.clone() for v in dp.module.state_dict().values())

    def saves_optimizer(dp: Any, optimizer: Any) -> None:
        state = copy.deepcopy(optimizer.state_dict())["state"]
        seen.extend(state[key]["exp_avg"] for key in sorted(state))

    def looks(dp: Any, optimizer: Any) -> None:
        seen.extend(p.grad.clone() for p in dp.parameters())

    def zeros(dp: Any, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)

    def forgets(dp: Any, optimizer: Any) -> None:
        dp.module.zero_grad()
        optimizer.torch_optimizer.zero_grad()

    def copies(dp: Any, optimizer: Any) -> None:
        seen.extend(p.detach().clone() for p in copy.deepcopy(dp).parameters())

    def scales(dp: Any, optimizer: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] *= 0.5

    def accumulates(dp: Any, optimizer: Any) -> None:
        dp(batch(world, 50)).square().mean().backward()
        optimizer.step()

    def loads_optimizer_first(dp: Any, optimizer: Any) -> None:
        optimizer.load_state_dict(optimizer.kept)
        dp.load_state_dict(optimizer.module_kept)

    def loads_module_first(dp: Any, optimizer: Any) -> None:
        dp.module.load_state_dict(optimizer.module_kept)
        optimizer.torch_optimizer.load_state_dict(optimizer.kept)

    def loads_a_layer(dp: Any, optimizer: Any) -> None:
        seen.extend(v.clone() for v in dp.module[3].state_dict().values())
        dp.module[3].load_state_dict(net()[3].state_dict())

    def nothing(dp: Any, optimizer: Any) -> None:
        pass

    for between in (evaluates, evaluates_in_training_mode, saves, saves_optimizer, looks, zeros, forgets, copies, scales,
                    accumulates, loads_optimizer_first, loads_module_first, loads_a_layer, nothing):  # fmt: skip
        results = []
        for dp, optimizer in pair(world, OPTIMIZERS["Adam"]):
            seen: list[torch.Tensor] = []
            train(world, dp, optimizer, steps=2)
            optimizer.module_kept, optimizer.kept = copy.deepcopy((dp.state_dict(), optimizer.state_dict()))
            train(world, dp, optimizer, between=between)
            train(world, dp, optimizer, steps=1)
            results.append((dp, seen))
        assert_same(results[0][0], results[1][0], between.__name__)
        assert len(results[0][1]) == len(results[1][1])
        for a, b in zip(results[0][1], results[1][1], strict=True):
            assert torch.equal(a, b), between.__name__


@pytest.mark.check("A26")
@on_ranks(2)
def test_schedulers_act_on_the_step_they_follow(world: dl.Partition) -> None:
    for inner in (False, True):
        made = []
        for dp, optimizer in pair(world, OPTIMIZERS["SGD"]):
            scheduler = optim.lr_scheduler.StepLR(optimizer.torch_optimizer if inner else optimizer, 1, gamma=0.3)
            train(world, dp, optimizer, scheduler=scheduler)
            made.append(dp)
        assert_same(*made)


@pytest.mark.check("A26")
@on_ranks(2)
def test_clipping_and_unused_parameters(world: dl.Partition) -> None:
    made = []
    for dp, optimizer in pair(world, OPTIMIZERS["SGD"]):
        for step in range(4):
            optimizer.zero_grad()
            dp(batch(world, step)).square().mean().backward()
            dp.synchronize()
            torch.nn.utils.clip_grad_norm_(dp.module.parameters(), 0.01)
            optimizer.step()
        made.append(dp)
    assert_same(*made)
    dp, optimizer = list(pair(world, OPTIMIZERS["SGD"]))[1]
    dp(batch(world, 0)).square().mean().backward()
    torch.nn.utils.clip_grad_norm_(dp.module.parameters(), 0.01)
    with pytest.raises(RuntimeError, match=r"call synchronize\(\) after backward"):
        optimizer.step()


class Tied(torch.nn.Module):
    """Root-level and tied parameters, an attention that uses a layer's weight without calling it, a skipped branch."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(4))
        self.attention = torch.nn.MultiheadAttention(4, 2, batch_first=True)
        self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.aside, self.calls = torch.nn.Linear(4, 4), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = (x * self.scale).unsqueeze(1)
        y = self.second(self.first(self.attention(x, x, x)[0]).tanh())
        return y + self.aside(x) if self.calls % 2 else y


@pytest.mark.check("A26")
@on_ranks(2)
def test_layers_that_do_not_call_each_other(world: dl.Partition) -> None:
    def build() -> torch.nn.Module:
        torch.manual_seed(5)
        return Tied().double()

    made = []
    for dp, optimizer in pair(world, OPTIMIZERS["Adam"], build):
        train(world, dp, optimizer, steps=6)
        made.append(dp)
    assert_same(*made)


class Functional(torch.nn.Module):
    """Uses a layer's weight without calling it: always, or from the third forward on."""

    def __init__(self, start: int) -> None:
        super().__init__()
        self.layer, self.other, self.start, self.calls = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), start, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = self.other(x)
        return torch.nn.functional.linear(x, self.layer.weight) if self.calls > self.start else self.layer(x)


@pytest.mark.check("A26")
@on_ranks(2)
def test_weights_used_without_their_layer(world: dl.Partition) -> None:
    def build(start: int) -> torch.nn.Module:
        torch.manual_seed(5)
        return Functional(start).double()

    made = []
    for dp, optimizer in pair(world, OPTIMIZERS["Adam"], lambda: build(0)):
        train(world, dp, optimizer)
        made.append(dp)
    assert_same(*made)
    dp, optimizer = list(pair(world, OPTIMIZERS["Adam"], lambda: build(2)))[1]
    with pytest.raises(RuntimeError, match=r"was used before its deferred update|modified by an inplace operation"):
        train(world, dp, optimizer)


@pytest.mark.check("A26")
@on_ranks(2)
def test_steps_that_are_not_cut_into_parts(world: dl.Partition) -> None:
    """Of what is trained again, or no more, or not the container's; and those with hooks, which see them whole."""

    def train_again(dp: Any, optimizer: Any, step: int) -> None:
        dp.module[0].weight.requires_grad_(step % 3 == 2)

    def train_no_more(dp: Any, optimizer: Any, step: int) -> None:
        dp.module[3].weight.requires_grad_(step == 0)

    def train_others(dp: Any, optimizer: Any, step: int) -> None:
        if not step:
            dp.other = [torch.nn.Parameter(torch.ones(3, dtype=torch.float64))]
            optimizer.add_param_group({"params": dp.other})
        dp.other[0].grad = torch.full((3,), 1.0 + step, dtype=torch.float64)

    def clip_before(dp: Any, optimizer: Any, step: int) -> None:
        def hook(*args: Any) -> None:
            torch.nn.utils.clip_grad_norm_(dp.module.parameters(), 1e-3)

        if not step:
            optimizer.register_step_pre_hook(hook)

    def clamp_behind(dp: Any, optimizer: Any, step: int) -> None:
        def hook(*args: Any) -> None:
            dp.seen.append([p.detach().clone().clamp_(-0.1, 0.1) for p in dp.module.parameters()])
            dp.module[0].weight.data.clamp_(-0.1, 0.1)

        if not step:
            dp.seen = []
            optimizer.torch_optimizer.register_step_post_hook(hook)

    def count_all(dp: Any, optimizer: Any, step: int) -> None:
        if not step:
            dp.seen = []
            dp.hook = register_optimizer_step_post_hook(
                lambda stepped, *args: dp.seen.append(1) if stepped is optimizer.torch_optimizer else None
            )
        elif step == 5:
            dp.hook.remove()

    for act in (train_again, train_no_more, train_others, clip_before, clamp_behind, count_all):
        made = []
        for dp, optimizer in pair(world, OPTIMIZERS["Adam"]):
            for step in range(6):
                if step % 2:
                    optimizer.zero_grad()
                act(dp, optimizer, step)
                dp(batch(world, step)).square().mean().backward()
                optimizer.step()
            made.append(dp)
        assert_same(*made, act.__name__)
        for name in {"seen", "other"} & made[0].__dict__.keys():
            first, second = (torch.utils._pytree.tree_leaves(dp.__dict__[name]) for dp in made)
            assert len(first) == len(second), act.__name__
            assert all(map(torch.equal, *(map(torch.as_tensor, told) for told in (first, second)))), act.__name__


@on_ranks(2)
def test_a_serial_checkpoint_of_a_container(world: dl.Partition) -> None:
    """It has the module's names, and what has been deferred; all of it goes back into a container."""
    (now, at_once), (later, optimizer) = pair(world, OPTIMIZERS["AdamW"])
    for model, its in ((now, at_once), (later, optimizer)):
        model(batch(world, 0)).square().mean().backward()
        its.step()
    state = dl.serial_state_dict(later)
    assert list(state) == (list(net().state_dict()) if world.rank == 0 else [])
    for name, value in state.items():
        torch.testing.assert_close(value, now.state_dict()[name], rtol=0, atol=0)
    later(batch(world, 1)).square().mean().backward()
    optimizer.step()
    told = dl.serial_optimizer_state_dict(later, optimizer.torch_optimizer)
    assert world.rank or told["state"][0]["step"] == 2
    dl.load_serial_state_dict(later, state)
    assert_same(now, later)


@pytest.mark.check("A26")
@on_ranks(2)
def test_two_optimizers_and_a_failed_forward(world: dl.Partition) -> None:
    states = []
    for update in ("now", "deferred"):
        module = net()
        parameters = list(module.parameters())
        optimizers = [
            dl.DataParallelOptimizer(optim.Adam(parameters[:2], lr=0.01)),
            dl.DataParallelOptimizer(optim.SGD(parameters[2:], lr=0.1)),
        ]
        dp = dl.DataParallel(module, world, optimizers, blocking_parameter_updates=update == "now", bucket_mb=BUCKET)
        assert dp.blocking_parameter_updates is (update == "now")
        for step in range(4):
            for optimizer in optimizers:
                optimizer.zero_grad()
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                dp(torch.zeros(2, 5, dtype=torch.float64))
            dp(batch(world, step)).square().mean().backward()
            for optimizer in optimizers[: 1 + step % 2]:
                optimizer.step()
        states.append(dp.state_dict())
    for name in states[0]:
        assert torch.equal(states[0][name], states[1][name]), name


class Breaks(torch.autograd.Function):
    """The identity, until it is gone back through where told to."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, breaks: bool) -> torch.Tensor:
        ctx.breaks = breaks
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        if ctx.breaks:
            raise ArithmeticError("broke in backward")
        return gradient, None


class Choosing(torch.nn.Module):
    """Layers of which a forward leaves out some."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(4)).double()

    def forward(self, x: torch.Tensor, left_out: tuple[int, ...]) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            x = x if number in left_out else layer(x).tanh()
        return x


@pytest.mark.check("A26")
@on_ranks(3, mpi=True)
def test_layers_that_some_ranks_leave_out(world: dl.Partition) -> None:
    """A rank without a gradient that others have is told of it, and forgets it, as they do."""
    forget: dict[str, Callable[[Any], None]] = {
        "set to None": lambda dp: dp.module.zero_grad(),
        "set to 0": lambda dp: dp.module.zero_grad(set_to_none=False),
        "kept": lambda dp: None,
    }
    for name, early, momentum in itertools.product(forget, (True, False), (0.0, 0.9)):
        made = list(pair(world, lambda p, m=momentum: optim.SGD(p, 0.1, m), Choosing))
        for dp, optimizer in made:
            for step in range(6):
                rng = random.Random(7 * step + world.rank)
                left_out = tuple(rng.sample(range(4), 2 if step % 3 else 4))
                if early:
                    forget[name](dp)
                dp(batch(world, step).requires_grad_(), left_out).square().mean().backward()
                optimizer.step()
                if not early:
                    forget[name](dp)
            dp.synchronize()
            dp.check_replicas()
        assert_same(made[0][0], made[1][0], name)
        for a, b in zip(*(dp.module.parameters() for dp, _ in made), strict=True):
            assert (a.grad is None) == (b.grad is None)
            assert a.grad is None or torch.equal(a.grad, b.grad)


@pytest.mark.check("A26")
@on_ranks(2, mpi=True)
def test_two_containers_with_an_optimizer_in_common(world: dl.Partition) -> None:
    """A step waits for all sums of its parameters, also those of a container that the optimizer was not given to."""

    def trained(update: str, is_one: bool, alternate: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        modules = [torch.nn.Linear(4, n, dtype=torch.float64) for n in (2, 3)]
        first, second = (list(module.parameters()) for module in modules)
        shares = [[*first, *second]] if is_one else [[*first, second[0]], [second[1]]]
        optimizers = [dl.DataParallelOptimizer(optim.SGD(parameters, 0.1, 0.9)) for parameters in shares]
        pairs = zip(modules, [optimizers[0], optimizers[-1]], strict=True)
        containers = [dl.DataParallel(module, world, optimizer, update=update) for module, optimizer in pairs]
        for step in range(6):
            for optimizer in optimizers:
                optimizer.zero_grad()
            used = [containers[step % 2]] if alternate else containers
            sum(dp(batch(world, step)).square().mean() for dp in used).backward()  # type: ignore[union-attr]
            for optimizer in optimizers:
                optimizer.step()
        for dp in containers:
            dp.synchronize()
            dp.check_replicas()
        return [p.detach() for parameters in shares for p in parameters]

    for is_one, alternate in itertools.product((True, False), repeat=2):
        now, deferred = (trained(update, is_one, alternate) for update in ("now", "deferred"))
        assert all(map(torch.equal, now, deferred)), (is_one, alternate)


class Fragile(torch.nn.Module):
    """Breaks in backward after so many layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.place = net(), -1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for n, layer in enumerate(self.layers):
            x = layer(Breaks.apply(x, n == self.place))
        return x


@pytest.mark.check("A26")
@on_ranks(3, mpi=True)
def test_backwards_that_fail_on_some_ranks(world: dl.Partition) -> None:
    """All leave out the step, and raise in the same call, whatever the rank that failed had already sent."""

    def steps(dp: Any, optimizer: Any, broken: Any, clips: bool = False) -> list[str]:
        log = []
        for step in range(6):
            place = broken.get((step, world.rank), -1)
            dp.module.place = place
            try:
                optimizer.zero_grad()
                dp(batch(world, step).requires_grad_()).square().mean().backward()
                if clips:
                    dp.synchronize()
                optimizer.step()
                log.append("")
            except (ArithmeticError, RuntimeError) as error:
                log.append(str(error))
        return log

    at_once_told = "DataParallel: backward failed on another rank, whose gradients are lacking"
    told = "DataParallel: backward failed on some rank, so its update is left out on all of them"
    first, some, last, each = [0], [0, 1], [2], [0, 1, 2]
    for place, failing, engine, clips in (
        (0, last, "inline", False), (0, first, "thread", True), (2, some, "poll", False), (3, first, "thread", False),
        (3, last, "inline", True), (3, each, "thread", False), (5, first, "inline", False), (5, some, "poll", True),
    ):  # fmt: skip
        broken = {(2, rank): place for rank in failing}
        (now, at_once), (dp, optimizer) = pair(world, OPTIMIZERS["Adam"], Fragile, engine=engine)
        log = steps(now, at_once, broken)
        mine = "broke in backward" if world.rank in failing else at_once_told
        assert log == ["", "", mine, "", "", ""], (place, failing, log)
        now.check_replicas()
        log = steps(dp, optimizer, broken, clips)
        mine = "broke in backward" if world.rank in failing else told if clips else ""
        after = told if len(failing) < 3 and not clips else ""
        assert log == ["", "", mine, after, "", ""], (place, failing, log)
        dp.check_replicas()
    dp, optimizer = list(pair(world, OPTIMIZERS["Adam"], Fragile))[1]
    steps(dp, optimizer, {(5, 1): 3})
    with pytest.raises(RuntimeError, match="backward failed on some rank"):
        dp.eval()
    dp.check_replicas()


def test_arguments() -> None:
    module = torch.nn.Linear(2, 2)
    inner = optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"a torch.optim.Optimizer is needed, not 3"):
        dl.DataParallelOptimizer(3)
    with pytest.raises(TypeError, match=r"blocking must be a bool, not 1"):
        dl.DataParallelOptimizer(inner, 1)
    optimizer = dl.DataParallelOptimizer(inner)
    for given in (inner, [optimizer, inner]):
        with pytest.raises(TypeError, match="must be a DataParallelOptimizer or a sequence of them"):
            dl.DataParallel(module, None, given)
    with pytest.raises(TypeError, match=r"blocking_parameter_updates must be a bool, not 1"):
        dl.DataParallel(module, None, optimizer, 1)
    with pytest.raises(ValueError, match=r'update="deferred" needs the optimizer'):
        dl.DataParallel(module, update="deferred")
    with pytest.raises(ValueError, match=r'blocking_parameter_updates=True is update="now"'):
        dl.DataParallel(module, None, optimizer, True, update="deferred")
    with pytest.raises(ValueError, match="update must be one of now, deferred"):
        dl.DataParallel(module, update="later")
    lbfgs = dl.DataParallelOptimizer(optim.LBFGS(module.parameters()))
    with pytest.raises(ValueError, match="LBFGS calls a closure"):
        dl.DataParallel(module, None, lbfgs, False)


@on_ranks(2)
def test_optimizers_alone_copied_and_pickled(world: dl.Partition) -> None:
    dp, optimizer = list(pair(world, OPTIMIZERS["Adam"]))[1]
    train(world, dp, optimizer)
    dp(batch(world, 0)).sum().backward()
    with pytest.raises(ValueError, match="a step with a closure cannot be deferred"):
        optimizer.step(lambda: 0.0)
    twin, other = copy.deepcopy((dp, optimizer))
    buffer = io.BytesIO()
    torch.save((dp, optimizer), buffer)
    buffer.seek(0)
    loaded, another = torch.load(buffer, weights_only=False)
    for container, its in ((dp, optimizer), (twin, other), (loaded, another)):
        train(world, container, its)
    assert_same(dp, twin)
    assert_same(dp, loaded)
    alone = dl.DataParallelOptimizer(optim.SGD(dp.module.parameters(), lr=0.1))
    assert alone.step(lambda: 3.0) == 3.0
    alone.load_state_dict(alone.state_dict())
    assert repr(alone).startswith("DataParallelOptimizer(SGD")


@on_ranks(2)
def test_a_scaler_and_a_fused_optimizer(world: dl.Partition) -> None:
    """Whose gradients are divided by the scale before the step, or left alone where they have overflowed."""
    module = torch.nn.Linear(2, 1)
    optimizer = dl.DataParallelOptimizer(optim.SGD(module.parameters(), lr=0.5, fused=True))
    before = module.bias.item()
    dp, scaler = dl.DataParallel(module, world, optimizer), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for factor in (1.0, torch.inf):
        optimizer.zero_grad()
        scaler.scale(dp(torch.ones(2, 2)).mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    assert module.bias.item() == pytest.approx(before - 0.5)


@on_ranks(2)
def test_copies_of_an_optimizer_that_has_a_scheduler(world: dl.Partition) -> None:
    """A scheduler puts a step in the optimizer that is of this one alone."""
    for update, make in itertools.product(
        ("now", "deferred"), (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)))
    ):
        dp, optimizer = list(pair(world, OPTIMIZERS["SGD"]))[update == "deferred"]
        optim.lr_scheduler.StepLR(optimizer, 1)
        twin, other = make((dp, optimizer))
        train(world, twin, other)
        before = dp.state_dict()["0.weight"].clone()
        assert not torch.equal(twin.state_dict()["0.weight"], before)
        train(world, dp, optimizer)
        assert_same(dp, twin)


def reset(layer: torch.nn.Module) -> None:
    if isinstance(layer, torch.nn.Linear):
        torch.nn.init.ones_(layer.weight)


@on_ranks(2)
def test_what_is_done_to_the_container_after_a_step(world: dl.Partition) -> None:
    """Casts, new parameters of the optimizer, and tensors of a bare layer."""

    def run(update: str) -> list[Any]:
        torch.manual_seed(0)
        module = torch.nn.Linear(4, 2)
        optimizer = dl.DataParallelOptimizer(optim.SGD([module.weight], lr=0.1, momentum=0.9))
        dp = dl.DataParallel(module, world, optimizer, update=update, bucket_mb=BUCKET)
        seen: list[Any] = []
        actions: list[Callable[[], Any]] = [
            lambda: optimizer.add_param_group({"params": [module.bias]}),
            lambda: dp.bfloat16().float(),
            lambda: dp.apply(reset),
            lambda: seen.append(dp.weight.tolist()),
            lambda: seen.append(dp.bias.tolist()),
        ]
        for step, action in enumerate(actions):
            optimizer.zero_grad()
            dp(batch(world, step).float()).square().mean().backward()
            optimizer.step()
            action()
        return [*seen, *(p.tolist() for p in dp.parameters())]

    assert run("now") == run("deferred")


@pytest.mark.check("A26")
@on_ranks(2, mpi=True)
def test_steps_of_the_wrapped_optimizer(world: dl.Partition) -> None:
    """They wait for the sums: gradients are this rank's part until then."""

    def steps(dp: Any, optimizer: Any, kinds: str) -> None:
        for number, kind in enumerate(kinds):
            optimizer.zero_grad()
            dp(batch(world, number)).square().mean().backward()
            (optimizer.torch_optimizer if kind == "w" else optimizer).step()

    for kinds, name in itertools.product(("www", "dwdwd", "wdd"), ("SGD", "Adam")):
        made = list(pair(world, OPTIMIZERS[name]))
        for dp, optimizer in made:
            steps(dp, optimizer, kinds)
        assert_same(made[0][0], made[1][0], kinds)
    dp, optimizer = list(pair(world, OPTIMIZERS["SGD"]))[1]
    dp(batch(world, 0)).square().mean().backward()
    dp.module[0].weight.grad.mul_(2)
    with pytest.raises(RuntimeError, match=r"the gradient of 0.weight was changed between backward and step"):
        optimizer.torch_optimizer.step()


@pytest.mark.check("A26")
@on_ranks(2, mpi=True)
def test_parameters_that_somebody_else_changes(world: dl.Partition) -> None:
    """A deferred step would come too late, and an optimizer that the container does not know has used a rank's part."""

    def by_another_optimizer(module: torch.nn.Module) -> None:
        optim.SGD(module[3].parameters(), lr=0.1).step()

    def by_hand(module: torch.nn.Module) -> None:
        with torch.no_grad():
            module[3].weight.clamp_(-0.1, 0.1)

    for change, steps, clears in itertools.product((by_another_optimizer, by_hand), (True, False), (True, False)):
        now, deferred = pair(world, OPTIMIZERS["SGD"])
        for dp, optimizer in (now, deferred):
            train(world, dp, optimizer, 1)
            dp(batch(world, 1)).square().mean().backward()
            if steps:
                optimizer.step()
            change(dp.module)
            if clears:
                optimizer.zero_grad()
        dp = deferred[0]
        with pytest.raises(RuntimeError, match=r"DataParallel: 3.(weight|bias) was changed between backward and its"):
            dp(batch(world, 2))
        dp.state_dict()  # is over
    for dp, optimizer in pair(world, OPTIMIZERS["SGD"]):
        train(world, dp, optimizer, 2)
        dp.synchronize()
        by_hand(dp.module)
        train(world, dp, optimizer, 2)
        dp.check_replicas()


@on_ranks(2, mpi=True)
def test_reading_on_one_rank_after_the_first_step(world: dl.Partition) -> None:
    """What the other rank does not do is not waited for."""
    for engine in ("thread", "poll"):
        for dp, optimizer in pair(world, OPTIMIZERS["SGD"], engine=engine):
            train(world, dp, optimizer, 1)
            if world.rank == 0:
                dp.state_dict()
            world.world_transport.gather_objects(world.team, engine)
            train(world, dp, optimizer, 2)
            dp.check_replicas()
