"""Progressive resolution: smaller training images in the first stages of a run (`train.resolutions`).

FastMIM-P (Guo et al. 2022, arXiv 2212.06593), DailyMAE (Wu et al. 2024, arXiv 2404.00509). Models take every size that
their patches divide: positions are a formula, or a table that the forward pass resizes.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from mae_jax.models.config import MAEConfig
from mae_jax.runtime.errors import UserError


class Stage(NamedTuple):
    first_step: int
    image_size: tuple[int, int]  # height and width in pixels of this and the following steps


Stages = Sequence[Stage]


def make_stages(resolutions: Sequence[tuple[float, Any]], image_size: tuple[int, int], total_steps: int) -> Stages:
    """The stages of a run, without empty ones; the last has `image_size` and at least one step."""
    ends = [min(round(share * total_steps), total_steps - 1) for share, _ in resolutions]
    sizes = [*(_sides(size) for _, size in resolutions), tuple(image_size)]
    begins = zip([0, *ends], [*ends, total_steps], sizes, strict=True)
    return tuple(Stage(first, size) for first, end, size in begins if first < end)


def size_at(stages: Stages, step: int) -> tuple[int, int]:
    """(height, width) of the images of a step."""
    return stages[bisect.bisect_right([stage.first_step for stage in stages], step) - 1].image_size


def sizes_from(stages: Stages, step: int) -> tuple[tuple[int, int], ...]:
    """The distinct sizes of a step and all later ones, in order."""
    later = (stage.image_size for stage in stages if stage.first_step > step)
    return tuple(dict.fromkeys((size_at(stages, step), *later)))


def check_resolutions(resolutions: Any, model: MAEConfig | None = None) -> None:
    """Checks `train.resolutions`: pairs (share of the run at which the stage ends, pixels or (height, width)).

    A `model`, if known already, must take images of these sizes, none larger than its own. Raises UserError.
    """
    text = f"train.resolutions={resolutions}"
    try:
        shares, sizes = [0.0, *(share for share, _ in resolutions), 1.0], [_sides(size) for _, size in resolutions]
        valid = all(isinstance(side, int) and side > 0 for height, width in sizes for side in (height, width))
        valid &= all(low < high for low, high in itertools.pairwise(shares))
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise UserError(
            f"{text} must be pairs of a share of the run, rising between 0 and 1, and pixels, for example "
            "--config.train.resolutions='((0.5, 128), (0.75, 160))'"
        )
    for height, width in sizes if model else ():
        if height > model.image_size[0] or width > model.image_size[1]:
            raise UserError(
                f"{text}: {height} x {width} pixels are more than model.image_size="
                f"{model.image_size[0]} x {model.image_size[1]}, which the last stage has; make them smaller"
            )
        try:
            dataclasses.replace(model, image_size=(height, width))
        except UserError as error:
            raise UserError(f"{text}: not {height} x {width} pixels: {error}") from error


def _sides(size: Any) -> tuple:
    return tuple(size) if isinstance(size, tuple | list) else (size, size)
