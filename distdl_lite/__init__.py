"""Distributed PyTorch layers over MPI: every data movement a linear operator with its exact adjoint."""

from distdl_lite import nn
from distdl_lite.layout import Layout
from distdl_lite.nn.movement import gather, scatter, zero_volume_tensor
from distdl_lite.operator import Operator
from distdl_lite.partition import CartesianPartition, Partition
from distdl_lite.plan import Plan, plan

__version__ = "0.1.0"
