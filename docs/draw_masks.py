"""Draws docs/masks.png: a mask of each way of sampling, for two square grids and for one that is not.

From the project's folder: python -m docs.draw_masks docs/masks.png
"""

import sys
from types import SimpleNamespace

import jax
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mae_jax.models.masking import draw_masks

WAYS = (
    ("random, 75 %", dict(mask_ratio=0.75)),
    ("random, 90 %", dict(mask_ratio=0.9)),
    ("cells of 2 x 2, 75 %", dict(mask_ratio=0.75, mask_cell=2)),
    ("cells of 4 x 4, 75 %", dict(mask_ratio=0.75, mask_cell=4)),
    ("block, 50 %", dict(mask_ratio=0.5, mask_sampling="block")),
    ("block, 75 %", dict(mask_ratio=0.75, mask_sampling="block")),
    ("grid, 75 %", dict(mask_ratio=0.75, mask_sampling="grid")),
)
GRIDS = ((16, 16), (16, 16), (12, 20))


def main(path: str) -> None:
    figure = Figure(figsize=(2 * len(WAYS), 5.6), dpi=80, layout="constrained")
    for row, grid in enumerate(GRIDS):
        for column, (title, settings) in enumerate(WAYS):
            axes = figure.add_subplot(len(GRIDS), len(WAYS), row * len(WAYS) + column + 1)
            config = SimpleNamespace(**{"mask_sampling": "random", "mask_cell": 1} | settings)
            keys = jax.random.split(jax.random.key(row), 1)
            masks = draw_masks(keys, None, grid, config.mask_ratio, config)
            axes.pcolormesh(np.asarray(masks.mask[0]).reshape(grid)[::-1], cmap="Greys", vmin=-0.2, vmax=1.3,
                            edgecolors="white", linewidth=0.6)  # fmt: skip
            axes.set(xticks=[], yticks=[], aspect="equal", title=title if row == 0 else None)
            axes.spines[:].set_visible(False)
    canvas = FigureCanvasAgg(figure)
    canvas.print_png(path)


if __name__ == "__main__":
    main(sys.argv[1])
