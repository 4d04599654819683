"""Find the objects of a photograph that no rank reads or writes whole.

    mpirun -n 4 python docs/examples/in_blocks.py

The photograph is the Hubble Deep Field that scikit-image ships, 872 x 1000 pixels, here in an HDF5 file in chunks. Each rank
reads its block, cut where chunks end, and no chunk is read twice. Mean and standard deviation of each colour are those of the
whole picture. A network of plain torch with given weights then smooths the picture at two scales, and subtracts: what stands
out, and is the greatest of its neighbourhood, is an object. Its output, in blocks as uneven as its input, is written into a
Zarr array.

At the end rank 0 reads both files and runs the same network on the whole picture, which a real job could not.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import h5py
import skimage.data
import torch
import torch.nn.functional as F
import zarr
from torch import nn

import distdl_lite as dl
from distdl_lite.data import Blocks, statistics, write_blocks

GRIDS = {1: (1, 1), 2: (1, 2), 3: (3, 1), 4: (2, 2)}
THRESHOLD = 0.5  # standard deviations of a pixel


class Objects(nn.Module):
    """How much each pixel of a normalised picture (1, 3, H, W) stands out, where it is the greatest near it; else 0."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = (nn.Conv2d(1, 1, 6 * sigma + 1, padding=3 * sigma, bias=False) for sigma in (1, 3))
        for conv, sigma in ((self.small, 1.0), (self.large, 3.0)):
            bell = torch.exp(-(torch.arange(-3 * sigma, 3 * sigma + 1) ** 2) / (2 * sigma**2))
            conv.weight = nn.Parameter((bell[:, None] * bell / bell.sum() ** 2)[None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.mean(1, keepdim=True)
        y = self.small(x) - self.large(x)
        return torch.where((y > THRESHOLD) & (y == F.max_pool2d(y, 7, 1, 3)), y, torch.zeros_like(y))


def normalised(x: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Colours, the first of three dims, with mean 0 and standard deviation 1."""
    return (x - mean.float()[:, None, None]) / std.float()[:, None, None]


@torch.no_grad()
def run(P: Any, folder: Path) -> tuple[int, float] | None:
    """Read, find and write; on rank 0 how many objects there are, and the largest difference to the whole picture at once."""
    photograph, found = f"{folder}/hubble.h5::image", f"{folder}/objects.zarr"
    if P.rank == 0:  # such a file is there in a real job
        with h5py.File(folder / "hubble.h5", "w") as file:
            file.create_dataset(
                "image", data=skimage.data.hubble_deep_field(), chunks=(128, 128, 3), compression="gzip"
            )
    P.broadcast_data(None)
    colours_first = None, 2, 0, 1  # the file has height, width, colours, and is one sample
    mean, std = statistics(Blocks(photograph, P, dims=colours_first), dim=0)
    blocks = Blocks(
        photograph, P, dims=colours_first, align="chunks", transform=lambda x: normalised(x.float(), mean, std)
    )
    network = Objects()
    y = dl.distribute(network, P)(blocks[0][None])
    write_blocks(found, y, P, dims=(None, None, 0, 1), chunks=(128, 128))
    if P.rank != 0:
        return None
    print(f"blocks end at {blocks.bounds[1:]}; read for each byte needed: {blocks.amplification.everywhere}, balanced blocks: "
          f"{Blocks(photograph, P, dims=colours_first).amplification.everywhere:.2f}")  # fmt: skip
    image = torch.from_numpy(skimage.data.hubble_deep_field()).permute(2, 0, 1).double()
    serial = network(normalised(image, image.mean((1, 2)), image.std((1, 2), correction=0)).float()[None])
    written = torch.from_numpy(zarr.open_array(found, mode="r")[:])
    return int(written.count_nonzero()), (written - serial[0, 0]).abs().max().item()


def main() -> None:
    dl.abort_on_exception()
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--folder", help="where the files go, which all ranks see; by default one that is removed at the end"
    )
    options, world = parser.parse_args(), dl.Partition.world()
    if world.size not in GRIDS:
        parser.error(f"there are grids for {', '.join(map(str, GRIDS))} ranks, not for {world.size}")
    with tempfile.TemporaryDirectory() as own:
        folder = world.broadcast_data(options.folder or own)
        result = run(world.grid((1, 1, *GRIDS[world.size])), Path(folder))
        world.allgather_data(None)  # rank 0's folder stays until all have written
    if result:
        print(f"{result[0]} objects; largest difference to the whole picture at once: {result[1]:.1e}")


if __name__ == "__main__":
    main()
