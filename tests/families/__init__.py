"""The layers of `generated`: per family a layer, its options, shapes, grids and dtypes, drawn at random."""

from __future__ import annotations

from generated import Family

from families.any_shape import dropout, fft, flatten, mean, softmax
from families.convolutions import convolution, overlapping
from families.linear import embedding, linear, parallel_linear
from families.losses import class_loss, elementwise_loss
from families.norms import norm
from families.spatial import adaptive_pool, avg_pool, max_pool, pad, upsample

FAMILIES: dict[str, Family] = {
    "conv": lambda d: convolution(d, "Conv"),
    "conv_overlapping": overlapping,
    "conv_transpose": lambda d: convolution(d, "ConvTranspose"),
    "max_pool": max_pool,
    "avg_pool": avg_pool,
    "adaptive_pool": adaptive_pool,
    "pad": pad,
    "upsample": upsample,
    "batch_norm": lambda d: norm(d, "Batch"),
    "instance_norm": lambda d: norm(d, "Instance"),
    "group_norm": lambda d: norm(d, "Group"),
    "layer_norm": lambda d: norm(d, "Layer"),
    "rms_norm": lambda d: norm(d, "RMS"),
    "linear": linear,
    "column_parallel": lambda d: parallel_linear(d, "Column"),
    "row_parallel": lambda d: parallel_linear(d, "Row"),
    "embedding": embedding,
    "softmax": softmax,
    "dropout": dropout,
    "flatten": flatten,
    "mean": mean,
    "fft": fft,
    "elementwise_loss": elementwise_loss,
    "class_loss": class_loss,
}
