"""The graph of a model's operations for inputs of global shapes, recorded by torch.export without memory or data."""

from __future__ import annotations

import copy
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from distdl_lite.layout import Shape
from distdl_lite.nn.module import Module
from distdl_lite.nn.value import RULES, Operation
from distdl_lite.private import is_composite

_OURS, _TORCHS = Path(__file__).parent.parent, Path(torch.__file__).parent
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_LOUD = "torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor"
_REARRANGING = {"pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "rot90"}  # which torch makes of views and flips
_WAYS_OUT = "write this part without it, or cut the model by hand with distdl_lite.nn's layers"


class _Function(torch.nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def as_module(model: Any) -> torch.nn.Module:
    """A module, or a function as one; TypeError for anything else."""
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "distribute: a scripted or traced module holds no Python to capture; pass the module it was made of"
        )
    if not callable(model):
        raise TypeError(f"distribute: a torch.nn.Module or a function is needed, not {type(model).__name__}")
    if isinstance(model, type):
        raise TypeError(f"distribute: a model is needed, not its class: {model.__name__}(...)")
    return model if isinstance(model, torch.nn.Module) else _Function(model)


@dataclass(frozen=True)
class Feed:
    """An input of the graph."""

    kind: str  # "parameter", "buffer", "constant_tensor", or "user_input", a leaf of the arguments
    target: Any  # a name, a name, the constant itself, the number of the leaf
    node: Node


@dataclass(frozen=True)
class Captured:
    """A model's operations for one structure.

    Attributes
    ----------
    feeds : list of Feed
    nodes : list of torch.fx.Node
        The operations in order.
    outputs : list of (name of a buffer that it is for, or None, node or plain value)
    spec : TreeSpec
        Of what the model returns.
    """

    feeds: list[Feed]
    nodes: list[Node]
    outputs: list[tuple[str | None, Any]]
    spec: Any

    def lines(self) -> Iterator[str]:
        """A line for each thing in it, the same in each process that captures the same."""
        for feed in self.feeds:
            constant = isinstance(feed.target, torch.Tensor)
            yield f"take {feed.node} {_sums(feed.target) if constant else feed.target} {_sizes(feed.node)}"
        for node in self.nodes:
            yield f"{node} = {node.target}{node.args} {node.kwargs or ''} {_sizes(node)} in module {path_of(node)}"
        yield f"return {self.outputs} as {self.spec}"


def _sizes(node: Node) -> Any:
    """The shape and dtype of each tensor that a node makes."""
    return pytree.tree_map_only(torch.Tensor, lambda t: (tuple(t.shape), t.dtype), node.meta.get("val"))


def _sums(constant: torch.Tensor) -> list[Any]:
    """Numbers that tell constants apart."""
    flat = constant.detach().flatten().to(torch.complex128)
    return [flat.sum().item(), (flat * torch.arange(len(flat), device=flat.device)).sum().item()]


def operation_of(node: Node) -> Operation:
    """What a node does. Raises RuntimeError if it makes no tensors, or such as depend on data in their shape."""
    op = Operation.of(name_of(node), node.target, node.meta["val"])
    if not op.outputs or any(isinstance(n, torch.SymInt) for shape, *_ in op.outputs for n in shape):
        raise RuntimeError(f"{place_of(node)}: the result of {op.name} depends on data; {_WAYS_OUT}")
    return op


def name_of(node: Node) -> str:
    """The name of a node's operation, without its overload."""
    packet = getattr(node.target, "overloadpacket", None)
    return str(packet.__name__ if packet else getattr(node.target, "__name__", node.target))


def path_of(node: Node) -> str:
    """The path of the module that a node belongs to."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def place_of(node: Node) -> str:
    """Where in the model's source an operation stands, for errors; torch knows no line of what was typed in."""
    frames = [
        line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.lstrip().startswith("File")
    ]
    frames = [line for line in frames if _is_users(line.split('"')[1])]
    where = [path_of(node) and f"module {path_of(node)}", frames[-1] if frames else ""]
    return ", ".join(filter(None, where)) or "the model"


def capture(
    model: torch.nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    whole: Mapping[str, Shape] | None = None,
    device: str = "cpu",
) -> Captured:
    """Record what a model does with arguments of these shapes, in the mode that it is in.

    Parameters
    ----------
    model : torch.nn.Module
        It is not changed, and not run on data.
    args, kwargs
        Its arguments; a tensor on the meta device stands for one of its shape and dtype.
    whole : mapping, optional
        The global shapes of parameters of which the model holds blocks.
    device : str
        Where its arguments will be.

    Raises
    ------
    RuntimeError
        If what it does depends on data, or it holds what a record would lose: hooks, custom gradients. The text names the
        module, or the line.
    """
    # Here, since they take a quarter of a second that programs without a captured model need not spend.
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.export import export

    _check_modules(model)
    whole = whole or {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        given = tuple(args), dict(kwargs)
        args, kwargs = pytree.tree_map_only(
            torch.Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device=device), given
        )
        blocks = {n: p for n, p in model.named_parameters(remove_duplicate=False) if n in whole}
        made = {n: torch.empty(whole[n], dtype=p.dtype, device=p.device) for n, p in blocks.items()}
        parts = {id(p): torch.nn.Parameter(made[n], p.requires_grad) for n, p in blocks.items()}
    model = copy.deepcopy(model, parts) if parts else model  # not there, where no real buffer can be copied
    with _quiet(), warnings.catch_warnings(), _refusing_what_is_lost(), _uncounted(), _knowing_arange():
        warnings.simplefilter("ignore")
        try:
            program = export(model, args, kwargs, strict=False)
            _detach_regions(program.graph_module)
            program = program.run_decompositions(dict(_composites(frozenset(RULES))))  # a copy, which torch changes
        except Exception as error:
            raise RuntimeError(_why(model, error, (args, kwargs))) from error
    return _captured(program)


@lru_cache(1)
def _composites(ruled: frozenset[str]) -> dict[Any, Callable[..., Any]]:
    """torch's definitions of operations without a rule that consist of others.

    Kept, as to look through all of torch's operations takes as long as to capture a small model.
    """
    return {
        overload: definition
        for overload, definition in torch.export.default_decompositions().items()
        if (is_composite(overload) or overload.overloadpacket.__name__ in _REARRANGING)
        and overload.overloadpacket.__name__ not in {*ruled, "item"}  # which the error names
        and torch.Tag.pointwise not in overload.tags
    }


def _check_modules(model: torch.nn.Module) -> None:
    for path, module in model.named_modules():
        kind = getattr(module, "_distdl_label", type(module).__name__)
        named = f"module {path}" if path else kind
        labelled = f"{named}, {kind}," if path else kind
        if isinstance(module, Module):  # it would communicate while it is recorded
            raise RuntimeError(f"{labelled} is distributed already; {_WAYS_OUT}")
        if isinstance(module, DistributedDataParallel) or type(module).__module__.startswith("distdl_lite.parallel."):
            raise RuntimeError(f"{labelled} sends messages of its own; pass the module inside it")
        for hooks in _HOOKS:
            if getattr(module, hooks):
                raise RuntimeError(f"{named} has {hooks.strip('_')}, which would not be called")
        if isinstance(module, _BatchNorm) and module.momentum is None and module.training:
            raise RuntimeError(f"{named} has momentum=None, whose factor would depend on data; give it a number")


@contextmanager
def _refusing_what_is_lost() -> Iterator[None]:
    """Raise where torch.export would record something with the usual gradients that has others: a custom autograd Function, or
    none: what is done in inference mode.
    """
    own, enter = torch.autograd.Function.__dict__["apply"], torch.inference_mode.__enter__

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if (
            cls.__name__ == "CheckpointFunction"
        ):  # a checkpoint with reentrant backward, whose gradients are the usual ones
            return args[0](*args[2:])
        if not cls.__module__.startswith("torch."):
            raise RuntimeError(f"the custom gradient of {cls.__name__} would be lost")
        return own.__func__(cls, *args, **kwargs)

    def entered(mode: Any) -> Any:
        if mode.mode:
            raise RuntimeError("torch.inference_mode() inside a model would be lost; torch.no_grad() is not")
        return enter(mode)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[method-assign, assignment]
    torch.inference_mode.__enter__ = entered  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.autograd.Function.apply = own  # type: ignore[method-assign]
        torch.inference_mode.__enter__ = enter  # type: ignore[method-assign]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from logging whole graphs and traces, on each rank, before an error that says what they mean."""
    loggers = [logging.getLogger(name) for name in _LOUD]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _knowing_arange() -> Iterator[None]:
    """Let Python read the numbers of `torch.arange`, such as the dims of a loss's sums, which depend on no data."""
    from torch._subclasses.fake_tensor import FakeTensor

    arange, tolist = torch.arange, FakeTensor.tolist

    def made(*args: Any, **kwargs: Any) -> torch.Tensor:
        y = arange(*args, **kwargs)
        if (
            args
            and all(type(a) is int for a in args)
            and y.dtype is torch.int64
            and not {"end", "step"} & kwargs.keys()
        ):
            y._distdl_known = range(*args), y._version  # type: ignore[attr-defined]
        return y

    def read(tensor: Any) -> Any:
        numbers, version = getattr(tensor, "_distdl_known", ((), None))
        return list(numbers) if tensor._version == version else tolist(tensor)

    torch.arange, FakeTensor.tolist = made, read  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.arange, FakeTensor.tolist = arange, tolist  # type: ignore[method-assign]


@contextmanager
def _uncounted() -> Iterator[None]:
    """Tensors that are saved while a model is recorded are not for a checkpoint around the call to count."""
    saved: list[torch.Tensor] = []

    def number(tensor: torch.Tensor) -> int:
        saved.append(tensor)
        return len(saved) - 1

    try:
        with torch.autograd.graph.saved_tensors_hooks(number, saved.__getitem__):
            yield
    finally:
        saved.clear()  # a node that saved its own output would hold itself for ever


def _is_users(file: str) -> bool:
    """Whether a file is neither torch's nor ours, and is one."""
    return not file.startswith("<") and not any(Path(file).is_relative_to(folder) for folder in (_TORCHS, _OURS))


def _why(model: torch.nn.Module, error: Exception, given: Any) -> str:
    """The text of a failed capture: the line of the model, torch's reason, what it was given, and the ways out."""
    shapes = ", ".join(str(tuple(t.shape)) for t in pytree.tree_leaves(given) if isinstance(t, torch.Tensor))
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if _is_users(f.filename)]
    where = f" at {theirs[-1].filename}:{theirs[-1].lineno}, {theirs[-1].line}" if theirs else ""
    reason = str(error).strip().split("\n")[0][:300]
    return f"{type(model).__name__} cannot be captured{where}: {reason}; its arguments are {shapes} in all; {_WAYS_OUT}"


