"""Classifiers and detectors' trunks of convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(a: int, b: int, kernel: int = 3, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    """Without bias, and with the size kept up to the stride."""
    padding = dilation * (kernel - 1) // 2
    return nn.Conv2d(a, b, kernel, stride, padding, dilation=dilation, groups=groups, bias=False)


class BasicBlock(nn.Module):
    def __init__(self, a: int, b: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(a, b, stride=stride), nn.BatchNorm2d(b)
        self.conv2, self.bn2 = conv(b, b), nn.BatchNorm2d(b)
        is_same = stride == 1 and a == b
        self.downsample = None if is_same else nn.Sequential(conv(a, b, 1, stride), nn.BatchNorm2d(b))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += x if self.downsample is None else self.downsample(x)
        return F.relu(y, inplace=True)


class Bottleneck(nn.Module):
    def __init__(self, a: int, b: int, stride: int, groups: int = 1) -> None:
        super().__init__()
        m = b // 2
        self.reduce = nn.Sequential(conv(a, m, 1), nn.BatchNorm2d(m), nn.ReLU(inplace=True))
        self.middle = nn.Sequential(conv(m, m, 3, stride, groups), nn.BatchNorm2d(m), nn.ReLU(inplace=True))
        self.expand = nn.Sequential(conv(m, b, 1), nn.BatchNorm2d(b))
        is_same = stride == 1 and a == b
        self.skip = nn.Identity() if is_same else nn.Sequential(conv(a, b, 1, stride), nn.BatchNorm2d(b))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.expand(self.middle(self.reduce(x))) + self.skip(x))


class ResNet(nn.Module):
    """Residual network; of bottlenecks with `groups`, and ResNeXt with more than one."""

    def __init__(self, groups: int | None = None, channels: int = 3, classes: int = 5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 8, 7, 2, 3, bias=False)
        self.bn1, self.relu, self.maxpool = nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        shapes = [(8, 8, 1), (8, 16, 2), (16, 16, 1)]
        blocks = [BasicBlock(*s) if groups is None else Bottleneck(*s, groups) for s in shapes]
        self.layers = nn.Sequential(*blocks)
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class DenseNet(nn.Module):
    def __init__(self, channels: int = 3, growth: int = 4, classes: int = 5) -> None:
        super().__init__()
        self.stem = conv(channels, 8)
        n, layers = 8, []
        for _ in range(3):
            layers.append(nn.Sequential(nn.BatchNorm2d(n), nn.ReLU(inplace=True), conv(n, growth)))
            n += growth
        self.layers = nn.ModuleList(layers)
        self.transition = nn.Sequential(nn.BatchNorm2d(n), nn.ReLU(), conv(n, n // 2, 1), nn.AvgPool2d(2, 2))
        self.classifier = nn.Linear(n // 2, classes)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        x = F.relu(self.transition(torch.cat(features, 1)))
        return self.classifier(F.adaptive_avg_pool2d(x, (1, 1)).flatten(1))


class SqueezeExcitation(nn.Module):
    def __init__(self, channels: int, inner: int, gate: type[nn.Module] = nn.Sigmoid) -> None:
        super().__init__()
        self.avgpool, self.gate, self.activation = nn.AdaptiveAvgPool2d(1), gate(), nn.SiLU()
        self.fc1, self.fc2 = nn.Conv2d(channels, inner, 1), nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc2(self.activation(self.fc1(self.avgpool(x)))))


class MBConv(nn.Module):
    """Inverted residual with depthwise convolution and squeeze-and-excitation."""

    def __init__(self, a: int, b: int, stride: int, act: type[nn.Module], gate: type[nn.Module], kernel: int) -> None:
        super().__init__()
        m = 2 * a
        self.expand = nn.Sequential(conv(a, m, 1), nn.BatchNorm2d(m), act())
        self.depthwise = nn.Sequential(conv(m, m, kernel, stride, m), nn.BatchNorm2d(m), act())
        self.squeeze = SqueezeExcitation(m, 2, gate)
        self.project = nn.Sequential(conv(m, b, 1), nn.BatchNorm2d(b))
        self.is_residual = stride == 1 and a == b

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.squeeze(self.depthwise(self.expand(x))))
        return x + y if self.is_residual else y


class EfficientNet(nn.Module):
    """Inverted residuals; of MobileNetV3 with hard activations."""

    def __init__(self, act: type[nn.Module] = nn.SiLU, gate: type[nn.Module] = nn.Sigmoid, channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(channels, 6, 3, 2), nn.BatchNorm2d(6), act())
        self.blocks = nn.Sequential(MBConv(6, 6, 1, act, gate, 3), MBConv(6, 8, 2, act, gate, 5))
        self.head = nn.Sequential(conv(8, 12, 1), nn.BatchNorm2d(12), act())
        self.classifier = nn.Sequential(nn.Dropout(0.0), nn.Linear(12, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.blocks(self.stem(x)))
        return self.classifier(x.mean([2, 3]))


def mobilenet_v3() -> EfficientNet:
    return EfficientNet(nn.Hardswish, nn.Hardsigmoid)


class ConvNeXtBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv, self.norm = nn.Conv2d(dim, dim, 7, padding=3, groups=dim), nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))
        return x + y.permute(0, 3, 1, 2)


class LayerNorm2d(nn.Module):
    """Layer norm over channels that come first, written out."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class ConvNeXt(nn.Module):
    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, 6, 4, 4), LayerNorm2d(6))
        self.down = nn.Sequential(LayerNorm2d(6), nn.Conv2d(6, 8, 2, 2))
        self.block1, self.block2 = ConvNeXtBlock(6), ConvNeXtBlock(8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.down(self.block1(self.stem(x))))
        return self.head(self.norm(x.mean([-2, -1])))


