"""The models by name, with inputs, grids and what may be asked of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from zoo import cnn, others, transformers, unet

IMAGE = ((1, 1, 2, 1), (1, 1, 2, 2), (2, 1, 2, 1))
VOLUME = ((1, 1, 2, 1, 1), (1, 1, 2, 2, 1), (2, 1, 1, 2, 1))
SIGNAL = ((1, 1, 4), (2, 1, 2))


@dataclass(frozen=True)
class Case:
    """A model and how it is proved.

    Attributes
    ----------
    make : callable
    inputs : tuple
        Shapes of random tensors, or the highest integer and a shape.
    grids : tuple of shapes
    tolerance : float
        Of relative differences.
    is_windowed : bool
        Whether its views cut across any grid, so that values are cut anew.
    """

    make: Callable[[], nn.Module]
    inputs: tuple[Any, ...] = ((2, 3, 37, 29),)
    grids: tuple[tuple[int, ...], ...] = IMAGE
    tolerance: float = 1e-9
    is_windowed: bool = False

    def whole(self) -> list[torch.Tensor]:
        """The arguments; integers are given as (highest, *shape) in a list."""
        generator = torch.Generator().manual_seed(0)
        return [
            torch.randint(x[0], x[1:], generator=generator)
            if isinstance(x, list)
            else torch.randn(x, generator=generator, dtype=torch.float64)
            for x in self.inputs
        ]


VOLUMES = ((2, 2, 9, 7, 6),)
PATCHES = ((2, 3, 36, 28),)
CASES = {
    "unet": Case(unet.UNet),
    "unet_bilinear": Case(unet.BilinearUNet),
    "unet_attention": Case(unet.AttentionUNet),
    "unet_diffusion": Case(unet.DiffusionUNet, ((2, 3, 18, 14), [1000, 2])),
    "unet_3d": Case(unet.UNet3d, VOLUMES, VOLUME),
    "segresnet": Case(unet.SegResNet, ((2, 2, 8, 6, 10),), VOLUME),
    "vnet": Case(unet.VNet, ((2, 2, 8, 6, 10),), VOLUME),
    "resnet": Case(cnn.ResNet),
    "resnet_bottleneck": Case(partial(cnn.ResNet, 1)),
    "resnext": Case(partial(cnn.ResNet, 2)),
    "densenet": Case(cnn.DenseNet, ((2, 3, 21, 19),)),
    "efficientnet": Case(cnn.EfficientNet),
    "mobilenet_v3": Case(cnn.mobilenet_v3),
    "convnext": Case(cnn.ConvNeXt),
    "hrnet": Case(cnn.HRNet),
    "fpn": Case(cnn.FPN),
    "deeplabv3": Case(cnn.DeepLabV3),
    "pspnet": Case(cnn.PSPNet),
    "discriminator": Case(cnn.Discriminator),
    "vit": Case(transformers.ViT, PATCHES),
    "vit_by_hand": Case(partial(transformers.ViT, is_fused=False), PATCHES),
    "torch_transformer": Case(transformers.EncoderLayer, ((2, 7, 8), (2, 5, 8)), ((1, 2, 1), (2, 2, 1))),
    "swin": Case(transformers.Swin, is_windowed=True),
    "swin_v2": Case(partial(transformers.Swin, 2), is_windowed=True),
    "maxvit": Case(transformers.MaxViT, ((2, 3, 48, 32),)),  # whose attention over the grid may gather keys
    "pvt": Case(transformers.PVT, ((2, 3, 32, 24),)),
    "mlp_mixer": Case(transformers.MLPMixer, PATCHES),
    "fno": Case(others.FNO2d, ((2, 2, 30, 26),)),
    "u_fno": Case(partial(others.FNO2d, is_unet=True), ((2, 2, 30, 26),)),
    "convlstm": Case(others.ConvLSTM, ((2, 2, 3, 11, 9),), ((1, 1, 1, 2, 1), (1, 1, 1, 2, 2), (2, 1, 1, 1, 2))),
    "vae": Case(others.VAE, ((2, 3, 20, 12),)),
    "wavenet": Case(others.WaveNet, ((2, 2, 45),), SIGNAL),
    "edsr": Case(others.EDSR, ((2, 3, 13, 11),)),
    "segmentation": Case(others.Segmentation, ((2, 3, 21, 19), [3, 2, 21, 19])),
}