def _detach_regions(module: GraphModule) -> None:
    """Detach what leaves a region without gradients, which the next step dissolves."""
    for node in list(module.graph.nodes):
        if name_of(node) != "wrap_with_set_grad_enabled":
            continue
        if not node.args[0]:
            for output in list(node.users):
                with module.graph.inserting_after(output):
                    detached = module.graph.call_function(torch.ops.aten.detach.default, (output,))
                detached.meta = dict(output.meta)
                output.replace_all_uses_with(detached, delete_user_cb=lambda user, own=detached: user is not own)
    for inner in module.children():
        if isinstance(inner, GraphModule):
            _detach_regions(inner)


def _captured(program: Any) -> Captured:
    signature = program.graph_signature
    specs = {spec.arg.name: spec for spec in signature.input_specs}
    feeds, nodes, outputs, leaves = list[Feed](), list[Node](), list[tuple[str | None, Any]](), 0
    for node in program.graph.nodes:
        if node.op == "placeholder":
            kind, target = specs[node.name].kind.name.lower(), specs[node.name].target
            if kind == "user_input":
                target, leaves = leaves, leaves + 1
            elif kind == "constant_tensor":
                target = program.constants[target]
            elif kind not in ("parameter", "buffer"):
                what = "a check of values, as torch.linalg.solve makes," if kind == "token" else f"{target}, a {kind},"
                raise RuntimeError(f"a model with {what} is not supported")
            feeds.append(Feed(kind, target, node))
        elif node.op == "call_function":
            nodes.append(node)
        elif node.op != "output":
            raise RuntimeError(f"{place_of(node)}: {node.op} {node.target} is not supported")
    (last,) = (node for node in program.graph.nodes if node.op == "output")
    for spec, made in zip(signature.output_specs, last.args[0], strict=True):
        kind = spec.kind.name.lower()
        if kind not in ("user_output", "buffer_mutation"):
            raise RuntimeError(
                f"the model changes {spec.target or 'an input'} in place ({kind}), which is not supported"
            )
        outputs.append((spec.target if kind == "buffer_mutation" else None, made))
    return Captured(feeds, nodes, outputs, program.call_spec.out_spec)
