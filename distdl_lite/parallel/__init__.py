"""Data-parallel containers."""

from distdl_lite.parallel import hooks

__all__ = ["hooks"]
