"""`python -m distdl_lite checkpoint`: list, verify, compare and export checkpoints; no ranks are needed."""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from distdl_lite.checkpoint.files import Checkpoint, Stored, faults, read_checkpoint
from distdl_lite.text import columns


def add(commands: Any) -> None:
    """Add the command to those of the command line."""
    told = commands.add_parser("checkpoint", help="list, verify, compare or export checkpoints; needs no ranks")
    actions = told.add_subparsers(required=True, metavar="ACTION")
    for run, about, more in (
        (ls, "names, shapes, dtypes and pieces, and what is kept beside tensors", ()),
        (verify, "read all files and compare their hashes; exit code 1 if something is wrong", ()),
        (diff, "what differs from another checkpoint; exit code 1 if anything does", ("OTHER",)),
        (export, "write the model's whole tensors to one safetensors file", ("FILE",)),
    ):
        action = actions.add_parser(run.__name__, help=about)
        for name in ("DIR", *more):
            action.add_argument(name.lower(), metavar=name)
        action.set_defaults(run=run)


def ls(arguments: argparse.Namespace) -> str:
    made = read_checkpoint(arguments.dir)
    rows = [(name, _kind(t), f"pieces: {len(t.pieces)}", f"{_bytes(t):,} bytes") for name, t in made.tensors.items()]
    plain = [(name, str(value)[:100]) for name, value in made.objects.items() if not name.startswith("rank.")]
    return "\n\n".join([repr(made), *(columns(lines) for lines in (rows, plain) if lines)])


def verify(arguments: argparse.Namespace) -> str:
    began = time.perf_counter()
    if texts := faults(arguments.dir):
        sys.exit("\n".join(texts))
    return f"{read_checkpoint(arguments.dir)!r}: as it was written ({time.perf_counter() - began:.1f} s)"


def diff(arguments: argparse.Namespace) -> str:
    one, other = read_checkpoint(arguments.dir), read_checkpoint(arguments.other)
    if one.kind != other.kind:
        one, other = one.of_model(), other.of_model()
    names = dict.fromkeys((*one, *other, *one.objects, *other.objects))
    rows = [(name, text) for name in names if (text := _difference(name, one, other))]
    if rows:
        print(columns(rows))
        sys.exit(1)
    return f"{len(one)} tensors are equal"


def _difference(name: str, one: Checkpoint, other: Checkpoint) -> str:
    if name.startswith("rank."):
        return ""
    if name not in one.tensors or name not in other.tensors:
        a, b = (made.objects.get(name) for made in (one, other))
        lacking = next((made for made in (one, other) if name not in (*made.tensors, *made.objects)), None)
        return f"not in {lacking.path}" if lacking else "" if a == b else f"{a} and {b}"
    kinds = [_kind(made.tensors[name]) for made in (one, other)]
    if kinds[0] != kinds[1]:
        return " and ".join(kinds)
    a, b = one[name], other[name]
    if a.numel() == 0 or torch.equal(a, b):
        return ""
    wide = torch.complex128 if a.is_complex() else torch.float64
    return f"largest difference {(a.to(wide) - b.to(wide)).abs().max().item():.3g}"


def export(arguments: argparse.Namespace) -> str:
    if Path(arguments.file).suffix != ".safetensors" or Path(arguments.file).exists():
        raise ValueError(f"{arguments.file} exists already, or is no name of a .safetensors file")
    tensors = dict(read_checkpoint(arguments.dir).of_model())
    wide = [name for name, tensor in tensors.items() if tensor.dtype is torch.complex128]
    if wide:
        raise ValueError(f"safetensors files hold no complex128, which {wide[0]} is")
    save_file(tensors, arguments.file, metadata={"format": "pt"})
    return f"{arguments.file}: {len(tensors)} tensors"


def _kind(stored: Stored) -> str:
    return f"{str(stored.dtype).removeprefix('torch.')} {'x'.join(map(str, stored.shape)) or 'scalar'}"


def _bytes(stored: Stored) -> int:
    return math.prod(stored.shape) * stored.dtype.itemsize
