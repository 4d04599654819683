"""Vision transformers: of all tokens, of windows and grids, of reduced keys."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Sequential):
    def __init__(self, dim: int, inner: int) -> None:
        super().__init__(nn.Linear(dim, inner), nn.GELU(), nn.Dropout(0.0), nn.Linear(inner, dim))


class Attention(nn.Module):
    """Of tokens (B, N, C); torch's own, or written out."""

    def __init__(self, dim: int, heads: int, is_fused: bool) -> None:
        super().__init__()
        self.heads, self.is_fused, self.scale = heads, is_fused, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        if self.is_fused:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).reshape(b, n, c))


class Block(nn.Module):
    def __init__(self, dim: int, mixer: nn.Module) -> None:
        super().__init__()
        self.norm1, self.mixer, self.norm2, self.mlp = nn.LayerNorm(dim), mixer, nn.LayerNorm(dim), MLP(dim, 2 * dim)

    def forward(self, x: Tensor, *how: int) -> Tensor:
        x = x + self.mixer(self.norm1(x), *how)
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self, size: tuple[int, int] = (36, 28), is_fused: bool = True, dim: int = 8) -> None:
        super().__init__()
        self.conv_proj = nn.Conv2d(3, dim, 4, 4)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embedding = nn.Parameter(0.1 * torch.randn(1, size[0] // 4 * (size[1] // 4) + 1, dim))
        self.blocks = nn.Sequential(*(Block(dim, Attention(dim, 2, is_fused)) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embedding
        return self.head(self.norm(self.blocks(x))[:, 0])


class EncoderLayer(nn.Module):
    """torch's own layers: multi-head attention, encoder and decoder, on tokens (B, N, C)."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(dim, 2, 16, dropout=0.0, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoderLayer(dim, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(y.shape[1], dtype=x.dtype)
        return self.decoder(y, self.encoder(x), tgt_mask=mask)


def windows_of(x: Tensor, size: int) -> Tensor:
    b, h, w, c = x.shape
    x = x.view(b, h // size, size, w // size, size, c)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, size * size, c)


def windows_back(x: Tensor, size: int, h: int, w: int) -> Tensor:
    b = x.shape[0] // (h * w // size // size)
    x = x.view(b, h // size, w // size, size, size, -1)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(b, h, w, -1)


def relative_index(size: int) -> Tensor:
    points = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")).flatten(1)
    apart = (points[:, :, None] - points[:, None, :]).permute(1, 2, 0) + size - 1
    return (apart[..., 0] * (2 * size - 1) + apart[..., 1]).flatten()


class WindowAttention(nn.Module):
    """Of windows, maybe shifted; `version` 2 has cosines and a bias from an MLP of log-spaced distances."""

    def __init__(self, dim: int, heads: int, size: int, version: int) -> None:
        super().__init__()
        self.heads, self.size, self.version = heads, size, version
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.register_buffer("relative_position_index", relative_index(size))
        if version == 1:
            self.table = nn.Parameter(0.1 * torch.randn((2 * size - 1) ** 2, heads))
        else:
            self.logit_scale = nn.Parameter(torch.log(10 * torch.ones(heads, 1, 1)))
            self.cpb_mlp = nn.Sequential(nn.Linear(2, 8), nn.ReLU(inplace=True), nn.Linear(8, heads, bias=False))
            steps = torch.arange(1 - size, size).double() / (size - 1) * 8
            steps = torch.sign(steps) * torch.log2(steps.abs() + 1) / 3
            self.register_buffer("coords", torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1).float())

    def bias(self) -> Tensor:
        n = self.size**2
        table = self.table if self.version == 1 else 16 * torch.sigmoid(self.cpb_mlp(self.coords).view(-1, self.heads))
        return table[self.relative_position_index].view(n, n, -1).permute(2, 0, 1).contiguous()

    def mask(self, h: int, w: int, shift: int, like: Tensor) -> Tensor:
        regions = like.new_zeros((1, h, w, 1))
        slices = (slice(0, -self.size), slice(-self.size, -shift), slice(-shift, None))
        for i, rows in enumerate(slices):
            for j, columns in enumerate(slices):
                regions[:, rows, columns, :] = 3 * i + j
        regions = windows_of(regions, self.size).squeeze(-1)
        apart = regions.unsqueeze(1) - regions.unsqueeze(2)
        return apart.masked_fill(apart != 0, -100.0).masked_fill(apart == 0, 0.0)

    def forward(self, x: Tensor, shift: int) -> Tensor:
        b, h, w, c = x.shape
        size, n = self.size, self.size**2
        x = F.pad(x, (0, 0, 0, -w % size, 0, -h % size))
        _, ph, pw, _ = x.shape
        if shift:
            x = torch.roll(x, shifts=(-shift, -shift), dims=(1, 2))
        windows = windows_of(x, size)
        qkv = self.qkv(windows).reshape(-1, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        if self.version == 1:
            weight = (q * (c // self.heads) ** -0.5) @ k.transpose(-2, -1)
        else:
            weight = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
            weight = weight * torch.clamp(self.logit_scale, max=math.log(100.0)).exp()
        weight = weight + self.bias().unsqueeze(0)
        if shift:
            mask = self.mask(ph, pw, shift, x)
            weight = weight.view(b, -1, self.heads, n, n) + mask.unsqueeze(1).unsqueeze(0)
            weight = weight.view(-1, self.heads, n, n)
        y = (weight.softmax(dim=-1) @ v).transpose(1, 2).reshape(-1, n, c)
        y = windows_back(self.proj(y), size, ph, pw)
        if shift:
            y = torch.roll(y, shifts=(shift, shift), dims=(1, 2))
        return y[:, :h, :w, :].contiguous()


class PatchMerging(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, w % 2, 0, h % 2))
        parts = [x[..., i::2, j::2, :] for j in (0, 1) for i in (0, 1)]
        return self.reduction(self.norm(torch.cat(parts, -1)))


class Swin(nn.Module):
    def __init__(self, version: int = 1, dim: int = 4, size: int = 4) -> None:
        super().__init__()
        self.patch, self.norm0, self.shifts = nn.Conv2d(3, dim, 2, 2), nn.LayerNorm(dim), (0, size // 2)
        self.stage1 = nn.ModuleList([Block(dim, WindowAttention(dim, 2, size, version)) for _ in self.shifts])
        self.merge = PatchMerging(dim)
        self.stage2 = Block(2 * dim, WindowAttention(2 * dim, 2, size, version))
        self.norm, self.head = nn.LayerNorm(2 * dim), nn.Linear(2 * dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm0(self.patch(x).permute(0, 2, 3, 1))
        for block, shift in zip(self.stage1, self.shifts, strict=True):
            x = block(x, shift)
        x = self.norm(self.stage2(self.merge(x), 0)).permute(0, 3, 1, 2)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class MaxViT(nn.Module):
    """Attention within blocks, then over a grid of points far apart."""

    def __init__(self, dim: int = 8, size: int = 4) -> None:
        super().__init__()
        self.size, self.stem = size, nn.Conv2d(3, dim, 3, 2, 1)
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.block, self.grid = (Block(dim, Attention(dim, 2, True)) for _ in range(2))
        self.head = nn.Conv2d(dim, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.depthwise(self.stem(x))).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        p, hs, ws = self.size, h // self.size, w // self.size
        y = x.reshape(b, hs, p, ws, p, c).transpose(2, 3).reshape(-1, p * p, c)
        y = self.block(y).reshape(b, hs, ws, p, p, c).transpose(2, 3).reshape(b, h, w, c)
        y = y.reshape(b, p, hs, p, ws, c).permute(0, 2, 4, 1, 3, 5).reshape(-1, p * p, c)
        y = self.grid(y).reshape(b, hs, ws, p, p, c).permute(0, 3, 1, 4, 2, 5).reshape(b, h, w, c)
        return self.head(y.permute(0, 3, 1, 2))


class ReducedAttention(nn.Module):
    """With keys and values from an image smaller by `ratio` a dim."""

    def __init__(self, dim: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.heads, self.q, self.kv = heads, nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.sr, self.norm, self.proj = nn.Conv2d(dim, dim, ratio, ratio), nn.LayerNorm(dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        b, n, c = x.shape
        q = self.q(x).reshape(b, n, self.heads, c // self.heads).permute(0, 2, 1, 3)
        y = self.sr(x.permute(0, 2, 1).reshape(b, c, h, w)).reshape(b, c, -1).permute(0, 2, 1)
        kv = self.kv(self.norm(y)).reshape(b, -1, 2, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        weight = (q @ kv[0].transpose(-2, -1) * (c // self.heads) ** -0.5).softmax(-1)
        return self.proj((weight @ kv[1]).transpose(1, 2).reshape(b, n, c))


class PVT(nn.Module):
    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.patch, self.norm0 = nn.Conv2d(3, dim, 3, 2, 1), nn.LayerNorm(dim)
        self.block, self.patch2 = Block(dim, ReducedAttention(dim, 2, 4)), nn.Conv2d(dim, dim, 3, 2, 1)
        self.block2, self.norm = Block(dim, ReducedAttention(dim, 2, 2)), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for patch, norm, block in ((self.patch, self.norm0, self.block), (self.patch2, self.norm, self.block2)):
            x = patch(x)
            b, c, h, w = x.shape
            x = block(norm(x.flatten(2).transpose(1, 2)), h, w)
            x = x.reshape(b, h, w, c).permute(0, 3, 1, 2).contiguous()
            found.append(x)
        return found


class MixerBlock(nn.Module):
    def __init__(self, tokens: int, dim: int) -> None:
        super().__init__()
        self.norm1, self.tokens = nn.LayerNorm(dim), MLP(tokens, 12)
        self.norm2, self.channels = nn.LayerNorm(dim), MLP(dim, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class MLPMixer(nn.Module):
    def __init__(self, size: tuple[int, int] = (36, 28), dim: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, dim, 4, 4)
        self.blocks = nn.Sequential(*(MixerBlock(size[0] // 4 * (size[1] // 4), dim) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x).flatten(2).transpose(1, 2))
        return self.head(self.norm(x).mean(dim=1))
