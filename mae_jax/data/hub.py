"""Data sets of Hugging Face's hub, read by its package datasets: `data.path=hf://OWNER/NAME`."""

import errno
import importlib.util
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mae_jax.data.files import first_few, read_picture_file
from mae_jax.data.rows import Rows, find_column, find_label_columns
from mae_jax.runtime.errors import UserError, first_line

HUB = "hf://"


class HubRows:
    """Pictures of a data set that `datasets` has opened: the `Reader` of their rows."""

    def __init__(self, splits: dict[str, Any], column: str, place: str):
        self._names, self._splits, self._column, self._place = list(splits), list(splits.values()), column, place
        self._starts = np.cumsum([0, *map(len, self._splits)])

    def read(self, row: int) -> bytes:
        split, row = self._find(row)
        found = self._splits[split][row][self._column] or {"bytes": None, "path": None}
        if found["bytes"] is None and found["path"] is None:
            raise OSError(errno.EINVAL, "the row has no picture")
        return read_picture_file(found["path"]) if found["bytes"] is None else found["bytes"]

    def name(self, row: int) -> str:
        return self.where(row)

    def file(self, row: int) -> str:
        return self.name(row)

    def where(self, row: int) -> str:
        split, row = self._find(row)
        return f"row {row + 1} of {self._place} {self._names[split]}"

    def _find(self, row: int) -> tuple[int, int]:
        split = int(np.searchsorted(self._starts, row, "right")) - 1
        return split, row - int(self._starts[split])


def rows_of_hub(data: ConfigDict) -> Rows:
    """The rows of hf://OWNER/NAME or hf://OWNER/NAME/CONFIG, downloaded by `datasets` into its own cache."""
    place, names = data.path, data.path.removeprefix(HUB).removeprefix("datasets/").strip("/").split("/")
    if not names[0] or len(names) > 3:
        raise UserError(f"data.path={place} is no name of the hub: hf://OWNER/NAME, or hf://OWNER/NAME/CONFIG")
    if importlib.util.find_spec("datasets") is None:
        raise UserError(f"data.path={place} needs a package: pip install datasets")
    import datasets

    try:
        found = datasets.load_dataset("/".join(names[:2]), *names[2:])
    except Exception as error:  # of many types, for a wrong name or no network
        raise UserError(f"data.path={place} cannot be loaded by datasets: {first_line(error)}") from error
    return rows_of_dataset(found, data, place)


def rows_of_dataset(found: Any, data: ConfigDict, place: str) -> Rows:
    """The rows of a `datasets.DatasetDict`."""
    import datasets

    features = next(iter(found.values())).features
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    image = find_column(images, data, "data.image_column", place) or (images[0] if len(images) == 1 else None)
    if image is None:
        has = f"several columns of pictures, {first_few(images)}" if images else "no column of pictures"
        raise UserError(f"{place} has {has}; its columns are {first_few(list(features))}: set data.image_column")
    undecoded = {
        name: split.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        for name, split in found.items()
    }
    others = [name for name in features if name != image]
    labels, group = find_label_columns(others, data, place), find_column(others, data, "data.group_column", place)

    def column(name: str) -> list[Any]:
        return [cell for split in found.values() for cell in split[name][:]]

    splits = [name for name, split in found.items() for _ in range(len(split))]
    splits = column(data.split_column) if data.split_column else splits
    feature = features[labels[0]] if len(labels) == 1 else None
    classes = getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None)
    reader = HubRows(undecoded, image, place)
    names = [f"{name}/{row}" for name, split in found.items() for row in range(len(split))]
    return Rows(place, names, reader, {name: column(name) for name in labels}, classes, splits, group and column(group))
