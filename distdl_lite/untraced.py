"""What torch.compile leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch._C._dynamo import eval_frame

Function = TypeVar("Function", bound=Callable[..., Any])


def untraced(function: Function) -> Function:
    """Let torch.compile call a function, and all that this calls, as it is: what communicates is not for it to trace.

    As torch.compiler.disable, without its import of Dynamo, of seconds, and its 1 us a call.
    """
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    if hasattr(eval_frame, "_FrameExecStrategy"):
        skip = eval_frame._FrameAction.SKIP
        eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, skip))
    return function
