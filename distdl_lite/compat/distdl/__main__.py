"""``python -m distdl_lite.compat.distdl program.py args...``, or ``-m module args...``: run a program that imports distdl."""

from __future__ import annotations

import os
import runpy
import sys

from distdl_lite.compat.distdl import install
from distdl_lite.transport.abort import abort_on_exception


def main(words: list[str]) -> None:
    """Run a program or a module as ``__main__``, as Python would; an exception on one rank ends the job."""
    if not words or words == ["-m"]:
        sys.exit("usage: python -m distdl_lite.compat.distdl [-m] program [arguments]")
    install()
    abort_on_exception()
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, os.path.dirname(os.path.abspath(words[0])))
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
