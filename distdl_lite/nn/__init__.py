"""Distributed modules: the base Module, the seven primitives, layers and losses."""

from distdl_lite.nn.conv import rules as _rules_of_convolutions  # registers them
from distdl_lite.nn.conv.conv import DistributedConv1d, DistributedConv2d, DistributedConv3d
from distdl_lite.nn.conv.conv_transpose import (
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
from distdl_lite.nn.inputs import agreed_inputs
from distdl_lite.nn.linear import rules as _rules_of_linear_layers
from distdl_lite.nn.linear.embedding import DistributedEmbedding
from distdl_lite.nn.linear.linear import DistributedLinear
from distdl_lite.nn.linear.parallel_linear import DistributedColumnParallelLinear, DistributedRowParallelLinear
from distdl_lite.nn.loss.class_loss import DistributedCrossEntropyLoss, DistributedNLLLoss
from distdl_lite.nn.loss.loss import (
    DistributedBCELoss,
    DistributedBCEWithLogitsLoss,
    DistributedHuberLoss,
    DistributedKLDivLoss,
    DistributedL1Loss,
    DistributedMSELoss,
    DistributedPoissonNLLLoss,
    DistributedSmoothL1Loss,
)
from distdl_lite.nn.module import Call, Module
from distdl_lite.nn.movement import Movement
from distdl_lite.nn.norm.of_samples import DistributedGroupNorm, DistributedLayerNorm, DistributedRMSNorm
from distdl_lite.nn.norm.running import DistributedBatchNorm, DistributedInstanceNorm
from distdl_lite.nn.norm.softmax import DistributedLogSoftmax, DistributedSoftmax
from distdl_lite.nn.parameter import Layer
from distdl_lite.nn.pool.adaptive_pool import (
    DistributedAdaptiveAvgPool1d,
    DistributedAdaptiveAvgPool2d,
    DistributedAdaptiveAvgPool3d,
    DistributedAdaptiveMaxPool1d,
    DistributedAdaptiveMaxPool2d,
    DistributedAdaptiveMaxPool3d,
)
from distdl_lite.nn.pool.pool import (
    DistributedAvgPool1d,
    DistributedAvgPool2d,
    DistributedAvgPool3d,
    DistributedMaxPool1d,
    DistributedMaxPool2d,
    DistributedMaxPool3d,
)
from distdl_lite.nn.pool.upsample import DistributedUpsample
from distdl_lite.nn.primitives import (
    AllGather,
    AllSumReduce,
    Broadcast,
    HaloExchange,
    ReduceScatter,
    Repartition,
    SumReduce,
)
from distdl_lite.nn.shape.fft import DistributedFFT
from distdl_lite.nn.shape.flatten import DistributedFlatten
from distdl_lite.nn.shape.pad import (
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
from distdl_lite.nn.shape.reductions import DistributedMean
