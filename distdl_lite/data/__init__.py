"""Samples and rows over ranks: samplers without padding, rows dealt anew between ranks, loaders that do it on the way."""

from distdl_lite.data.loader import Loader, ShuffledLoader
from distdl_lite.data.rows import redistribute
from distdl_lite.data.sampler import Collate, ShardBatchSampler, ShardSampler, permutation
