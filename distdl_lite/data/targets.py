"""Files that blocks are written into."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distdl_lite.data.sources import is_zarr, needed, opened
from distdl_lite.layout import Shape

_MOST_OF_A_CHUNK = 2**20  # points


class Target:
    """An array of a file that this rank writes into.

    Attributes
    ----------
    by_one : bool
        Whether the file takes one writer at a time.
    """

    by_one = False

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name

    def found(self) -> tuple[Shape, Any, Shape]:
        """Shape, dtype and chunks, which are written whole, of the array that is there."""
        array = opened(self.path, self.name)
        chunks = getattr(array, "shards", None) or getattr(array, "chunks", None) or (1,) * len(array.shape)
        return tuple(array.shape), np.dtype(array.dtype).newbyteorder("="), tuple(chunks)

    def exists(self) -> bool:
        return self.path.exists()

    def create(self, shape: Shape, dtype: Any, chunks: Shape | None, block: Shape) -> None:
        raise NotImplementedError

    def open(self) -> None:
        """Open it; each rank that writes does before it writes."""

    def put(self, slices: tuple[slice, ...], values: np.ndarray) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Write what is not yet written."""


class _Npy(Target):
    def create(self, shape: Shape, dtype: Any, chunks: Shape | None, block: Shape) -> None:
        if chunks is not None:
            raise ValueError("a .npy file has no chunks")
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        with open(self.path, "xb") as file:
            try:
                np.lib.format.write_array_header_1_0(file, header)
                size = file.tell() + math.prod(shape) * dtype.itemsize
                file.truncate(size)
                if hasattr(
                    os, "posix_fallocate"
                ):  # on a full disk it raises; writing to a mapping would end the process
                    os.posix_fallocate(file.fileno(), 0, size)
            except OSError:
                self.path.unlink()
                raise

    def open(self) -> None:
        np.load(self.path, mmap_mode="r+")

    def put(self, slices: tuple[slice, ...], values: np.ndarray) -> None:
        np.load(self.path, mmap_mode="r+")[slices] = values  # mapped for this alone: its pages count as the process's


class _Zarr(Target):
    def exists(self) -> bool:
        return (self.path / self.name / "zarr.json").exists() or (self.path / self.name / ".zarray").exists()

    def create(self, shape: Shape, dtype: Any, chunks: Shape | None, block: Shape) -> None:
        zarr = needed("zarr", "zarr")
        options = {"shape": shape, "dtype": dtype, "chunks": chunks or chunks_of(block)}
        if self.name:
            zarr.open_group(str(self.path), mode="a").create_array(self.name, **options)
        else:
            zarr.create_array(str(self.path), **options)

    def open(self) -> None:
        self._array = needed("zarr", "zarr").open_array(str(self.path), path=self.name or None, mode="r+")

    def put(self, slices: tuple[slice, ...], values: np.ndarray) -> None:
        self._array[slices] = values


class _Hdf5(Target):
    by_one = True

    def exists(self) -> bool:
        if not self.path.exists():
            return False
        with needed("h5py", "hdf5").File(self.path, "r") as file:
            return self.name in file

    def create(self, shape: Shape, dtype: Any, chunks: Shape | None, block: Shape) -> None:
        with needed("h5py", "hdf5").File(self.path, "a") as file:
            file.create_dataset(self.name, shape, dtype, chunks=chunks)

    def open(self) -> None:
        self._file = needed("h5py", "hdf5").File(self.path, "r+")

    def put(self, slices: tuple[slice, ...], values: np.ndarray) -> None:
        self._file[self.name][slices] = values

    def close(self) -> None:
        self._file.close()


def target_of(path: Path, name: str) -> Target:
    """The target at a path."""
    if path.suffix in (".nc", ".nc4", ".cdf"):
        raise ValueError("netCDF files are read only: write .npy, HDF5 or Zarr")
    return (_Npy if path.suffix == ".npy" else _Zarr if is_zarr(path) else _Hdf5)(path, name)


def chunks_of(block: Sequence[int]) -> Shape:
    """Chunks for a block: it, halved along its longest dim until it is small.

    >>> chunks_of((1, 3, 2048, 2048))
    (1, 3, 512, 512)
    """
    chunks = [max(1, n) for n in block]
    while math.prod(chunks) > _MOST_OF_A_CHUNK:
        longest = chunks.index(max(chunks))
        chunks[longest] = -(-chunks[longest] // 2)
    return tuple(chunks)
