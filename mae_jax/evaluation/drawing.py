"""Diagrams as pictures."""

from collections.abc import Callable
from typing import Any

import numpy as np


def draw(width: float, height: float, paint: Callable[[Any], None]) -> np.ndarray:
    """What `paint` puts on a matplotlib figure of this size in inches: a picture uint8 [h, w, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import: a second
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    paint(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
