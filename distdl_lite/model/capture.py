"""The graph of a model's operations for inputs of global shapes, recorded by torch.export without memory or data."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from distdl_lite.layout import Shape
from distdl_lite.nn.compiler import RULES

_OURS, _TORCHS = Path(__file__).parent.parent, Path(torch.__file__).parent
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_WAYS_OUT = "write this part without it, or cut the model by hand with distdl_lite.nn's layers"


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


@dataclass(frozen=True)
class Operation:
    """One operation of the graph, as rules see it."""

    name: str
    function: Any
    outputs: tuple[tuple[Shape, torch.dtype, tuple[int, ...]], ...]  # shape, dtype and strides
    is_one: bool  # whether it returns one tensor

    @property
    def shape(self) -> Shape:
        return self.outputs[0][0]

    @property
    def dtype(self) -> torch.dtype:
        return self.outputs[0][1]

    @staticmethod
    def of(node: Node) -> Operation:
        made = node.meta["val"]
        tensors = [t for t in (made if isinstance(made, (tuple, list)) else [made]) if isinstance(t, torch.Tensor)]
        outputs = tuple((tuple(t.shape), t.dtype, t.stride()) for t in tensors)
        return Operation(name_of(node), node.target, outputs, isinstance(made, torch.Tensor))


def name_of(node: Node) -> str:
    """The name of a node's operation, without its overload."""
    packet = getattr(node.target, "overloadpacket", None)
    return str(packet.__name__ if packet else getattr(node.target, "__name__", node.target))


def path_of(node: Node) -> str:
    """The path of the module that a node belongs to."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def place_of(node: Node) -> str:
    """Where in the model's source an operation stands, for errors."""
    frames = [
        line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.lstrip().startswith("File")
    ]
    where = [path_of(node) and f"module {path_of(node)}", frames[-1] if frames else ""]
    return ", ".join(filter(None, where)) or "the model"


def capture(model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Captured:
    """Record what a model does with arguments of these shapes, in the mode that it is in.

    Parameters
    ----------
    model : torch.nn.Module
        It is not changed, and not run on data.
    args, kwargs
        Its arguments; a tensor on the meta device stands for one of its shape and dtype.

    Raises
    ------
    RuntimeError
        If what it does depends on data, or it holds what a record would lose: hooks, custom gradients. The text names the
        module, or the line.
    """
    # Here, since they take a quarter of a second that programs without a captured model need not spend.
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.export import export

    _check_hooks(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        args, kwargs = pytree.tree_map_only(
            torch.Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype), (tuple(args), dict(kwargs))
        )
    with warnings.catch_warnings(), _refusing_custom_gradients():
        warnings.simplefilter("ignore")
        try:
            program = export(model, args, kwargs, strict=False)
        except Exception as error:
            raise RuntimeError(_why(model, error)) from error
        _detach_regions(program.graph_module)
        program = program.run_decompositions(_composites())
    return _captured(program)


def _composites() -> dict[Any, Callable[..., Any]]:
    """torch's definitions of operations without a rule that consist of others, but for loops over time."""
    known = {*RULES, "lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"}
    return {
        overload: definition
        for overload, definition in torch.export.default_decompositions().items()
        if torch._C._dispatch_has_kernel_for_dispatch_key(overload.name(), "CompositeImplicitAutograd")
        and overload.overloadpacket.__name__ not in known
        and torch.Tag.pointwise not in overload.tags
    }


def _check_hooks(model: torch.nn.Module) -> None:
    for path, module in model.named_modules():
        for hooks in _HOOKS:
            if getattr(module, hooks):
                raise RuntimeError(
                    f"module {path or type(module).__name__} has {hooks.strip('_')}, which would not be called"
                )


@contextmanager
def _refusing_custom_gradients() -> Iterator[None]:
    """torch.export records what a custom autograd Function does forward, and loses its backward."""
    own = torch.autograd.Function.__dict__["apply"]

    def refuse(cls: type, *args: Any, **kwargs: Any) -> Any:
        if Path(getattr(__import__("sys").modules.get(cls.__module__), "__file__", None) or "").is_relative_to(_TORCHS):
            return own.__func__(cls, *args, **kwargs)
        raise RuntimeError(f"the custom gradient of {cls.__name__} would be lost")

    torch.autograd.Function.apply = classmethod(refuse)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.autograd.Function.apply = own  # type: ignore[method-assign]


def _why(model: torch.nn.Module, error: Exception) -> str:
    """The text of a failed capture: the line of the model, torch's reason, and the ways out."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [
        f for f in frames if not Path(f.filename).is_relative_to(_TORCHS) and not Path(f.filename).is_relative_to(_OURS)
    ]
    where = f" at {theirs[-1].filename}:{theirs[-1].lineno}, {theirs[-1].line}" if theirs else ""
    reason = str(error).strip().split("\n")[0][:300]
    return f"{type(model).__name__} cannot be captured{where}: {reason}; {_WAYS_OUT}"


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
                raise RuntimeError(f"{target}: a model that takes a {kind} is not supported")
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
