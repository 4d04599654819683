"""A torch model run cut over ranks, as it is: captured, given layouts, and compiled to each rank's program."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import zip_longest
from typing import Any

import torch
from torch.utils import _pytree as pytree

from distdl_lite import layout as lay
from distdl_lite.agreement import check_alike, is_unanimous, refused_together, vote_of
from distdl_lite.autograd import Node, copy_to_team
from distdl_lite.factors import Dims, all_axes, dims_of, feature_axes, local_shape, shape_of_dims
from distdl_lite.layout import Layout
from distdl_lite.model import rules as rules  # registers those that graphs alone need
from distdl_lite.model.capture import Captured, as_module, capture
from distdl_lite.model.compile import Axes, Program, check_used, compiled, fitting_axes
from distdl_lite.model.report import TYPICAL, Machine, Report, cut_inputs, example, reported
from distdl_lite.nn.blocks import anchored, connected_zeros
from distdl_lite.nn.inputs import agreed_inputs
from distdl_lite.nn.module import Call, Module
from distdl_lite.nn.parameter import Place
from distdl_lite.nn.value import Rule, Value
from distdl_lite.partition import Partition
from distdl_lite.private import any_autocast_is_enabled
from distdl_lite.reducer import Replicas, summed_at_once
from distdl_lite.transport import Team

Given = Sequence[Axes | None] | None
Named = Sequence[int | str | None]  # axes by number or name


def distribute(
    model: torch.nn.Module | Callable[..., Any],
    P: Partition,
    *,
    in_axes: Sequence[Named | None] | None = None,
    out_axes: Sequence[Named | None] | None = None,
    strict: bool = False,
    cut: Mapping[str, Named] | None = None,
    rules: Mapping[str, Rule] | None = None,
) -> Distributed:
    """Run a model, written for one device, on tensors that are cut over a grid; its numbers stay the same.

    Parameters
    ----------
    model : torch.nn.Module or callable
        Of plain torch; a loss, or a function of tensors, too. The result shares its parameters, unless the grid cuts channels:
        then it has its own, of which a rank keeps what it computes with from the first call on.
    P : Partition
        A grid with one axis per dim of the model's tensors, such as ``(batch, channels, height, width)``.
    in_axes, out_axes : sequence of axes, optional
        For each tensor among the arguments (the outputs), in the order of `torch.utils._pytree`, the axis of `P` that cuts
        each dim, by number or name, None for a whole one; None in place of a tensor's axes is the default.
    strict : bool
        Whether an operation that has no rule is refused. Else its inputs are gathered, which is exact, and reported.
    cut : mapping, optional
        From a module's path, such as "encoder.3", to the axes that shall cut the dims of its output.
    rules : mapping, optional
        From the name of an operation of torch to a rule, for this model alone; see the guide's page on rules.

    Returns
    -------
    Distributed
        A module with the model's parameters, buffers and names. It takes this rank's blocks and returns this rank's
        blocks; an output that is not cut, such as a loss, is one value shown on every rank, whose gradient is the serial
        one.

    Raises
    ------
    TypeError
        If the model is not callable, or `P` no partition.
    RuntimeError
        At the first call for a structure, on all ranks alike, if the model cannot be captured or an operation cannot be
        run; the text names the module or the line.

    Notes
    -----
    By default a tensor with as many dims as `P` has axes is cut one to one; one of integers with one dim fewer, such as class
    indices, leaves the channel axis out; any other is cut along the batch axis in its first dim. `P.block(shape)`
    gives the slices. Weights start from the first rank's values.

    The model is captured for each global structure of its inputs (shapes, dtypes, train or eval) once. Its Python code sees
    global shapes then, and what it computes from anything but tensors is fixed.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     P = world.grid((1, 1, 2, 1))
    ...     net = dl.distribute(torch.nn.Conv2d(3, 8, 3, padding=1), P)
    ...     return tuple(net(P.cut(torch.zeros(2, 3, 37, 29))).shape)
    >>> dl.testing.spmd(2, body)
    [(2, 8, 19, 29), (2, 8, 18, 29)]
    """
    return Distributed(model, P, in_axes, out_axes, strict, cut, rules)


class Distributed(Module):
    """A model over a grid; made by `distribute`.

    Attributes
    ----------
    P : Partition
    model : torch.nn.Module
        Whose parameters, buffers and modules it has under the same names.
    """

    _distdl_is_cut = False  # the ranks tell each other the shapes of all arguments
    _capture = staticmethod(capture)

    def __init__(
        self,
        model: Any,
        P: Partition,
        in_axes: Sequence[Named | None] | None = None,
        out_axes: Sequence[Named | None] | None = None,
        strict: bool = False,
        cut: Mapping[str, Named] | None = None,
        rules: Mapping[str, Rule] | None = None,
    ) -> None:
        super().__init__(P)
        with refused_together(P, "distribute"):
            model = _checked(model, in_axes, out_axes)
            by_number: list[Any] = [given and [_numbered(P, axes) for axes in given] for given in (in_axes, out_axes)]
            numbered = cut and {path: _numbered(P, axes) for path, axes in cut.items()}
            if feature_axes(P.grid_of_ranks):
                model = copy.deepcopy(model)  # some weights become blocks, which those of the caller's model do not
        self.__dict__["model"] = model
        self.__dict__.update(
            {k: vars(model)[k] for k in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")}
        )
        self.P, (self.in_axes, self.out_axes), self.strict = P, by_number, strict
        self.cut, self.rules = numbered, rules
        self.training = model.training
        self._distdl_label = f"distribute({type(model).__name__})"
        self._replicas: dict[str, Replicas] = {}
        self._placed: dict[str, Dims] = {}
        if P.active:
            self._start_alike()

    def _start_alike(self) -> None:
        """Give all ranks the first one's weights and buffers, and number the sums of their gradients."""
        team = self.P.team
        tensors = (f"{name} {tuple(t.shape)} {t.dtype}" for name, t in self._named())
        self._check_lines("the model is", [f"a {type(self.model).__name__}", *tensors])
        with torch.no_grad():
            for tensor in {id(tensor): tensor for _, tensor in self._named()}.values() if team.size > 1 else ():
                values = tensor.detach().contiguous()
                team.world.broadcast(team, values, self.P.ranks[0])
                tensor.copy_(values)

    def _replicas_of(self, name: str, dims: Dims) -> Replicas:
        """The ranks that hold the same block of a parameter; of a tied one they are the same for all its names."""
        if name not in self._replicas:
            team = self._distdl_transport.team(_layout_of(self.P, dims).replicas(self._distdl_transport.rank))
            team.made["replicas"] += 1
            self._replicas.update(dict.fromkeys(self._names_of(name), Replicas(team, team.made["replicas"], name)))
        return self._replicas[name]

    def _names_of(self, name: str) -> list[str]:
        """The names of a parameter."""
        named = dict(self.named_parameters(remove_duplicate=False))
        return [other for other, parameter in named.items() if parameter is named[name]]

    def _cut_parameters(self, program: Program) -> None:
        """Keep this rank's blocks of the parameters that the program wants cut, for good."""
        for feed, value in program.feeds:
            if feed.kind != "parameter" or feed.target in self._placed:
                continue
            names = self._names_of(feed.target)
            self._placed.update(dict.fromkeys(names, value.dims))
            if not all_axes(value.dims):
                continue
            parameter = self.model.get_parameter(feed.target)
            box = tuple(slice(*program.compiler.range(f)) for (f,) in value.dims)
            with torch.no_grad():
                parameter.data = parameter[box].clone()
            place = Place(_layout_of(self.P, value.dims), self._replicas_of(feed.target, value.dims))
            for path, _, name in (other.rpartition(".") for other in names):
                # Not of `self`, where a module that is called as an attribute of it is, such as `model`, would be hidden.
                holder = self.model.get_submodule(path) if path else self
                holder.__dict__.setdefault("_distdl_places", {})[name] = place

    def _distdl_check_weights(self) -> None:
        """Raise if a cut weight is not this rank's block any more; forget how a whole one lay that has another shape now."""
        grid = self.P.grid_of_ranks
        index = grid.index(self._distdl_transport.rank)
        assert index is not None
        for name, parameter in self.named_parameters(remove_duplicate=False):
            dims = self._placed.get(name, ())
            wanted, shape = local_shape(dims, grid, index), tuple(parameter.shape)
            if name in self._placed and wanted != shape:
                if all_axes(dims):
                    raise ValueError(
                        f"{name} has the shape {shape}, not {wanted} of this rank's block of {shape_of_dims(dims)}; "
                        "dl.load_serial_state_dict cuts whole weights"
                    )
                del self._placed[name]

    def _whole_shapes(self) -> dict[str, tuple[int, ...]]:
        """The global shapes of the parameters that are cut."""
        return {name: shape_of_dims(dims) for name, dims in self._placed.items() if all_axes(dims)}

    def _named(self) -> list[tuple[str, torch.Tensor]]:
        return [*self.named_parameters(remove_duplicate=False), *self.named_buffers(remove_duplicate=False)]

    def _distdl_options(self) -> str:
        rules = sorted(self.rules or {})
        return f"in_axes={self.in_axes}, out_axes={self.out_axes}, strict={self.strict}, cut={self.cut}, rules={rules}"

    def _distdl_same(self, input: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
        """Also what of the call is no tensor, and what of the modules inside its operations follow from."""
        *leaves, spec = input
        return super()._distdl_same(input, kwargs) | {
            "structure of the arguments": str(spec),
            "arguments": [_word(leaf) for leaf in leaves if not isinstance(leaf, torch.Tensor)],
            "modules in another mode": [n for n, m in self.named_modules() if m.training != self.training],
            "frozen parameters": [n for n, p in self.named_parameters() if not p.requires_grad],
        }

    def _distdl_forward_pre_hook(self, input: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        leaves, spec = pytree.tree_flatten((tuple(input), dict(kwargs)))
        return super()._distdl_forward_pre_hook((*leaves, _Spec(spec)), {})

    def forward(self, *leaves: Any) -> Any:
        """The model's outputs, in this rank's blocks."""
        return self._distdl_run(*leaves)

    def _distdl_outside(self, *leaves: Any) -> Any:
        raise ValueError(
            f"{self._distdl_label}: rank {self._distdl_transport.rank} is outside {self.P}, and does not call it"
        )

    def _distdl_module_setup(self, input: tuple[Any, ...]) -> Call:
        with refused_together(self.P, self._distdl_label):
            captured, program = self._compiled(input)
        self._check_same_graph(captured, program)
        self._cut_parameters(program)
        return _Running(self, program, captured)

    def _check_same_graph(self, captured: Captured, program: Program) -> None:
        """Raise ValueError on all ranks if the model does something else on one: their movements would not meet."""
        movements = (f"a movement {m.kind} {m.X} {m.Y}" for m in program.compiler.movements)
        self._check_lines("the model does", [*captured.lines(), *movements])

    def _check_lines(self, what: str, lines: list[str]) -> None:
        """Raise ValueError on all ranks, with the first line that differs, unless all have the same."""
        team = self.P.team
        if not is_unanimous(team, vote_of("\n".join(lines))):
            told = dict(zip(team, team.world.gather_objects(team, lines), strict=True))
            for there in zip_longest(*told.values()):
                check_alike(what, dict(zip(told, there, strict=True)), "distribute")

    def _compiled(self, input: tuple[Any, ...]) -> tuple[Captured, Program]:
        """The graph and this rank's program for what the ranks passed."""
        grid, axes, device = self.P.grid_of_ranks, iter(self.in_axes or ()), "cpu"
        *leaves, spec = input
        dims, given = list[Any](), list[Any]()
        for i, leaf in enumerate(leaves):
            if not isinstance(leaf, torch.Tensor):
                dims.append(None)
                given.append(leaf)
                continue
            inputs = agreed_inputs(self, self.P, i)
            own = fitting_axes(next(axes, None), leaf.dim(), inputs.dtype, grid)
            laid = dims_of(lay.blocks_from_shapes(grid, inputs.shapes, own).dims)
            dims.append((laid, inputs.requires_grad))
            given.append(torch.empty(shape_of_dims(laid), dtype=inputs.dtype, device="meta"))
            device = inputs.device
        check_used(axes)
        grads = torch.is_grad_enabled()
        args, kwargs = pytree.tree_unflatten(given, spec.spec)
        self.model.training = self.training
        captured = self._capture(self.model, args, kwargs, self._whole_shapes(), device)
        frozen = frozenset(name for name, p in self.named_parameters(remove_duplicate=False) if not p.requires_grad)
        program = compiled(
            captured,
            grid,
            self._distdl_transport.rank,
            self._distdl_transport,
            dims,
            frozen=frozen,
            replicas=self._replicas_of,
            grads=grads,
            device=device,
            **self._options(),
        )
        return captured, program

    def _options(self) -> dict[str, Any]:
        """Those of `compiled` that run and report share."""
        asked = {"strict": self.strict, "out_axes": self.out_axes, "cut": self.cut, "rules": self.rules}
        return {"placed": self._placed, **asked}

    @property
    def program(self) -> Program:
        """That of the structure called last."""
        running = self._distdl_plan
        if running is None:
            raise RuntimeError(f"{self._distdl_label}: call it first")
        return running.program  # type: ignore[no-any-return]

    def code(self) -> str:
        """What this rank does in a forward, as Python; the paths of the model's modules stand above their lines."""
        return self.program.compiler.source(*self.program.arguments)

    def report(self, *inputs: Any, machine: Machine = TYPICAL) -> Report:
        """What the model moves, computes and holds; nothing is run, and no other rank is needed.

        Parameters
        ----------
        *inputs
            Of global shapes, as `dl.report` takes them. Without any, the structure called last is meant.
        machine : Machine
            For the predicted times.
        """
        grid, grads = self.P.grid_of_ranks, self.training
        if inputs:
            args = [example(x, self.model) for x in inputs]
            feeds, whole = cut_inputs(args, grid, self.in_axes), self._whole_shapes()
            self.model.training = self.training
            captured = self._capture(self.model, args, {}, whole)
        else:
            captured, feeds = self._distdl_plan.captured, {}
            for feed, value in self.program.feeds:
                feeds |= {feed.target: (value.dims, value.grad)} if feed.kind == "user_input" else {}
            grads = any(value.grad for _, value in self.program.feeds)
        return reported(captured, self.model, grid, feeds, machine, grads=grads, **self._options())

    def extra_repr(self) -> str:
        return f"P={self.P.shape}"


def _layout_of(P: Partition, dims: Dims) -> Layout:
    return Layout(P.grid_of_ranks, tuple(factor for (factor,) in dims))


def _numbered(P: Any, axes: Any) -> Any:
    """The axes by their numbers; what is no list of axes is judged where its tensor is known."""
    if not isinstance(axes, (tuple, list)):
        return axes
    return tuple(P.axis(axis) if isinstance(axis, str) else axis for axis in axes)


def _checked(model: Any, *given: Any) -> torch.nn.Module:
    """The model as a module, if its weights can be shared, and what says how tensors are cut is of the right type."""
    for axes in given:
        if not isinstance(axes, (tuple, list, type(None))):
            raise TypeError(f"in_axes and out_axes have axes, or None, for each tensor; not {axes!r}")
    module = as_module(model)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_meta or torch.nn.parameter.is_lazy(tensor):
            why = "on the meta device" if tensor.is_meta else "lazy"
            raise ValueError(f"{name} has no values yet: it is {why}")
    return module


def _word(leaf: Any) -> str:
    """A plain argument's value, and the type of any other, whose text may hold an address."""
    return repr(leaf) if type(leaf) in (bool, int, float, complex, str, type(None)) else type(leaf).__name__


class _Spec(str):
    """The structure of the arguments, whose text is what ranks vote on."""

    spec: Any

    def __new__(cls, spec: Any) -> _Spec:
        made = super().__new__(cls, spec)
        made.spec = spec
        return made


class _Running:
    """The call of a network for one structure."""

    def __init__(self, net: Distributed, program: Program, captured: Captured) -> None:
        self.program, self.captured, self.device = program, captured, program.compiler.device
        c = program.compiler
        self.run = c.compiled(*program.arguments)
        # Kept, as ranks vote on the numbers of modules, which would be given again.
        self.modules = [*net.model.modules()]
        # Where each input of the program is found: in a module's parameters or buffers, among the constants or the arguments.
        self.sources: list[tuple[Any, Any]] = []
        self.anchors: list[tuple[int, Team | None]] = []  # places of arguments, with the ranks that hold copies
        for place, (feed, value) in enumerate(program.feeds):
            if feed.kind in ("parameter", "buffer"):
                self.sources.append(_found(net, feed.kind, feed.target))
            elif feed.kind == "user_input":
                self.sources.append((None, feed.target))
                if value.grad:
                    free = c.free_axes(all_axes(value.dims))
                    self.anchors.append((place, c.team(free) if free else None))
            else:
                self.sources.append(((feed.target,), 0))
        # Where an output goes, the constant it is, whether it counts.
        self.results: list[tuple[Any, Any, bool | None]] = []
        for buffer, value in program.outputs:
            free = isinstance(value, Value) and value.grad and c.free_axes(all_axes(value.dims))
            counts = all(c.index[a] == 0 for a in free) if free else None
            target = None if buffer is None else _found(net, "buffer", buffer)
            self.results.append((target, None if isinstance(value, Value) else (value,), counts))

    def taken(self, net: Distributed, leaves: Sequence[Any]) -> list[Any]:
        """The inputs of the program: weights, buffers, and this rank's blocks of the arguments."""
        taken = [leaves[key] if holder is None else holder[key] for holder, key in self.sources]
        if net._distdl_sums_at_once:
            taken = [summed_at_once(x) if isinstance(x, torch.nn.Parameter) else x for x in taken]
        for place, team in self.anchors:
            x = anchored(taken[place], True)
            taken[place] = x if team is None else copy_to_team(x, team)
        return taken

    def __call__(self, net: Distributed, *leaves: Any) -> Any:
        with torch.autocast(self.device, enabled=False) if any_autocast_is_enabled() else nullcontext():
            made, outputs = iter(self.run(*self.taken(net, leaves))), []
            for target, constant, counts in self.results:
                y = next(made) if constant is None else constant[0]
                if target is None:
                    outputs.append(y if counts is None else _Shown.apply(y, counts))
                else:
                    holder, name = target
                    with torch.no_grad():
                        holder[name].copy_(y)
        return pytree.tree_unflatten(outputs, self.captured.spec)


def _found(net: Distributed, kind: str, target: str) -> tuple[dict[str, Any], str]:
    """Where a parameter or buffer is kept, and its name there."""
    path, _, name = target.rpartition(".")
    return vars(net.model.get_submodule(path))[f"_{kind}s"], name


class _Shown(Node):
    """An output that several ranks hold: its gradient, whole on each of them, counts on one."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, counts: bool) -> torch.Tensor:
        ctx.counts = counts
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        # Zeros whose graph, for second gradients, leads to where the other's does.
        return (gradient if ctx.counts else connected_zeros(gradient.shape, gradient, linear=True)), None
