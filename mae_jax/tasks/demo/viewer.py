"""What the page shows: a model's results as numbers and pictures for JSON."""

import base64
import collections
import io
import itertools
import math
import os
import threading
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from mae_jax.data.augment import denormalize, dtype_of, unit_range
from mae_jax.data.files import read_picture_file
from mae_jax.data.sources import Source, random_subset
from mae_jax.evaluation.drawing import NO_DATA, drawn_channels, find_stretch
from mae_jax.interop.weights import make_processor
from mae_jax.interop.workdirs import Weights
from mae_jax.runtime.errors import UserError, escaped, reason
from mae_jax.tasks.demo.compiled import CompiledModel, Look
from mae_jax.tasks.demo.neighbours import Index, Neighbour

KEPT_BYTES = 512 * 2**20  # of opened pictures and their attention
TOP = 5  # predictions shown
NEIGHBOURS = 8


class Opened(NamedTuple):
    """A picture."""

    image: jax.Array  # [1, H, W, C], normalised
    valid: np.ndarray | None  # where it has data, bool; None: everywhere
    stretch: Any  # as by `find_stretch`; None: it is drawn as it is
    look: Look | None = None  # None: of a thumbnail


class Viewer:
    """Answers the page's questions, one at a time. UserError for all that a user can do wrong."""

    def __init__(
        self,
        model: CompiledModel,
        weights: Weights,
        config: ConfigDict,
        sources: dict[str, Source],
        index: Index | None,
    ):
        self._compiled, self._model, self._config = model, model.config, config
        self._weights, self._sources, self._index = weights, sources, index
        self._processor = make_processor(config)
        self._channels = drawn_channels(config, self._model.channels)
        self._may_lack_data = np.issubdtype(dtype_of(config.data), np.floating)
        ratio = config.evaluate.mask_ratio
        self._ratio = self._model.mask_ratio if ratio is None else ratio
        if model.reconstructs:
            self._model.num_visible(self._ratio, name="evaluate.mask_ratio")  # checks it
        self._shown = random_subset(sources["eval"], config.evaluate.pictures) if sources else None
        self._opened: collections.OrderedDict[str, Opened] = collections.OrderedDict()
        self._uploads = itertools.count(1)
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Returns when nothing is being computed."""
        with self._lock:
            pass

    def about(self) -> dict[str, Any]:
        """The model, and the pictures to choose from; a bad one has an "error" in place of its picture."""
        model, weights = self._model, self._weights
        height, width = model.image_size
        with self._lock:
            pictures = [self._listed(number) for number in range(len(self._shown or ()))]
        return {
            "name": escaped(f"{self._config.init_from}, {weights.origin}"),
            "model": f"{model.depth} blocks x {model.width}, {model.num_heads} heads; {width} x {height} pixels in "
            f"patches of {model.patch_size}",
            "others": "the class token" if model.class_tokens + model.registers == 1 else "class tokens and registers",
            "grid": model.grid, "size": model.image_size, "mask_ratio": self._ratio,
            "reconstructs": self._compiled.reconstructs, "true_statistics": self._compiled.normalized,
            "untrained_visible": model.loss_patches == "hidden",
            "kind": weights.config.get("label_kind", "class") if self._compiled.classifies else None,
            "index": len(self._index) if self._index else 0, "pictures": pictures,
        }  # fmt: skip

    def open(self, picture: Any) -> dict[str, Any]:
        """What there is to see of the picture of this number."""
        if type(picture) is not int or not 0 <= picture < len(self._shown or ()):
            raise UserError(f"picture={picture!r}: there are {len(self._shown or ())} to choose from")
        with self._lock:
            key = f"picture {picture}"
            if key not in self._opened:
                try:
                    self._keep(key, self._shown[picture]["image"])
                except OSError as error:
                    raise UserError(f"{self._shown.name_of(picture)} cannot be read: {reason(error)}") from error
            return self._describe(key, self._find(key))

    def upload(self, data: bytes) -> dict[str, Any]:
        """What there is to see of a file."""
        with self._lock:
            key = f"upload {next(self._uploads)}"
            self._keep(key, data)
            return self._describe(key, self._find(key))

    def reconstruct(self, picture: Any, hidden: Any) -> dict[str, Any]:
        """The prediction, and it with the visible patches, where the patches `hidden`, a list of numbers, are hidden.

        "loss": the mean squared error of the hidden patches in the units of the target; None if nothing is hidden.
        """
        if not self._compiled.reconstructs:
            raise UserError("this model has no decoder: it reconstructs nothing")
        count = self._model.num_patches
        if not isinstance(hidden, list) or not all(type(n) is int and 0 <= n < count for n in hidden):
            raise UserError(f"hidden must be a list of patches from 0 to {count - 1}")
        mask = np.isin(np.arange(count), hidden)[None]
        if mask.all():
            raise UserError("at least one patch must stay visible")
        with self._lock:
            opened = self._find(picture)
            prediction, pasted, loss = self._compiled.reconstruct(opened.image, opened.valid, mask)
        loss = float(loss) if mask.any() and math.isfinite(loss) else None
        return {"prediction": _png(prediction, opened), "pasted": _png(pasted, opened), "loss": loss}

    def attention(self, picture: Any, patch: Any) -> dict[str, Any]:
        """The last block's attention of a patch, or of the class token (None): to patches, as mean and by head.

        "others" is the mean share of what is no patch: class tokens and registers.
        """
        count = self._model.num_patches
        if patch is not None and (type(patch) is not int or not 0 <= patch < count):
            raise UserError(f"patch={patch!r} must be from 0 to {count - 1}, or null for the class token")
        with self._lock:
            attention = self._find(picture).look.attention[:, 0 if patch is None else 1 + patch]
        heads, others = attention[:, -count:], 1 - attention[:, -count:].sum(axis=1).mean()
        return {"mean": _rounded(heads.mean(axis=0)), "heads": _rounded(heads), "others": round(float(others), 6)}

    def _find(self, key: Any) -> Opened:
        if not isinstance(key, str) or key not in self._opened:
            raise UserError("that picture is no longer kept: choose it, or upload it, again")
        self._opened.move_to_end(key)
        return self._opened[key]

    def _keep(self, key: str, data: bytes | np.ndarray) -> None:
        opened = self._read(data)
        self._opened[key] = opened._replace(look=self._compiled.look(opened.image))
        while len(self._opened) > 1 and sum(map(_size, self._opened.values())) > KEPT_BYTES:
            self._opened.popitem(last=False)

    def _read(self, data: bytes | np.ndarray) -> Opened:
        image, data_of = self._processor(data), self._config.data
        valid = np.asarray(self._processor.valid_values(data)) if self._may_lack_data else None
        if not self._channels:
            return Opened(image, valid, None)
        values = np.asarray(denormalize(image, data_of))
        return Opened(image, valid, find_stretch(values, valid, self._channels, unit_range(data_of)))

    def _describe(self, key: str, opened: Opened) -> dict[str, Any]:
        found = {"picture": key, "image": self._draw(opened), "note": opened.stretch and opened.stretch[1]}
        if self._compiled.classifies:
            found["predictions"] = self._predictions(opened.look.outputs)
        if self._index:
            nearest = self._index.nearest(opened.look.feature, NEIGHBOURS)
            found["neighbours"] = [self._neighbour(neighbour) for neighbour in nearest]
        return found

    def _draw(self, opened: Opened) -> str:
        return _png(np.asarray(denormalize(opened.image, self._config.data)), opened)

    def _listed(self, number: int) -> dict[str, Any]:
        source, listed = self._shown, {"name": escaped(os.path.basename(self._shown.name_of(number)))}
        try:
            item = source[number]
            label = item.get("label", -1)
            if source.label_kind == "class" and source.class_names and label >= 0:
                listed["label"] = escaped(str(source.class_names[int(label)]))
            return listed | {"image": self._draw(self._read(item["image"]))}
        except (UserError, OSError) as error:
            return listed | {"error": escaped(str(error))}

    def _predictions(self, outputs: np.ndarray) -> list[dict[str, Any]]:
        """The `TOP` classes with their probabilities, the likeliest first; of numbers, the first few in their order."""
        config = self._weights.config
        names, kind = config.get("class_names"), config.get("label_kind", "class")
        values = outputs.astype(np.float64)
        if kind == "class":
            values = np.exp(values - values.max())
            values /= values.sum()
        elif kind == "multi":
            values = 1 / (1 + np.exp(-values))
        order = np.arange(len(values)) if kind == "number" else np.argsort(-values, kind="stable")
        label = {n: escaped(str(names[n])) if names else f"class {n}" for n in order[:TOP].tolist()}
        return [{"name": name, "value": float(values[n])} for n, name in label.items()]

    def _neighbour(self, neighbour: Neighbour) -> dict[str, Any]:
        file, source = neighbour.file, self._sources.get(neighbour.split)
        found = {"name": escaped(os.path.basename(str(file))), "cosine": neighbour.cosine}
        found["label"] = neighbour.label or ""
        try:
            if os.path.isfile(str(file)):
                found["image"] = self._draw(self._read(read_picture_file(file)))
            elif source is not None and neighbour.index < len(source) and _is_named(source, neighbour):
                found["image"] = self._draw(self._read(source[neighbour.index]["image"]))
        except (UserError, OSError):  # deleted or damaged meanwhile: its name and cosine still tell something
            pass
        return found


def _is_named(source: Source, neighbour: Neighbour) -> bool:
    """Whether it is this source's picture: the index may be of others."""
    return escaped(source.file_of(neighbour.index)) == neighbour.file


def _size(opened: Opened) -> int:
    """In bytes, of what can be large."""
    return opened.image.nbytes + opened.look.attention.nbytes


def _rounded(values: np.ndarray) -> list:
    return np.round(values.astype(np.float64), 6).tolist()


def _png(values: np.ndarray, opened: Opened) -> str:
    """A data URL of values [1, H, W, C] as by `denormalize`: stretched, or clipped to [0, 1]; one channel is grey."""
    if opened.stretch:
        values = opened.stretch[0](values)
    if opened.valid is not None:
        values = np.where(opened.valid.all(axis=-1, keepdims=True), values, NO_DATA)
    pixels = np.round(np.clip(values[0], 0, 1) * 255).astype(np.uint8)
    pixels = np.repeat(pixels[..., :1], 3, axis=-1) if pixels.shape[-1] < 3 else pixels[..., :3]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
