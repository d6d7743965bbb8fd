"""A picture of training crops as a model sees them, to look at before training."""

import contextlib
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageDraw, ImageFont

from mae_jax.data.augment import augmentations, color_jitter, random_flip
from mae_jax.data.loader import Arrays, make_eval_batches, make_train_batches
from mae_jax.data.sources import Source, Wrapper
from mae_jax.data.transforms import Size
from mae_jax.evaluation.drawing import NO_DATA, drawn_channels, find_stretch
from mae_jax.models.config import MAEConfig
from mae_jax.runtime.errors import escaped
from mae_jax.runtime.seeds import make_key

LEAST_SIDE = 96  # pixels of a crop in the picture; smaller ones are enlarged without smoothing


def take_crops(source: Source, data: ConfigDict, count: int, size: Size, channels: int) -> Arrays:
    """The first `count` pictures of a training run of these settings, cropped on the host, flipped on the device."""
    data = data.copy_and_resolve_references()
    data.batch_size, data.num_workers = count, 0
    with contextlib.closing(make_train_batches(source, data, size, channels)) as batches:
        batch = next(batches)
    keys = jax.random.split(make_key(data.seed, "train"), count)
    images = random_flip(keys, batch["image"]) if data.flip else batch["image"]
    if data.color_jitter:
        images = color_jitter(jax.vmap(jax.random.fold_in, (0, None))(keys, 1), images, data.color_jitter)
    return batch | {"image": np.asarray(images)}


def to_display(images: np.ndarray, shown: list[int] | None) -> tuple[np.ndarray, str]:
    """Images [b, h, w, c] as the model gets them, as uint8 [b, h, w, 3]; and how they are drawn, in words.

    The channels `shown` (three, or one as grey; see `drawn_channels`) are stretched to the percentiles STRETCH of all
    that is drawn, and no data is grey. None: 8-bit grey and colours as they are.
    """
    display, how = make_display(images, shown)
    return display(images), how


def make_display(images: np.ndarray, shown: list[int] | None) -> tuple[Callable[[np.ndarray], np.ndarray], str]:
    """The function that `to_display` applies, for other images too, stretched alike; and how it draws, in words."""
    stretch, how = None, ""
    if shown is not None:
        images = images.astype(np.float32)
        stretch, how = find_stretch(images, np.isfinite(images), shown)

    def display(images: np.ndarray) -> np.ndarray:
        if stretch is None:
            images = images / 255
        else:
            images = images.astype(np.float32)
            images = np.where(np.isfinite(images)[..., shown], stretch(images), NO_DATA)
        images = np.round(np.clip(images, 0, 1) * 255).astype(np.uint8)
        return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images

    return display, how


def draw_pictures(
    config: ConfigDict, source: Source, indices: np.ndarray, names: Sequence[str], caption: Sequence[str]
) -> np.ndarray:
    """`draw_crops` of pictures of a source, in the order of the indices [n], cut as for evaluation."""
    model, chosen = MAEConfig(**config.model), Wrapper(source, indices)
    batches = make_eval_batches(chosen, config.data, len(chosen), model.image_size, model.channels, replaces=False)
    with contextlib.closing(batches):
        images = next(batches)["image"][np.argsort(np.argsort(indices))]
    pictures, how = to_display(images, drawn_channels(config, model.channels))
    return draw_crops(pictures, names, [*caption, how])


def describe_crops(data: ConfigDict) -> str:
    changes = ", ".join(augmentations(data, of_classifier=False)) or "centre crop"
    return f"training crops as the model sees them ({changes})"


def draw_crops(pictures: np.ndarray, names: Sequence[str], caption: Sequence[str]) -> np.ndarray:
    """A grid uint8 [height, width, 3] of pictures [b, h, w, 3], a name below each and lines of caption at the top."""
    count, height, width, _ = pictures.shape
    scale = max(1, math.ceil(LEAST_SIDE / min(height, width)))
    height, width, gap, font = height * scale, width * scale, 6, ImageFont.load_default(13)
    text = 18 if any(names) else 0
    columns = min(count, max(1, round(math.sqrt(count * (height + text) / width))))
    rows = -(-count // columns)
    lines = [line for part in caption if part for line in wrapped(part, font, columns * (width + gap) - gap)]
    head = gap + 18 * len(lines)
    grid = Image.new("RGB", (gap + columns * (width + gap), head + gap + rows * (height + text + gap)), "white")
    draw = ImageDraw.Draw(grid)
    for place, line in enumerate(lines):
        draw.text((gap, gap + 18 * place), line, fill="black", font=font)
    for place, (picture, name) in enumerate(zip(pictures, names, strict=True)):
        row, column = divmod(place, columns)
        x, y = gap + column * (width + gap), head + gap + row * (height + text + gap)
        grid.paste(Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST), (x, y))
        draw.text((x, y + height + 1), shortened(escaped(name), font, width), fill="black", font=font)
    return np.asarray(grid)


def shortened(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, with its end cut off if it is wider than so many pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The text in lines of at most so many pixels, or of one word."""
    lines = [""]
    for word in escaped(text).split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if font.getlength(longer) <= width else [*lines, word]
    return [line for line in lines if line]
