"""
Colour a photograph from a few spots
====================================

A vision transformer learns from three photographs to colour a fourth one, of which it sees the grey values, and the colours of
one patch in twelve. Each patch looks at all others. The picture is cut 2 x 2 over four ranks, and so are the tokens that its
patches become.
"""

import math
from types import SimpleNamespace

import matplotlib.pyplot as plt
import skimage.data
import torch
from torch import nn
from torch.nn import functional as F

import distdl_lite as dl
from distdl_lite.testing import launch

PATCH, FEATURES, HEADS = 8, 48, 4
LUMA = torch.tensor(
    [[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]]
)  # grey and two colours of RGB

# %%
# The transformer is written for one device. Two blocks of self-attention compare patches by their grey values and places. The
# last attention is that of :math:`k` to itself, over the patches whose colours are known: a patch takes the colours of
# patches that are like it.


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(FEATURES), nn.LayerNorm(FEATURES)])
        self.qkv, self.out = nn.Linear(FEATURES, 3 * FEATURES), nn.Linear(FEATURES, FEATURES)
        self.mlp = nn.Sequential(nn.Linear(FEATURES, 2 * FEATURES), nn.GELU(), nn.Linear(2 * FEATURES, FEATURES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.norms[0](x)).chunk(3, dim=2)
        q, k, v = (t.unflatten(2, (HEADS, -1)).transpose(1, 2) for t in qkv)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Colours(nn.Module):
    """From grey values (n, 1, H, W), colours (n, 2, H / 8, W / 8) and where these are known to all colours."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Conv2d(1, FEATURES, PATCH, stride=PATCH), nn.Linear(12, FEATURES)
        self.blocks = nn.Sequential(Block(), Block(), nn.LayerNorm(FEATURES), nn.Linear(FEATURES, FEATURES))
        self.sharpness = nn.Parameter(torch.tensor(25.0))

    def forward(self, grey: torch.Tensor, colours: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        x = self.embed(grey)
        h, w = x.shape[2:]
        places = torch.cartesian_prod(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w))
        waves = (places[:, None] * math.pi * torch.tensor([[0.5], [1.0], [2.0]])).flatten(1)
        x = x.flatten(2).transpose(1, 2) + 2 * self.place(torch.cat([waves.sin(), waves.cos()], dim=1))
        k = F.normalize(self.blocks(x), dim=2)
        colours, known = colours.flatten(2).transpose(1, 2), known.flatten(2)
        return (
            F.scaled_dot_product_attention(self.sharpness * k, k, colours, attn_mask=known, scale=1.0)
            .transpose(1, 2)
            .unflatten(2, (h, w))
        )


# %%
# The pictures come with scikit-image. In each step other spots are known.


def picture(name: str, rows: slice, columns: slice) -> torch.Tensor:
    """Grey values and colours of a part of a picture, of shape (1, 3, H, W)."""
    rgb = torch.from_numpy(getattr(skimage.data, name)()[rows, columns]) / 255
    return torch.einsum("yc,hwc->yhw", LUMA, rgb)[None]


def spotted(whole: torch.Tensor, draws: torch.Generator) -> tuple[torch.Tensor, ...]:
    """The network's inputs, and the colours of all patches."""
    colours = F.avg_pool2d(whole[:, 1:], PATCH)
    known = torch.rand(colours[:, :1].shape, generator=draws) < 1 / 12
    return whole[:, :1] - 0.5, colours * known, known, colours


# %%
# The network learns on small pictures, and is run on one of 1024 tokens. The colours of a patch are means of the known ones,
# so that their gradient with respect to these is its attention, to patches on all ranks.

LOOKING = [(19, 8), (9, 3), (5, 16)]  # rows and columns of patches


def train(world: dl.Partition, steps: int = 40) -> SimpleNamespace:
    P = world.grid(h=2, w=2, of="n c h w")
    small = [
        picture("coffee", slice(8, 392, 4), slice(40, 552, 4)),
        picture("chelsea", slice(6, 294, 3), slice(30, 414, 3)),
        picture("rocket", slice(20, 404, 4), slice(60, 572, 4)),
    ]
    draws = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net, measure = dl.distribute(Colours(), P), dl.distribute(nn.MSELoss(), P)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for step in range(steps):
        *inputs, colours = (P.cut(tensor) for tensor in spotted(torch.cat(small), draws))
        loss = measure(net(*inputs), colours)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 9:
            P.print(f"step {step + 1}: loss {loss.item():.6f}")
    whole = picture("astronaut", slice(0, 512, 2), slice(0, 512, 2))
    inputs = spotted(whole, draws)[:3]
    grey, spots, known = (P.cut(tensor) for tensor in inputs)
    found = net(grey, spots.requires_grad_(), known)
    looks = []
    for row, column in LOOKING:
        picked = torch.zeros(1, 2, 32, 32)
        picked[0, 0, row, column] = 1
        (look,) = torch.autograd.grad(found, spots, P.cut(picked), retain_graph=True)
        looks.append(dl.gather(look, P))
    return SimpleNamespace(
        whole=whole,
        inputs=inputs,
        found=dl.gather(found.detach(), P),
        looks=looks,
        P=P,
        report=net.report(),
        state=dl.serial_state_dict(net),
    )


result = launch(4, train)
# %%
# The trained weights go into the same network on one device. Colours and attention are the same:

serial = Colours()
serial.load_state_dict(result.state)
grey, spots, known = result.inputs
spots.requires_grad_()
found = serial(grey, spots, known)
looks = [torch.autograd.grad(found[0, 0, y, x], spots, retain_graph=True)[0] for y, x in LOOKING]
error = (found.detach() - result.found).abs()[0].amax(0)
difference = max(error.max().item(), *((a - b).abs().max().item() for a, b in zip(looks, result.looks, strict=True)))
true = F.avg_pool2d(result.whole[:, 1:], PATCH)
errors = [(colours - true).square().mean().sqrt().item() for colours in (true.mean((2, 3), keepdim=True), result.found)]
print("root mean square error of colours: {:.4f} with one colour for all, {:.4f} on four ranks".format(*errors))
print(f"largest difference to the serial network, of colours and attention: {difference:.1e}")
print(f"scores of a layer: {HEADS * 1024**2 * 4 / 1e6:.1f} MB on one device, {1024**2 * 4 / 1e6:.1f} MB on a rank")

# %%


def rgb(colours: torch.Tensor, mode: str = "bilinear") -> torch.Tensor:
    """The picture of which these are the colours of the patches."""
    whole = torch.cat([result.whole[:, :1], F.interpolate(colours, scale_factor=PATCH, mode=mode)], dim=1)
    return torch.einsum("cy,nyhw->hwc", torch.linalg.inv(LUMA), whole).clamp(0, 1)


figure, axes = plt.subplots(2, 2, figsize=(8, 8.4), layout="constrained")
shown = {
    "known colours": rgb(spots.detach(), "nearest"),
    "coloured on four ranks": rgb(result.found),
    "true": rgb(true),
}
for ax, (title, image) in zip(axes.flat, shown.items(), strict=False):
    ax.imshow(image.numpy())
    ax.set_title(title)
axes[1, 1].imshow(result.whole[0, 0].numpy(), cmap="gray", alpha=0.5)
axes[1, 1].set_title(f"where three patches look\ndifference to one device {difference:.0g}")
for index, look, colour in zip(LOOKING, result.looks, ("red", "blue", "green"), strict=True):
    y, x = (PATCH * (i + 0.5) for i in index)
    axes[1, 1].plot(x, y, "x", color=colour, markersize=10, markeredgewidth=3)
    rows, columns = torch.nonzero(look[0, 0] > 0.01, as_tuple=True)
    sizes = 600 * look[0, 0, rows, columns]
    axes[1, 1].scatter(
        (columns + 0.5).numpy() * PATCH, (rows + 0.5).numpy() * PATCH, sizes.numpy(), color=colour, alpha=0.6
    )
for ax in axes.flat:
    ax.axhline(127.5, color="orange", linestyle="--", linewidth=1)
    ax.axvline(127.5, color="orange", linestyle="--", linewidth=1)
    ax.set_axis_off()
figure.savefig("vision_transformer.png")

# %%
# What a rank holds of each layer and what it sends for it: in a block, queries, keys and values for heads in place of tokens.

figure = dl.show.layers(result.report)
figure.savefig("vision_transformer_layers.png")
