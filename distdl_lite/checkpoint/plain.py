"""What a program keeps beside tensors, such as the state of a scheduler, as JSON and back, exactly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch


def encoded(value: Any, where: str, tensors: MutableMapping[str, torch.Tensor] | None = None) -> Any:
    """A value for JSON: numbers, texts, None, lists, tuples, dicts, Counters and tensors of one number.

    Other tensors go into `tensors`, if that is given, under the name of their place.

    Raises
    ------
    TypeError
        For anything else; the text says `where` it stands.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor) and not value.dim() and not value.is_complex():
        return {"~tensor": [value.item(), str(value.dtype).removeprefix("torch.")]}
    if isinstance(value, torch.Tensor) and tensors is not None:
        tensors[where] = value.detach()
        return {"~tensor": where}
    if isinstance(value, Mapping):
        items = {key: encoded(item, f"{where}.{key}", tensors) for key, item in value.items()}
        if type(value) is not Counter and all(isinstance(key, str) and key[:1] != "~" for key in items):
            return items
        kind = "Counter" if isinstance(value, Counter) else "dict"
        return {f"~{kind}": [[encoded(key, where), item] for key, item in items.items()]}
    if isinstance(value, (list, tuple)):
        listed = [encoded(item, f"{where}.{number}", tensors) for number, item in enumerate(value)]
        return listed if isinstance(value, list) else {"~tuple": listed}
    raise TypeError(
        f"{where} is a {type(value).__name__}: a checkpoint holds numbers, texts, None, lists, tuples and dicts of such"
    )


def decoded(value: Any, tensors: Mapping[str, torch.Tensor] | None = None) -> Any:
    """The value that `encoded` was given."""
    if isinstance(value, list):
        return [decoded(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    kind, items = next(iter(value.items()), ("", None))
    if not kind.startswith("~"):
        return {key: decoded(item, tensors) for key, item in value.items()}
    if kind != "~tensor":
        made = decoded(items, tensors)
        return tuple(made) if kind == "~tuple" else Counter(dict(made)) if kind == "~Counter" else dict(made)
    if isinstance(items, list):
        return torch.tensor(items[0], dtype=getattr(torch, items[1]))
    assert tensors is not None
    return tensors[items]