class HRNet(nn.Module):
    """Two resolutions side by side, fused twice."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(channels, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU())
        self.fork = nn.Sequential(conv(6, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU())
        self.high = nn.ModuleList([BasicBlock(6, 6, 1) for _ in range(2)])
        self.low = nn.ModuleList([BasicBlock(8, 8, 1) for _ in range(2)])
        self.down = nn.ModuleList([nn.Sequential(conv(6, 8, 3, 2), nn.BatchNorm2d(8)) for _ in range(2)])
        self.up = nn.ModuleList([nn.Sequential(conv(8, 6, 1), nn.BatchNorm2d(6)) for _ in range(2)])
        self.last = nn.Conv2d(14, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        x = self.stem(x)
        y = self.fork(x)
        for high, low, down, up in zip(self.high, self.low, self.down, self.up, strict=True):
            x, y = high(x), low(y)
            raised = F.interpolate(up(y), size=x.shape[-2:], mode="bilinear", align_corners=True)
            x, y = F.relu(x + raised), F.relu(y + down(x))
        y = F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=True)
        return F.interpolate(self.last(torch.cat([x, y], 1)), size, mode="bilinear", align_corners=False)


class FPN(nn.Module):
    """Feature pyramid, whose levels are returned by name."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        widths = (6, 8, 10)
        pairs = zip((channels, *widths), widths, strict=False)
        self.stages = nn.ModuleList([nn.Sequential(conv(a, b, 3, 2), nn.BatchNorm2d(b), nn.ReLU()) for a, b in pairs])
        self.inner = nn.ModuleList([nn.Conv2d(n, 6, 1) for n in widths])
        self.outer = nn.ModuleList([nn.Conv2d(6, 6, 3, padding=1) for _ in widths])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        top = self.inner[-1](features[-1])
        levels = {"p2": self.outer[-1](top)}
        for i in (1, 0):
            side = self.inner[i](features[i])
            top = side + F.interpolate(top, size=side.shape[-2:], mode="nearest")
            levels[f"p{i}"] = self.outer[i](top)
        levels["pool"] = F.max_pool2d(levels["p2"], 1, 2, 0)
        return levels


class DeepLabV3(nn.Module):
    """Dilated convolutions, and a pyramid of them with a pool of all."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.backbone = nn.Sequential(BasicBlock(channels, 6, 2), conv(6, 8, dilation=2), nn.BatchNorm2d(8), nn.ReLU())
        kernels = [conv(8, 4, 1), conv(8, 4, dilation=3), conv(8, 4, dilation=6)]
        self.branches = nn.ModuleList([nn.Sequential(k, nn.BatchNorm2d(4), nn.ReLU()) for k in kernels])
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(8, 4, 1), nn.ReLU())
        self.project = nn.Sequential(conv(16, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.0))
        self.classifier = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        size = x.shape[-2:]
        x = self.backbone(x)
        found = [branch(x) for branch in self.branches]
        found.append(F.interpolate(self.pool(x), size=x.shape[-2:], mode="bilinear", align_corners=False))
        y = self.classifier(self.project(torch.cat(found, dim=1)))
        return {"out": F.interpolate(y, size=size, mode="bilinear", align_corners=False)}


class PSPNet(nn.Module):
    """Pools to 1, 2, 3 and 6 points a dim."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.backbone = nn.Sequential(BasicBlock(channels, 8, 2), BasicBlock(8, 8, 1))
        self.pools = nn.ModuleList([nn.Sequential(nn.AdaptiveAvgPool2d(n), nn.Conv2d(8, 2, 1)) for n in (1, 2, 3, 6)])
        self.last = nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.backbone(x)
        h, w = y.shape[2:]
        pooled = [F.interpolate(pool(y), size=(h, w), mode="bilinear", align_corners=False) for pool in self.pools]
        return F.interpolate(self.last(torch.cat([y, *pooled], 1)), scale_factor=2, mode="bilinear")


class Discriminator(nn.Module):
    """Of patches, with instance norms."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        norm = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
        self.model = nn.Sequential(
            nn.Conv2d(channels, 6, 4, 2, 1), nn.LeakyReLU(0.2, True), nn.Conv2d(6, 8, 4, 2, 1), norm, nn.LeakyReLU(0.2),
            nn.ReflectionPad2d(1), nn.Conv2d(8, 8, 3), nn.InstanceNorm2d(8), nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 4, 1, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)
