"""The picture of the front page: a photograph cut over four ranks, a network, and the messages between its blocks."""

from itertools import product

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Polygon
from matplotlib.transforms import Affine2D

import distdl_lite as dl

GAP = 0.16  # between blocks
RUN, RISE = 0.72, 0.26  # how a plane lies: one step to the right of a picture goes so far right and up
photographs = plt.imread("denoise.png")[463:727]  # noisy, denoised, clean: what denoise.py drew


def on_page(x: float, size: float) -> Affine2D:
    """Where the points of a plane of this size at `x` stand, whose own width and height are 1 + GAP."""
    return Affine2D.from_values(RUN * size, RISE * size, 0, -size, x, size / 2)


def draw_plane(ax: Axes, x: float, size: float, channels: int, picture: object = None) -> None:
    """The blocks of one tensor, those of all channels behind each other."""
    for depth, (row, column) in product(reversed(range(channels)), product((0, 1), (0, 1))):
        left, top, side = column * (0.5 + GAP), row * (0.5 + GAP), 0.5
        corners = [(left, top), (left + side, top), (left + side, top + side), (left, top + side)]
        place = on_page(x + 0.055 * depth, size) + ax.transData
        face = dl.show.colour(2 * row + column)
        ax.add_patch(block := Polygon(corners, transform=place, facecolor=face, edgecolor="white", linewidth=0.8))
        if picture is not None:
            extent = (left, left + side, top + side, top)
            rows, columns = (slice(half * n // 2, (half + 1) * n // 2) for half, n in ((row, 264), (column, 441)))
            image = ax.imshow(picture[rows, columns], extent=extent, transform=place, aspect="auto")
            image.set_clip_path(block)
            block.set(facecolor="none", edgecolor=face, linewidth=4, zorder=3)


def draw_messages(ax: Axes, x: float, size: float) -> None:
    """The arrows between neighbouring blocks, there and back."""
    for across, along in product((0.25, 0.75 + GAP), (0.4, 0.6 + GAP)):
        for start, end in (((along, across), (1 + GAP - along, across)), ((across, along), (across, 1 + GAP - along))):
            shift = 0.06 if along < 0.5 else -0.06
            (a, b), (c, d) = start, end
            if b == d:
                b, d = b + shift, d + shift
            else:
                a, c = a + shift, c + shift
            tips = on_page(x, size).transform([(a, b), (c, d)])
            style = {"arrowstyle": "-|>", "color": "black", "linewidth": 1.6, "mutation_scale": 11, "shrinkA": 0}
            ax.annotate("", tips[1], tips[0], arrowprops={**style, "shrinkB": 0}, zorder=4)


figure, ax = plt.subplots(figsize=(10, 3.6), layout="constrained")
noisy, denoised = photographs[:, 4:445], photographs[:, 454:895]
planes = [
    (0.0, 1.7, 1, noisy, "input"),
    (2.15, 1.4, 3, None, "conv"),
    (4.0, 0.95, 6, None, "pool, conv"),
    (5.55, 1.4, 3, None, "upsample, conv"),
    (7.5, 1.7, 1, denoised, "output"),
]
for x, size, channels, picture, words in planes:
    draw_plane(ax, x, size, channels, picture)
    if picture is None:
        draw_messages(ax, x, size)
    middle = x + RUN * size * (1 + GAP) / 2
    ax.text(middle, -1.62, words, ha="center", fontsize=16)
for x, *_ in planes[1:]:
    ax.annotate("", (x - 0.12, 0), (x - 0.42, 0), arrowprops={"arrowstyle": "-|>", "color": "0.6", "linewidth": 3})
ax.set(xlim=(-0.05, 9.0), ylim=(-1.7, 1.45), aspect="equal")
ax.set_axis_off()
