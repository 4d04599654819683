"""Samples, rows and blocks over ranks: samplers, loaders that move rows, and files that no rank reads or writes whole."""

from distdl_lite.data.blocks import Amplification, Blocks, Statistics, statistics
from distdl_lite.data.loader import Loader, ShuffledLoader
from distdl_lite.data.rows import redistribute
from distdl_lite.data.sampler import Collate, ShardBatchSampler, ShardSampler, permutation
from distdl_lite.data.writing import write_blocks
