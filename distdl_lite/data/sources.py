"""Arrays that are read in slices: in memory, in .npy, HDF5, Zarr and netCDF files, in many files with a sample each."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distdl_lite.data.boxes import part, parts_of
from distdl_lite.grid import indices
from distdl_lite.layout import shape_of

# That are read at once: the pages of a mapping count as memory, and Zarr holds the chunks of all that it is asked for.
MOST_BYTES = 2**24
_NETCDF = (".nc", ".nc4", ".cdf")


class Source:
    """An array that is sliced. Each process opens the file for itself: handles do not outlive a fork.

    Attributes
    ----------
    name : str
        For errors.
    shape, chunks : tuple of int
        Chunks of ones where the array is stored in none.
    dtype : torch.dtype
    names : tuple of str or None
        Of the dims, where they have names.
    """

    def __init__(self, name: str, opened: Callable[[], Any], held: Any = None) -> None:
        self.name, self._opened = name, opened
        self._held, self._process = held, os.getpid()
        array = self.array
        self._is_fresh = _library(array) == "h5py"  # which reads into new memory
        self.shape, self._numpy = tuple(map(int, array.shape)), np.dtype(array.dtype).newbyteorder("=")
        self.dtype = torch_dtype(self._numpy, name)
        self.chunks = _chunks(array)
        self.names = tuple(map(str, array.dims)) if _library(array) == "xarray" else None

    @property
    def array(self) -> Any:
        if self._held is None or self._process != os.getpid():
            self._held, self._process = self._opened(), os.getpid()
        return self._held

    def read(self, slices: tuple[slice, ...]) -> torch.Tensor:
        """A slice in memory of its own."""
        if self._is_fresh:
            return torch.from_numpy(np.asarray(self.array[slices], self._numpy))
        box = [(s.start, s.stop) for s in slices]
        found = np.empty(shape_of(tuple(box)), self._numpy)
        parts = parts_of(found.shape, self.chunks, max(1, MOST_BYTES // self._numpy.itemsize))
        for number in indices(parts):
            piece = [part(*given) for given in zip(box, self.chunks, number, parts, strict=True)]
            here = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(piece, box, strict=True))
            found[here] = self.array[tuple(slice(*side) for side in piece)]
        return torch.from_numpy(found)

    def coords(self, slices: tuple[slice, ...]) -> Any:
        """The labels of a slice of an xarray, by the names of their dims; of others none."""
        return {} if self.names is None else self.array[slices].coords

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": None}


class _Mapped(Source):
    """A .npy file, mapped for each read alone: the pages of a mapping count as the process's until it goes."""

    @property
    def array(self) -> Any:
        return self._opened()


class _Files(Source):
    """A list of arrays of one shape and dtype, as an array with one dim more; each is opened when it is read."""

    def __init__(self, files: list[Any]) -> None:
        if not files:
            raise ValueError("Blocks: a list of no files has no samples")
        for file in files:
            if isinstance(file, (str, os.PathLike, tuple)) and not located(file)[0].exists():
                raise FileNotFoundError(f"{located(file)[0]} does not exist")
        first = source_of(files[0])
        self.files, self.name, self.dtype = files, f"{len(files)} files like {first.name}", first.dtype
        self.shape, self.chunks = (len(files), *first.shape), (1, *first.chunks)
        self.names = None if first.names is None else ("sample", *first.names)

    def read(self, slices: tuple[slice, ...]) -> torch.Tensor:
        parts = [self._like_the_first(file).read(slices[1:]) for file in self.files[slices[0]]]
        return parts[0][None] if len(parts) == 1 else torch.stack(parts)

    def _like_the_first(self, file: Any) -> Source:
        source = source_of(file)
        if (source.shape, source.dtype) != (self.shape[1:], self.dtype):
            raise ValueError(
                f"{source.name} has shape {source.shape} and {source.dtype}, the first file {self.shape[1:]} and {self.dtype}"
            )
        return source

    def coords(self, slices: tuple[slice, ...]) -> Any:
        return source_of(self.files[0]).coords(slices[1:])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__


