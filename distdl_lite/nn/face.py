"""Layers with the options of torch's: torch's own layer judges them and the input, the rule of an operation does the rest."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ClassVar

import torch

from distdl_lite.layout import Shape
from distdl_lite.nn.compiler import Compiler
from distdl_lite.nn.inputs import Inputs, weight_dtype
from distdl_lite.nn.options import plain, spatial_axes
from distdl_lite.nn.rule_layer import RuleLayer
from distdl_lite.nn.value import RULES, Operation, Value
from distdl_lite.partition import Partition

Constructor = Callable[..., None]
_REFUSALS = (TypeError, ValueError, RuntimeError, IndexError, AttributeError, ArithmeticError)


class Face(RuleLayer):
    """Base of layers that take `P_x` and the arguments of torch's layer, whose attributes they have.

    What torch's constructor refuses is refused in the constructor, and what its forward refuses of a tensor of the global
    shape, at build: with torch's words, on all ranks alike.

    A subclass names torch's layer in its class statement, ``class Own(Face, serial=torch.nn.Softmax)``, and the operation whose
    rule it runs, or overrides `rule`.

    Attributes
    ----------
    operation : str
        Its name among the rules.
    options : tuple of str
        The attributes that the operation takes after its input, in this order; the layer's tensors are among them.
    for_one_point : Mapping
        Attributes with which torch's layer takes a tensor of one point, which shows it the dtype.
    needs_floating : bool
        Whether integers are refused that torch may take.
    has_channels : bool
        Whether the input is ``(N, C, *space)``, with as many spatial dims as the name of torch's layer says.
    """

    serial: type[torch.nn.Module]
    operation = ""
    options: tuple[str, ...] = ()
    for_one_point: ClassVar[Mapping[str, Any]] = {}
    needs_floating = False
    has_channels = False

    def __init_subclass__(cls, serial: type[torch.nn.Module] | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if serial is not None:
            cls.serial = serial
            constructor = getattr(cls.__init__, "__wrapped__", cls.__init__)
            cls.__init__ = _with_options(constructor, cls._arguments())  # type: ignore[method-assign]

    @classmethod
    def _arguments(cls) -> list[inspect.Parameter]:
        """The arguments of torch's layer that the constructor takes."""
        return list(inspect.signature(cls.serial).parameters.values())

    def __init__(self, P_x: Partition, **options: Any) -> None:
        super().__init__(P_x)
        self.P_x = P_x
        digit = self.serial.__name__[-2]
        if self.has_channels:
            spatial_axes(self, "P_x", P_x, int(digit) if digit.isdigit() else P_x.dim - 2)
        options = {name: plain(value) for name, value in options.items()}
        device = {"device": "meta"} if "device" in inspect.signature(self.serial).parameters else {}
        try:
            serial = self.serial(**{**options, **device})
        except _REFUSALS as error:
            given = ", ".join(f"{name}={value!r}" for name, value in options.items())
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise self._refuse(f"{given}: {error}", kind) from error
        self._take(serial, options)

    def _take(self, serial: torch.nn.Module, options: Mapping[str, Any]) -> None:
        """Set the attributes that torch's layer has by these options."""
        for name, value in vars(serial).items():
            if not name.startswith("_") and name != "training":
                setattr(self, name, value)

    def as_serial(self, **changed: Any) -> torch.nn.Module:
        """torch's layer with this one's attributes, some of them others."""
        serial = object.__new__(self.serial)
        serial.__dict__.update(self.__dict__, **changed)
        return serial

    def result_dtype(self, inputs: Inputs, shape: Shape) -> torch.dtype:
        if self.needs_floating and not (inputs.dtype.is_floating_point or inputs.dtype.is_complex):
            raise TypeError(f"the input has dtype {inputs.dtype}, a floating dtype is needed")
        self.judged((shape, inputs.dtype))
        x = torch.zeros((1,) * len(shape), dtype=inputs.dtype, device=inputs.device)
        made = self._asked(self.as_serial(**self.for_one_point), [x], f"an input of {inputs.dtype}", RuntimeError)
        return (made if isinstance(made, torch.Tensor) else made[0]).dtype  # type: ignore[no-any-return]

    def judged(self, *inputs: tuple[Shape, torch.dtype], device: str = "meta") -> Operation:
        """What torch's layer does to such tensors. Raises its TypeErrors, and as ValueErrors what else it raises."""
        if any(0 in shape for shape, _ in inputs):  # of which some of torch's functions know nothing on the meta device
            device = "cpu"
        tensors = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in inputs]
        what = f"input of shape {', '.join(str(shape) for shape, _ in inputs)}"
        return Operation.of(
            self.operation, self.serial, self._asked(self.as_serial(**self._held(device)), tensors, what)
        )

    def _held(self, device: str) -> dict[str, Any]:
        """Parameters and buffers of torch's layer, without values."""
        held = dict[str, torch.Tensor | None]()
        for name in (*self._parameters, *self._buffers, *self._distdl_places):
            dtype, place = weight_dtype(self, name), self._distdl_places.get(name)
            shape = place.global_shape if place else () if dtype is None else getattr(self, name).shape
            held[name] = None if dtype is None else torch.empty(shape, dtype=dtype, device=device)
        return {"_parameters": {}, "_buffers": held}

    def _asked(self, serial: torch.nn.Module, tensors: Any, what: str, *of_types: type[Exception]) -> Any:
        """What torch's layer makes; errors `of_types` tell of the dtype, too."""
        try:
            return serial.forward(*tensors)
        except _REFUSALS as error:
            kind = TypeError if isinstance(error, (TypeError, *of_types)) else ValueError
            raise kind(f"{error}; {what}, {self.extra_repr()}") from error

    def rule(self, c: Compiler, x: Value, **held: Value) -> Any:
        op = self.judged((x.shape, x.dtype))
        return RULES[self.operation](c, op, x, *(held.get(name, getattr(self, name)) for name in self.options))

    def extra_repr(self) -> str:
        known = [(p.name, self.__dict__[p.name], p.default) for p in self._arguments() if p.name in self.__dict__]
        given = [f"{name}={value!r}" for name, value, default in known if not (value is default is None)]
        return ", ".join([*given, f"P_x={self.P_x.shape}"])


def _with_options(constructor: Constructor, arguments: list[inspect.Parameter]) -> Constructor:
    """A constructor that takes a layer, its partition, and these arguments."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    first = [inspect.Parameter("self", kind), inspect.Parameter("P_x", kind, annotation=Partition)]
    signature = inspect.Signature([*first, *arguments], return_annotation=None)

    @wraps(constructor)
    def init(self: Face, *args: Any, **options: Any) -> None:
        try:
            given = signature.bind(self, *args, **options).arguments
        except TypeError as error:
            words = ", ".join(f"{name}={value!r}" for name, value in options.items())
            raise TypeError(f"{type(self).__name__}: {words}: {error}") from error
        constructor(**given)

    init.__signature__ = signature  # type: ignore[attr-defined]
    return init
