"""Where DistDL's names stand: its modules, made from one table."""

from __future__ import annotations

import operator
import sys
from types import ModuleType

from distdl_lite.compat.distdl import helpers, layers, partitions
from distdl_lite.transport import uses_torch

PACKAGE = __name__.rpartition(".")[0]
# Modules and their names, which the folder around a module has too; "New=Old" is another name of an object.
TABLE = """
backend
backends
backends.common
backends.common.partition       MPIPartition MPICartesianPartition
backends.common.tensor_comm     assemble_global_tensor_structure
backends.mpi                    Partition=MPIPartition CartesianPartition=MPICartesianPartition
backends.mpi.partition          MPIPartition MPICartesianPartition
backends.mpi.tensor_comm        assemble_global_tensor_structure
config
functional                      ZeroVolumeCorrectorFunction
nn
nn.all_sum_reduce               AllSumReduce
nn.batchnorm                    DistributedBatchNorm
nn.broadcast                    Broadcast
nn.conv                         DistributedConv1d DistributedConv2d DistributedConv3d
nn.conv_channel                 DistributedChannelConv1d=DistributedConv1d DistributedChannelConv2d=DistributedConv2d
nn.conv_channel                 DistributedChannelConv3d=DistributedConv3d
nn.conv_feature                 DistributedFeatureConv1d=DistributedConv1d DistributedFeatureConv2d=DistributedConv2d
nn.conv_feature                 DistributedFeatureConv3d=DistributedConv3d
nn.conv_general                 DistributedGeneralConv1d=DistributedConv1d DistributedGeneralConv2d=DistributedConv2d
nn.conv_general                 DistributedGeneralConv3d=DistributedConv3d
nn.halo_exchange                HaloExchange
nn.interpolate                  Interpolate
nn.linear                       DistributedLinear
nn.loss                         DistributedL1Loss DistributedMSELoss DistributedPoissonNLLLoss
nn.loss                         DistributedBCELoss DistributedBCEWithLogitsLoss DistributedKLDivLoss
nn.module                       Module
nn.padnd                        PadNd
nn.pooling                      DistributedAvgPool1d DistributedAvgPool2d DistributedAvgPool3d
nn.pooling                      DistributedMaxPool1d DistributedMaxPool2d DistributedMaxPool3d
nn.repartition                  Repartition
nn.sum_reduce                   SumReduce
nn.transpose                    DistributedTranspose
nn.unpadnd                      UnpadNd
nn.upsampling                   DistributedUpsample
utilities
utilities.debug                 print_sequential
utilities.index_tricks          cartesian_index_c cartesian_index_f
utilities.misc                  Bunch DummyContext
utilities.slicing               assemble_index_filter assemble_slices compute_intersection compute_nd_slice_shape
utilities.slicing               compute_start_index compute_stop_index compute_subshape
utilities.slicing               filtered_range_index range_index worker_layout
utilities.torch                 NoneTensor TensorStructure ZeroVolumeCorrectorFunction
utilities.torch                 distdl_padding_to_torch_padding zero_volume_tensor
"""


def fill(package: ModuleType) -> None:
    """Put the modules of the table into a package."""
    ours = vars(partitions) | vars(helpers) | vars(layers)
    for path, *names in map(str.split, TABLE.split("\n")[1:-1]):
        above, _, last = f"{PACKAGE}.{path}".rpartition(".")
        if f"{above}.{last}" not in sys.modules:
            made = sys.modules[f"{above}.{last}"] = ModuleType(f"{above}.{last}")
            made.__path__ = []
            setattr(sys.modules[above], last, made)
        for new, _, old in (name.partition("=") for name in names):
            for place in (sys.modules[f"{above}.{last}"], sys.modules[above]):
                if place is not package:
                    setattr(place, new, ours[old or new])
    package.backend.backend = package.backends.mpi
    package.config.config = helpers.Bunch(backend="mpi")


def install() -> None:
    """Let ``import distdl`` find this package, in this process; under torchrun also ``from mpi4py import MPI`` a small stand-in.

    Raises
    ------
    RuntimeError
        If another DistDL has been imported already.
    """
    if sys.modules.get("distdl", sys.modules[PACKAGE]) is not sys.modules[PACKAGE]:
        raise RuntimeError("another distdl has been imported: install() comes before its first import")
    for name, module in list(sys.modules.items()):
        if name == PACKAGE or name.startswith(f"{PACKAGE}."):
            sys.modules["distdl" + name.removeprefix(PACKAGE)] = module
    if uses_torch():
        MPI = sys.modules["mpi4py.MPI"] = ModuleType("mpi4py.MPI")
        vars(MPI).update(
            COMM_WORLD=partitions.Comm(), COMM_NULL=object(), SUM=operator.add, Is_initialized=lambda: False
        )
        sys.modules["mpi4py"] = ModuleType("mpi4py")
        vars(sys.modules["mpi4py"]).update(MPI=MPI, __path__=[])