def source_of(given: Any) -> Source:
    """The source of what a user gives: an array, a path, a pair of path and name, or a list of these."""
    if isinstance(given, list):
        return _Files(given)
    if isinstance(given, (str, os.PathLike, tuple)):
        path, name = located(given)
        kind = _Mapped if path.suffix == ".npy" else Source
        return kind(f"{path}::{name}" if name else str(path), partial(opened, path, name))
    if isinstance(given, torch.Tensor):
        given = given.numpy()
    if not hasattr(given, "shape") or not hasattr(given, "dtype"):
        raise TypeError(f"Blocks: {type(given).__name__} is neither an array nor the path of one, nor a list of them")
    library = _library(given)
    if library == "h5py":
        return Source(f"{given.file.filename}::{given.name}", partial(_hdf5, given.file.filename, given.name), given)
    if library == "netCDF4":
        group = given.group()
        return Source(given.name, partial(_netcdf, group.filepath(), f"{group.path.strip('/')}/{given.name}"))
    if isinstance(given, np.memmap) and given.base is not None and not isinstance(given.base, np.ndarray):
        order = "C" if given.flags.c_contiguous else "F"
        again = partial(np.memmap, given.filename, given.dtype, "r", given.offset, given.shape, order)
        return Source(str(given.filename), again, given)
    return Source(library, partial(_reopened, given), given)


def located(given: Any) -> tuple[Path, str]:
    """The path and the name in the file of "path::name", of a pair, or of a path alone.

    Raises
    ------
    ValueError
        If a file that holds several arrays is given without a name.
    """
    path, name = given if isinstance(given, tuple) else os.fspath(given).partition("::")[::2]
    path = Path(path)
    if not name and path.suffix not in (".npy", ".zarr") and not path.is_dir():
        raise ValueError(
            f"{path}: which array of it? Write {path}::NAME; without a name there are .npy files and Zarr arrays"
        )
    return path, name


def is_zarr(path: Path) -> bool:
    return path.suffix == ".zarr" or path.is_dir()


def opened(path: Path, name: str) -> Any:
    """The array of a file, to be read."""
    if path.suffix == ".npy":
        return np.load(path, mmap_mode="r")
    if is_zarr(path):
        return needed("zarr", "zarr").open_array(str(path), path=name or None, mode="r")
    return _netcdf(path, name) if path.suffix in _NETCDF else _hdf5(path, name)


def _hdf5(path: Any, name: str) -> Any:
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} does not exist")
    file = needed("h5py", "hdf5").File(path, "r")
    if not hasattr(file.get(name), "shape"):
        raise ValueError(f"{path} has no dataset {name!r}, but {sorted(file)}")
    return file[name]


def _netcdf(path: Any, name: str) -> Any:
    group, _, variable = name.rpartition("/")
    file = needed("xarray", "netcdf").open_dataset(path, group=group or None, cache=False)
    if variable not in file.variables:
        raise ValueError(f"{path} has no variable {name!r}, but {sorted(file.variables)}")
    return file[variable]


def _reopened(array: Any) -> Any:
    """An array in another process than it was given in; the files that xarray reads in it are opened anew."""
    if _library(array) == "xarray":
        import_module("xarray.backends.file_manager").FILE_CACHE.clear()
    return array


def needed(module: str, extra: str) -> Any:
    """An optional module.

    Raises
    ------
    ImportError
        If it is missing, with the command that installs it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} is needed for such files: pip install 'distdl_lite[{extra}]'") from error


def _library(array: Any) -> str:
    return type(array).__module__.partition(".")[0]


def _chunks(array: Any) -> tuple[int, ...]:
    """The chunks in which an array is stored; those of a part of an xarray may begin elsewhere, and are not known."""
    found = getattr(array, "chunks", None) if _library(array) in ("h5py", "zarr") else None
    if _library(array) == "xarray" and array.encoding.get("original_shape") == array.shape:
        found = array.encoding.get("chunksizes")
    return tuple(found or (1,) * len(array.shape))


def torch_dtype(dtype: Any, name: str) -> torch.dtype:
    """Torch's dtype for one of NumPy.

    Raises
    ------
    TypeError
        If there is none.
    """
    try:
        return torch.from_numpy(np.empty(0, dtype)).dtype
    except TypeError:
        raise TypeError(f"{name}: torch has no dtype for NumPy's {dtype}") from None
