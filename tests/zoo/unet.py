"""U-Nets and their relatives, in two and three dims."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def double(a: int, b: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True),
        nn.Conv2d(b, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True),
    )  # fmt: skip


class UNet(nn.Module):
    """Pads to multiples of 4, goes up by transposed convolutions, and crops."""

    def __init__(self, channels: int = 3, classes: int = 2) -> None:
        super().__init__()
        self.enc1, self.enc2, self.middle = double(channels, 4), double(4, 6), double(6, 8)
        self.up2, self.dec2 = nn.ConvTranspose2d(8, 6, 2, 2), double(12, 6)
        self.up1, self.dec1 = nn.ConvTranspose2d(6, 4, 2, 2), double(8, 4)
        self.head = nn.Conv2d(4, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        x = F.pad(x, (0, -w % 4, 0, -h % 4))
        a = self.enc1(x)
        b = self.enc2(F.max_pool2d(a, 2))
        y = self.middle(F.max_pool2d(b, 2))
        y = self.dec2(torch.cat([self.up2(y), b], 1))
        y = self.dec1(torch.cat([self.up1(y), a], 1))
        return self.head(y)[:, :, :h, :w]


class BilinearUNet(nn.Module):
    """Goes up bilinearly and pads to the skip connection's size, with odd sizes on the way."""

    def __init__(self, channels: int = 3, classes: int = 2) -> None:
        super().__init__()
        self.inc, self.down1 = double(channels, 4), nn.Sequential(nn.MaxPool2d(2), double(4, 6))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), double(6, 6))
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.conv1, self.conv2, self.outc = double(12, 4), double(8, 4), nn.Conv2d(4, classes, 1)

    def raised(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.up(x)
        dy, dx = skip.size(2) - x.size(2), skip.size(3) - x.size(3)
        x = F.pad(x, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
        return torch.cat([skip, x], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.inc(x)
        b = self.down1(a)
        y = self.conv1(self.raised(self.down2(b), b))
        return self.outc(self.conv2(self.raised(y, a)))


class AttentionGate(nn.Module):
    def __init__(self, gate: int, skip: int, inner: int) -> None:
        super().__init__()
        self.w_g, self.w_x = nn.Conv2d(gate, inner, 1), nn.Conv2d(skip, inner, 1, stride=2)
        self.psi = nn.Sequential(nn.Conv2d(inner, 1, 1), nn.BatchNorm2d(1), nn.Sigmoid())

    def forward(self, g: Tensor, x: Tensor) -> Tensor:
        g, y = self.w_g(g), self.w_x(x)
        alpha = self.psi(F.relu(F.interpolate(g, size=y.shape[-2:]) + y))
        return x * F.interpolate(alpha, size=x.shape[-2:], mode="bilinear", align_corners=False)


class AttentionUNet(nn.Module):
    def __init__(self, channels: int = 3, classes: int = 2) -> None:
        super().__init__()
        self.enc, self.low = double(channels, 4), double(4, 6)
        self.gate, self.dec, self.head = AttentionGate(6, 4, 3), double(10, 4), nn.Conv2d(4, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.enc(x)
        b = self.low(F.max_pool2d(a, 3, 2, 1))
        up = F.interpolate(b, size=a.shape[-2:], mode="nearest")
        return self.head(self.dec(torch.cat([self.gate(b, a), up], 1)))


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sines and cosines of integers of shape (B,)."""
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t[:, None].float() * frequencies[None, :]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


class TimeBlock(nn.Module):
    """Residual block that is told the time."""

    def __init__(self, a: int, b: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(2, a), nn.Conv2d(a, b, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(2, b), nn.Conv2d(b, b, 3, padding=1)
        self.emb, self.skip = nn.Linear(time, 2 * b), nn.Conv2d(a, b, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.emb(F.silu(t))[:, :, None, None].chunk(2, dim=1)
        y = self.norm2(y) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(y))


class SelfAttention(nn.Module):
    """Of all points of an image, as in diffusion and autoencoders."""

    def __init__(self, channels: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv = nn.GroupNorm(2, channels), nn.Conv1d(channels, 3 * channels, 1)
        self.proj = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, *spatial = x.shape
        x = x.reshape(b, c, -1)
        qkv = self.qkv(self.norm(x))
        q, k, v = qkv.reshape(b * self.heads, 3 * (c // self.heads), -1).chunk(3, dim=1)
        weight = torch.einsum("bct,bcs->bts", q, k) / math.sqrt(c // self.heads)
        y = torch.einsum("bts,bcs->bct", torch.softmax(weight, dim=-1), v).reshape(b, c, -1)
        return (x + self.proj(y)).reshape(b, c, *spatial)


class DiffusionUNet(nn.Module):
    def __init__(self, channels: int = 3, width: int = 4) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8))
        self.stem, self.block1 = nn.Conv2d(channels, width, 3, padding=1), TimeBlock(width, width, 8)
        self.down, self.block2 = nn.Conv2d(width, width, 3, 2, 1), TimeBlock(width, 2 * width, 8)
        self.attention, self.up = SelfAttention(2 * width), nn.Conv2d(2 * width, width, 3, padding=1)
        self.block3, self.norm = TimeBlock(2 * width, width, 8), nn.GroupNorm(2, width)
        self.out = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        t = self.time(timestep_embedding(timesteps, 8).to(x.dtype))
        a = self.block1(self.stem(x), t)
        b = self.attention(self.block2(self.down(a), t))
        b = self.up(F.interpolate(b, scale_factor=2.0, mode="nearest"))[..., : x.shape[-2], : x.shape[-1]]
        return self.out(F.silu(self.norm(self.block3(torch.cat([b, a], dim=1), t))))


class UNet3d(nn.Module):
    def __init__(self, channels: int = 2, classes: int = 2) -> None:
        super().__init__()
        self.enc = nn.Sequential(nn.Conv3d(channels, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU())
        self.low = nn.Sequential(nn.Conv3d(4, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU())
        self.up = nn.ConvTranspose3d(6, 4, 2, 2)
        self.dec, self.head = nn.Conv3d(8, 4, 3, padding=1), nn.Conv3d(4, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        sizes = x.shape[2:]
        x = F.pad(x, [n for size in reversed(sizes) for n in (0, size % 2)])
        a = self.enc(x)
        y = self.up(self.low(F.max_pool3d(a, 2)))
        y = self.head(F.relu(self.dec(torch.cat([a, y], 1))))
        return y[:, :, : sizes[0], : sizes[1], : sizes[2]]


class SegResBlock(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(2, n), nn.Conv3d(n, n, 3, padding=1, bias=False)
        self.norm2, self.conv2 = nn.GroupNorm(2, n), nn.Conv3d(n, n, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        y = self.conv2(F.relu(self.norm2(y)))
        y += x
        return y


class SegResNet(nn.Module):
    def __init__(self, channels: int = 2, classes: int = 2) -> None:
        super().__init__()
        self.init, self.block1 = nn.Conv3d(channels, 4, 3, padding=1, bias=False), SegResBlock(4)
        self.down, self.block2 = nn.Conv3d(4, 8, 3, 2, 1, bias=False), SegResBlock(8)
        self.reduce, self.block3 = nn.Conv3d(8, 4, 1, bias=False), SegResBlock(4)
        self.head = nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv3d(4, classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        a = self.block1(self.init(x))
        y = self.reduce(self.block2(self.down(a)))
        y = F.interpolate(y, scale_factor=2, mode="trilinear", align_corners=False)
        return self.head(self.block3(y + a))


class VNet(nn.Module):
    """Strided convolutions both ways, PReLU, the input repeated onto the first sum, softmax."""

    def __init__(self, channels: int = 2, classes: int = 3) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv3d(channels, 4, 5, padding=2), nn.BatchNorm3d(4), nn.PReLU(4)
        self.down, self.relu2 = nn.Conv3d(4, 8, 2, 2), nn.PReLU(8)
        self.conv2, self.relu3 = nn.Conv3d(8, 8, 3, padding=1), nn.PReLU(8)
        self.up, self.relu4, self.head = nn.ConvTranspose3d(8, 4, 2, 2), nn.PReLU(), nn.Conv3d(8, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.relu1(self.bn1(self.conv1(x)) + x.repeat(1, 2, 1, 1, 1))
        y = self.relu2(self.down(a))
        y = self.relu3(torch.add(self.conv2(y), y))
        return F.softmax(self.head(torch.cat([self.relu4(self.up(y)), a], 1)), dim=1)
