"""Distributed modules: the base Module, the seven primitives, layers and losses."""

from distdl_lite.nn.adaptive_pool import (
    DistributedAdaptiveAvgPool1d,
    DistributedAdaptiveAvgPool2d,
    DistributedAdaptiveAvgPool3d,
    DistributedAdaptiveMaxPool1d,
    DistributedAdaptiveMaxPool2d,
    DistributedAdaptiveMaxPool3d,
)
from distdl_lite.nn.class_loss import DistributedCrossEntropyLoss, DistributedNLLLoss
from distdl_lite.nn.conv import DistributedConv1d, DistributedConv2d, DistributedConv3d
from distdl_lite.nn.conv_transpose import (
    DistributedConvTranspose1d,
    DistributedConvTranspose2d,
    DistributedConvTranspose3d,
)
from distdl_lite.nn.dropout import (
    DistributedDropout,
    DistributedDropout1d,
    DistributedDropout2d,
    DistributedDropout3d,
)
from distdl_lite.nn.embedding import DistributedEmbedding
from distdl_lite.nn.fft import DistributedFFT
from distdl_lite.nn.flatten import DistributedFlatten
from distdl_lite.nn.group_norm import DistributedGroupNorm
from distdl_lite.nn.layer_norm import DistributedLayerNorm, DistributedRMSNorm
from distdl_lite.nn.linear import DistributedLinear
from distdl_lite.nn.loss import (
    DistributedBCELoss,
    DistributedBCEWithLogitsLoss,
    DistributedHuberLoss,
    DistributedKLDivLoss,
    DistributedL1Loss,
    DistributedMSELoss,
    DistributedPoissonNLLLoss,
    DistributedSmoothL1Loss,
)
from distdl_lite.nn.mean import DistributedMean
from distdl_lite.nn.module import Call, Module
from distdl_lite.nn.movement import Movement, agreed_inputs
from distdl_lite.nn.norm import DistributedBatchNorm, DistributedInstanceNorm
from distdl_lite.nn.pad import (
    DistributedCircularPad1d,
    DistributedCircularPad2d,
    DistributedCircularPad3d,
    DistributedConstantPad1d,
    DistributedConstantPad2d,
    DistributedConstantPad3d,
    DistributedReflectionPad1d,
    DistributedReflectionPad2d,
    DistributedReflectionPad3d,
    DistributedReplicationPad1d,
    DistributedReplicationPad2d,
    DistributedReplicationPad3d,
    DistributedZeroPad1d,
    DistributedZeroPad2d,
    DistributedZeroPad3d,
)
from distdl_lite.nn.parallel_linear import DistributedColumnParallelLinear, DistributedRowParallelLinear
from distdl_lite.nn.parameter import Layer
from distdl_lite.nn.pool import (
    DistributedAvgPool1d,
    DistributedAvgPool2d,
    DistributedAvgPool3d,
    DistributedMaxPool1d,
    DistributedMaxPool2d,
    DistributedMaxPool3d,
)
from distdl_lite.nn.primitives import (
    AllGather,
    AllSumReduce,
    Broadcast,
    HaloExchange,
    ReduceScatter,
    Repartition,
    SumReduce,
)
from distdl_lite.nn.softmax import DistributedLogSoftmax, DistributedSoftmax
from distdl_lite.nn.upsample import DistributedUpsample
