"""Evaluators of an autoencoder: its loss on images that it has not seen, and pictures of its reconstructions."""

import contextlib
import textwrap
from collections.abc import Iterator

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageDraw, ImageFont

from mae_jax.data.augment import denormalize, unit_range, valid_values
from mae_jax.data.loader import make_eval_batches
from mae_jax.data.sources import Wrapper, random_subset
from mae_jax.evaluation.drawing import NO_DATA, drawn_channels, find_stretch
from mae_jax.evaluation.evaluator import EvaluationData, Evaluator, State, one_ahead
from mae_jax.models.targets import TARGETS, Reconstructions, reconstruct
from mae_jax.runtime.errors import escaped
from mae_jax.runtime.mesh import put, replicated
from mae_jax.runtime.sharding import on_rows

GREY = 0.5  # colour of hidden patches, on [0, 1]
HEADINGS = ("original", "masked", "prediction", "prediction + visible")
TRUE_STATISTICS = "each predicted patch is drawn with the true patch's mean and variance (normalised targets)"
UNTRAINED = "visible patches of a prediction are noise: the loss covers the hidden patches only"


class MaskedLoss(Evaluator):
    """The mean loss over all evaluation images, of the patches in `model.loss_patches`."""

    def __init__(self, config: ConfigDict, data: EvaluationData):
        super().__init__(config, data)
        self._hidden = data.hidden_patches
        self._losses_of = on_rows(self._losses, data.mesh)

    def run(self, state: State) -> Iterator[tuple[str, float]]:
        variables = state.variables()
        found = one_ahead(self._losses_of(variables, batch) for batch in self.data.batches(self.data.evaluation))
        losses, weights = np.concatenate([np.stack(jax.device_get(rows)) for rows in found], axis=1).astype(np.float64)
        yield "loss", float(np.sum(losses * weights) / np.sum(weights))

    def _losses(self, variables: dict, batch: dict) -> tuple[jax.Array, jax.Array]:
        images, index = self.data.normalize(batch["image"]), batch["index"]
        valid = valid_values(batch["image"])
        output = self._hidden.apply(self.data.bind(variables), images, index, index, valid)
        return output.example_loss, batch["weight"]


class ReconstructionSheet(Evaluator):
    """One picture with `evaluate.pictures` evaluation images, always the same ones, and their reconstructions."""

    def __init__(self, config: ConfigDict, data: EvaluationData):
        super().__init__(config, data)
        self._hidden = data.hidden_patches
        self._normalized = TARGETS.find(data.model.target_name).normalized
        self._channels = drawn_channels(config, data.model.channels)
        self.usable: np.ndarray | None = None  # indices of the pictures to choose from; None: all
        self._reconstruct_all = jax.jit(self._reconstruct, out_shardings=replicated(data.mesh))  # too few to split

    def run(self, state: State) -> Iterator[tuple[str, np.ndarray]]:
        data, model = self.data, self.data.model
        shown = random_subset(Wrapper(data.evaluation, self.usable), self.config.evaluate.pictures)
        numbers = np.arange(len(data.evaluation)) if self.usable is None else np.sort(self.usable)
        batches = make_eval_batches(shown, self.config.data, len(shown), model.image_size, model.channels)
        with contextlib.closing(batches):
            batch = next(batches)
        rows = [batch["image"], batch["index"], numbers[shown.indices[batch["index"]]]]
        found = self._reconstruct_all(state.variables(), *put(rows, replicated(data.mesh)))
        *found, valid = jax.device_get(found)
        caption = [getattr(state, "name", f"step {int(state.step):,}"), self._hidden.description]
        caption += [TRUE_STATISTICS] if self._normalized else []
        caption += [UNTRAINED] if model.loss_patches == "hidden" else []
        if self._channels:
            stretch, words = find_stretch(found[0], valid, self._channels, unit_range(self.config.data))
            shown = {name: stretch(getattr(found[1], name)) for name in ("prediction", "pasted")}
            found = [stretch(found[0]), found[1]._replace(**shown)]
            caption.append(words)
            valid = None if valid is None else valid[..., self._channels].all(axis=-1, keepdims=True)
        yield "reconstructions", draw_reconstructions(*found, "; ".join(caption), valid)

    def _reconstruct(
        self, variables: dict, images, index, number
    ) -> tuple[jax.Array, Reconstructions, jax.Array | None]:
        """Images, what was found, both as by `denormalize`, and where the images have data."""
        data, valid, images = self.config.data, valid_values(images), self.data.normalize(images)
        output = self._hidden.apply(self.data.bind(variables), images, index, number, valid)
        patch_size = self.data.model.patch_size
        found = reconstruct(images, output.prediction, output.mask, patch_size, self._normalized, valid)
        shown = (denormalize(x, data) for x in (found.prediction, found.pasted))
        return denormalize(images, data), Reconstructions(*shown, found.visible), valid


def draw_reconstructions(
    images: np.ndarray, found: Reconstructions, caption: str, valid: np.ndarray | None = None
) -> np.ndarray:
    """A picture uint8 [height, width, 3]: a row for each image, a column for each of `HEADINGS`, a caption below.

    Images [B, H, W, C] are clipped to [0, 1]. One channel is drawn grey; of more than three, the first three are drawn.
    Pixels that are not `valid`, bool [B, H, W, 1], have one colour.
    """
    masked = images * found.visible + GREY * (1 - found.visible)
    columns = np.stack([np.asarray(column) for column in (images, masked, found.prediction, found.pasted)])
    columns = columns if valid is None else np.where(valid, columns, NO_DATA)
    columns = np.round(np.clip(columns, 0, 1) * 255).astype(np.uint8)
    columns = np.repeat(columns[..., :1], 3, axis=-1) if columns.shape[-1] < 3 else columns[..., :3]
    rows, height, width = columns[0].shape[:3]
    scale = max(1, round(112 / min(height, width)))  # small pictures are enlarged without smoothing
    height, width, gap, head = height * scale, width * scale, 6, 22
    font = ImageFont.load_default(13)
    sheet_width = gap + len(columns) * (width + gap)
    lines = textwrap.wrap(escaped(caption), sheet_width // 7)  # a letter is at most 7 pixels wide
    foot = gap + 17 * len(lines)
    sheet = Image.new("RGB", (sheet_width, head + rows * (height + gap) + foot), "white")
    draw = ImageDraw.Draw(sheet)
    for c, (heading, column) in enumerate(zip(HEADINGS, columns, strict=True)):
        x = gap + c * (width + gap)
        draw.text((x + width / 2, head / 2), heading, fill="black", font=font, anchor="mm")
        for r, image in enumerate(column):
            enlarged = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (x, head + r * (height + gap)))
    for n, line in enumerate(lines):
        draw.text((gap, sheet.height - foot + 17 * n), line, fill="black", font=font)
    return np.asarray(sheet)
