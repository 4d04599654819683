"""What the pictures share: matplotlib, colours, labels and axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from distdl_lite.show.places import Rectangle

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Colour = tuple[float, float, float]

DARK = (0.2, 0.2, 0.2)
BLACK, WHITE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
# Those of Okabe and Ito, which also people who see few colours tell apart.
_HUES = (0x56B4E9, 0xE69F00, 0x009E73, 0xCC79A7, 0xF0E442, 0x0072B2, 0xD55E00, 0x888888)
_SHADES = ((WHITE, 0.0), (BLACK, 0.3), (WHITE, 0.5), (BLACK, 0.6))
_FLATTEST = 0.2  # a picture's height over its width, or the other way round; what is longer is squeezed


def pyplot() -> Any:
    """matplotlib.pyplot.

    Raises
    ------
    ImportError
        If there is no matplotlib.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "distdl_lite[pictures]"') from error
    return plt


def colour(rank: int) -> Colour:
    """The colour of a rank in all pictures, as red, green and blue from 0 to 1.

    The first eight are those of Okabe and Ito (2008), which colour-blind people tell apart too; then come darker and lighter
    ones, and from rank 32 on they begin again.

    Raises
    ------
    ValueError
        If the rank is negative.

    Examples
    --------
    >>> import distdl_lite as dl
    >>> [round(part, 2) for part in dl.show.colour(1)]
    [0.9, 0.62, 0.0]
    """
    if rank < 0:
        raise ValueError(f"a rank is not negative, {rank} has no colour")
    turn, number = divmod(rank, len(_HUES))
    hue = _HUES[number]
    plain = (hue >> 16) / 255, (hue >> 8 & 255) / 255, (hue & 255) / 255
    return mixed(plain, *_SHADES[turn % len(_SHADES)])


def mixed(one: Colour, other: Colour, share: float) -> Colour:
    """A colour with a share of another."""
    red, green, blue = (a + (b - a) * share for a, b in zip(one, other, strict=True))
    return red, green, blue


def pale(rank: int) -> Colour:
    """A rank's colour behind words and arrows."""
    return mixed(colour(rank), WHITE, 0.5)


def deep(rank: int) -> Colour:
    """A rank's colour for lines."""
    return mixed(colour(rank), BLACK, 0.3)


def readable_on(ground: Colour) -> str:
    """Black or white."""
    return "black" if 0.299 * ground[0] + 0.587 * ground[1] + 0.114 * ground[2] > 0.5 else "white"


def axes_of(ax: Axes | None, ratio: float, inches: float = 5.5) -> Axes:
    """The Axes given, or those of a new figure for a picture of this height over its width."""
    if ax is not None:
        return ax
    ratio = min(max(ratio, _FLATTEST), 1 / _FLATTEST)
    width, height = (inches, inches * ratio) if ratio < 1 else (inches / ratio, inches)
    return pyplot().figure(figsize=(max(width, 1.5) + 0.8, height + 0.9), layout="constrained").subplots()


def frame(ax: Axes, left: float, right: float, top: float, bottom: float) -> None:
    """Set the limits, to scale unless that would be a line, with y downwards."""
    ax.set_xlim(left, right)
    ax.set_ylim(bottom, top)
    ratio = (bottom - top) / (right - left)
    ax.set_box_aspect(min(max(ratio, _FLATTEST), 1 / _FLATTEST))
    for side in ax.spines.values():
        side.set_visible(False)
    ax.tick_params(length=0)


def points(ax: Axes) -> tuple[float, float]:
    """How many points of a font a unit of the drawn Axes takes, to the right and down."""
    ax.apply_aspect()
    window, scale = ax.get_window_extent(), 72 / ax.figure.dpi
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    return scale * window.width / abs(right - left), scale * window.height / abs(top - bottom)


def fitting(text: str, width: float, height: float) -> float | None:
    """The size of the font for a text in a box of so many points, None where it could not be read."""
    size = min(11.0, 0.8 * height, width / (0.7 * len(text)))
    return size if size >= 4.2 else None


def label(ax: Axes, text: str, place: Rectangle, ground: Colour, scale: tuple[float, float], **options: Any) -> None:
    """A text in the middle of a rectangle, upright or turned, if it fits."""
    x, y, width, height = place
    across, down = width * scale[0], height * scale[1]
    size, turned = fitting(text, across, down), fitting(text, down, across)
    if size or turned:
        middle = {"ha": "center", "va": "center", "color": readable_on(ground), "fontsize": size or turned}
        ax.text(x + width / 2, y + height / 2, text, rotation=0 if size else 90, **(middle | options))


def rectangle(ax: Axes, place: Rectangle, **options: Any) -> None:
    """Draw a rectangle."""
    from matplotlib.patches import Rectangle as Patch

    ax.add_patch(Patch(place[:2], *place[2:], **options))


def line_width(place: Rectangle, scale: tuple[float, float], most: float = 0.8) -> float:
    """The width of a rectangle's border, thinner round a small one."""
    return min(most, 0.1 * min(place[2] * scale[0], place[3] * scale[1]))


def spread(marks: Sequence[tuple[float, int]], least: float) -> list[tuple[float, int]]:
    """Of marks on an axis those at least so far from each other, the last among them."""
    found: list[tuple[float, int]] = []
    for mark in sorted(set(marks)):
        if not found or mark[0] - found[-1][0] >= least:
            found.append(mark)
    last = max(marks, default=None)
    if last is not None and last not in found:
        found[-1:] = [last] if len(found) > 1 else [*found, last]
    return found
