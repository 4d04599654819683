"""A rank's program in the making: lines of Python over named objects."""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distdl_lite.nn.value import Value
from distdl_lite.transport.frames import PROGRAM


@dataclass
class Line:
    """A line of the program and the variables that it reads."""

    text: str
    reads: tuple[str, ...]
    path: str

    @property
    def writes(self) -> list[str]:
        """The variables that it sets."""
        return self.text.partition(" = ")[0].rstrip(", ").split(", ")


class Source:
    """Lines, and the objects that they name; base of the compiler."""

    def __init__(self) -> None:
        self.path = ""  # of the module that is compiled
        self.lines: list[Line] = []
        self.names: dict[str, Any] = {}
        self._numbers: dict[str, int] = {}

    def constant(self, value: Any, name: str = "") -> str:
        """The name of an object in the program."""
        packet = getattr(value, "overloadpacket", value)  # of an operation of torch
        name = self._unique(name or getattr(packet, "__name__", "") or type(value).__name__)
        self.names[name] = value
        return name

    def _unique(self, name: str) -> str:
        name = re.sub(r"\W+", "_", name).strip("_") or "k"
        name = f"{name}_" if keyword.iskeyword(name) or name[0].isdigit() else name
        self._numbers[name] = number = self._numbers.get(name, 0) + 1
        return name if number == 1 and name != "v" else f"{name}{'' if name == 'v' else '_'}{number}"

    def _word(self, value: Any, reads: list[str]) -> str:
        """An argument in the text of the program."""
        if isinstance(value, Value):
            reads.append(value.name)
            return value.name
        if isinstance(value, (list, tuple)):
            words = [self._word(v, reads) for v in value]
            return f"[{', '.join(words)}]" if isinstance(value, list) else f"({''.join(f'{w}, ' for w in words)})"
        if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
            return repr(value)
        if isinstance(value, torch.dtype):
            self.names["torch"] = torch
            return str(value)
        return self.constant(value)

    def emit(self, text: str, reads: Iterable[str] = ()) -> None:
        self.lines.append(Line(text, tuple(reads), self.path))

    def _materialise(self, value: Value) -> None:
        """Let the program make the value, if it is one that is made late."""
        raise NotImplementedError

    def steps(self, outputs: Sequence[Value]) -> Iterator[tuple[Line, list[str]]]:
        """The lines in turn, and the variables that are used up after each."""
        for value in outputs:
            self._materialise(value)
        last = {name: number for number, line in enumerate(self.lines) for name in line.reads}
        kept = {v.name for v in outputs}
        for number, line in enumerate(self.lines):
            used = {name for name in (*line.reads, *line.writes) if last.get(name, number) == number}
            yield line, sorted(used - kept)

    def source(self, inputs: Sequence[Value], outputs: Sequence[Value], marks: bool = False) -> str:
        """The program as Python; a variable goes as soon as it is used up.

        Where a module begins there is its path, in a comment or a call of `mark`.
        """
        path, last, text = "", "", [f"def forward({', '.join(v.given for v in inputs)}):"]
        for line, dead in self.steps(outputs):
            if line.path != path:
                path = line.path
                text.append(f"    mark({path!r}{last})" if marks else f"    # {path}")
            text.append(f"    {line.text}")
            last = "" if line.writes[-1] in dead else f", {line.writes[-1]}"
            if dead:
                text.append(f"    del {', '.join(dead)}")
        return "\n".join([*text, f"    return ({''.join(f'{v.name}, ' for v in outputs)})"])

    def mark(self, path: str, value: Any = None) -> None:
        """Take note that the forward of a module begins, after the one that ended with a value."""

    def compiled(self, inputs: Sequence[Value], outputs: Sequence[Value]) -> Callable[..., tuple[torch.Tensor, ...]]:
        """The program as a function of this rank's blocks."""
        source = self.source(inputs, outputs, marks=True)  # before names are copied: it names what it makes late
        names = {"mark": self.mark, **self.names}
        exec(compile(source, PROGRAM, "exec"), names)
        return names["forward"]  # type: ignore[no-any-return]
