"""Tractable approximate Gaussian inference: layers whose weights are Gaussians, and data parallelism for them."""

from distdl_lite.tagi.ddp import DDPConfig, DDPSequential
from distdl_lite.tagi.layers import Linear, MixtureReLU, ReLU, Sigmoid, Tanh
from distdl_lite.tagi.sequential import Sequential
from distdl_lite.tagi.updater import OutputUpdater
