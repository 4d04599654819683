"""Operators in Fourier space, recurrences over time, autoencoders, signals, super-resolution, losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.unet import SelfAttention, UNet


class SpectralConv2d(nn.Module):
    """A product with complex weights of the lowest modes."""

    def __init__(self, a: int, b: int, modes: tuple[int, int]) -> None:
        super().__init__()
        self.modes = modes
        self.weights1, self.weights2 = (
            nn.Parameter(torch.randn(a, b, *modes, dtype=torch.cfloat) / (a * b)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        m, n = self.modes
        ft = torch.fft.rfft2(x)
        out = torch.zeros(x.shape[0], self.weights1.shape[1], *ft.shape[-2:], dtype=ft.dtype, device=x.device)
        out[:, :, :m, :n] = torch.einsum("bixy,ioxy->boxy", ft[:, :, :m, :n], self.weights1)
        out[:, :, -m:, :n] = torch.einsum("bixy,ioxy->boxy", ft[:, :, -m:, :n], self.weights2)
        return torch.fft.irfft2(out, s=(x.size(-2), x.size(-1)))


class FNO2d(nn.Module):
    """Fourier neural operator, with the coordinates as two more channels; `is_unet` adds a small U-Net to the last layer."""

    def __init__(self, channels: int = 2, width: int = 4, is_unet: bool = False) -> None:
        super().__init__()
        self.fc0 = nn.Linear(channels + 2, width)
        self.spectral = nn.ModuleList([SpectralConv2d(width, width, (5, 4)) for _ in range(2)])
        self.w = nn.ModuleList([nn.Conv2d(width, width, 1) for _ in range(2)])
        self.unets = nn.ModuleList([nn.Identity(), UNet(width, width)] if is_unet else [])
        self.fc1, self.fc2 = nn.Linear(width, 8), nn.Linear(8, 1)

    def grid(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        rows = torch.linspace(0, 1, h, dtype=x.dtype, device=x.device).reshape(1, 1, h, 1).repeat([b, 1, 1, w])
        columns = torch.linspace(0, 1, w, dtype=x.dtype, device=x.device).reshape(1, 1, 1, w).repeat([b, 1, h, 1])
        return torch.cat((rows, columns), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc0(torch.cat((x, self.grid(x)), dim=1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        for i, (spectral, w) in enumerate(zip(self.spectral, self.w, strict=True)):
            y = spectral(x) + w(x)
            x = F.gelu(y + self.unets[i](x) if self.unets else y)
        return self.fc2(F.gelu(self.fc1(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)


class ConvLSTM(nn.Module):
    """Over frames (B, C, T, H, W); the last hidden state, and a frame for each time."""

    def __init__(self, channels: int = 2, hidden: int = 4) -> None:
        super().__init__()
        self.hidden, self.conv = hidden, nn.Conv2d(channels + hidden, 4 * hidden, 3, padding=1)
        self.head = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        b, _, t, h, w = x.shape
        state = x.new_zeros(b, self.hidden, h, w)
        cell, frames = torch.zeros_like(state), []
        for i in range(t):
            i_, f, o, g = torch.split(self.conv(torch.cat([x[:, :, i], state], dim=1)), self.hidden, dim=1)
            cell = torch.sigmoid(f) * cell + torch.sigmoid(i_) * torch.tanh(g)
            state = torch.sigmoid(o) * torch.tanh(cell)
            frames.append(self.head(state))
        return torch.stack(frames, dim=2), state


class VAE(nn.Module):
    """The path of the mean, with the divergence, which a loss would add."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(channels, 4, 3, 2, 1),
            nn.GroupNorm(2, 4),
            nn.SiLU(),
            SelfAttention(4, 1),
            nn.Conv2d(4, 8, 3, 2, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1), SelfAttention(4, 1), nn.Upsample(scale_factor=2), nn.GroupNorm(2, 4), nn.SiLU(),
            nn.ConvTranspose2d(4, channels, 4, 2, 1), nn.Tanh(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        divergence = -0.5 * torch.sum(1 + log_variance - mean.pow(2) - log_variance.exp(), dim=[1, 2, 3])
        return self.decoder(mean), divergence.mean()


class WaveNet(nn.Module):
    """Dilated causal convolutions with gates, on signals (B, C, T)."""

    def __init__(self, channels: int = 2, width: int = 4) -> None:
        super().__init__()
        self.causal, self.dilations = nn.Conv1d(channels, width, 2), (1, 2, 4, 8)
        self.gates = nn.ModuleList([nn.Conv1d(width, 2 * width, 2, dilation=d) for d in self.dilations])
        self.residual, self.skip = (nn.ModuleList([nn.Conv1d(width, width, 1) for _ in self.dilations]) for _ in "ab")
        self.end = nn.Conv1d(width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.causal(F.pad(x, (1, 0))), 0
        for dilation, gate, residual, skip in zip(self.dilations, self.gates, self.residual, self.skip, strict=True):
            a, b = gate(F.pad(x, (dilation, 0))).chunk(2, 1)
            y = torch.tanh(a) * torch.sigmoid(b)
            total = total + skip(y)
            x = x + residual(y)
        return self.end(F.relu(total))


class EDSR(nn.Module):
    """Super-resolution by pixel shuffle, with the mean colour taken off."""

    def __init__(self, channels: int = 3, width: int = 4, scale: int = 2) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))
        self.head = nn.Conv2d(channels, width, 3, padding=1)
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(True), nn.Conv2d(width, width, 3, padding=1)
        )
        self.tail = nn.Sequential(nn.Conv2d(width, scale**2 * width, 3, padding=1), nn.PixelShuffle(scale))
        self.last = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x - self.mean)
        x = x + self.body(x).mul(0.1)
        return (self.last(self.tail(x)) + self.mean).clamp(-2, 2)


class Segmentation(nn.Module):
    """A model with its loss: cross entropy that ignores a class, and one minus the Dice number."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.model, self.classes = UNet(3, classes), classes

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        logits = self.model(x)
        cross = F.cross_entropy(logits, target, ignore_index=0)
        p, t = logits.softmax(1), F.one_hot(target, self.classes).permute(0, 3, 1, 2).to(logits.dtype)
        dice = (2 * (p * t).sum((0, 2, 3)) + 1) / ((p + t).sum((0, 2, 3)) + 1)
        return cross + (1 - dice).mean()
