"""What pictures share: diagrams, and how channels that are no 8-bit colours are shown."""

from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mae_jax.data.augment import dtype_of
from mae_jax.runtime.errors import UserError

NO_DATA = 0.85  # colour of pixels without data, on [0, 1]
STRETCH = (2, 98)  # percentiles of the originals that are drawn black and white, where pictures are not 8-bit colours


def draw(width: float, height: float, paint: Callable[[Any], None]) -> np.ndarray:
    """What `paint` puts on a matplotlib figure of this size in inches: a picture uint8 [h, w, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import: a second
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    paint(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def drawn_channels(config: ConfigDict, channels: int) -> list[int] | None:
    """The channels to stretch and draw, three or one; None: grey or RGB pictures of 8 bits are drawn as they are.

    UserError for a wrong `evaluate.shown_channels`.
    """
    data, given = config.data, config.evaluate.shown_channels
    if given is None:
        plain = channels in (1, 3) and dtype_of(data) == np.uint8 and data.value_range is None
        return None if plain else [0, 1, 2] if channels >= 3 else [0]
    listed = [given] if isinstance(given, int) else list(given) if isinstance(given, list | tuple) else []
    if len(listed) not in (1, 3) or not all(type(n) is int and 0 <= n < channels for n in listed):
        raise UserError(
            f"evaluate.shown_channels={given!r} must be three channels, for red, green and blue, or one, from 0 to "
            f"{channels - 1}"
        )
    return listed


def find_stretch(
    images: np.ndarray, valid: np.ndarray | None, channels: list[int], units: tuple[float, float] = (0, 1)
) -> tuple[Callable[[np.ndarray], np.ndarray], str]:
    """A function that takes `channels` of images [..., C] and stretches them to [0, 1], and what it does, in words.

    0 and 1 are percentiles of the valid values of these images; `units` are the data's own values of their 0 and 1.
    """
    ends = []
    for n in channels:
        values = images[..., n] if valid is None else images[..., n][valid[..., n]]
        ends.append(np.percentile(values, STRETCH) if values.size else (0.0, 1.0))
    low, high = np.asarray(ends, np.float32).T

    def stretch(x: np.ndarray) -> np.ndarray:
        return (x[..., channels] - low) / np.where(high > low, high - low, 1)

    own = [[units[0] + end * (units[1] - units[0]) for end in pair] for pair in ends]
    limits = ", ".join(f"{first:.5g} to {last:.5g}" for first, last in own)
    kind, each, names = ("s", "each ", "red, green, blue") if len(channels) == 3 else ("", "", "grey")
    words = f"channel{kind} {', '.join(map(str, channels))} as {names}, {each}from its 2nd to its 98th percentile"
    return stretch, f"{words} ({limits})"
