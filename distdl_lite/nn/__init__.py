"""Distributed modules: the base Module, the seven primitives, layers and losses."""

from distdl_lite.nn.conv import DistributedConv1d, DistributedConv2d, DistributedConv3d
from distdl_lite.nn.module import Module
from distdl_lite.nn.movement import (
    AllGather,
    AllSumReduce,
    Broadcast,
    HaloExchange,
    Movement,
    ReduceScatter,
    Repartition,
    SumReduce,
)
