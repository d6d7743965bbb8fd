"""Small data of each kind that `data.name` reads, made once for the tests of whole runs."""

import csv
import os
import signal
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.input_kinds import write_parquet, write_table, write_tars
from configs import common
from mae_jax.data.sources import make_sources

COUNTS = {"train": 32, "validation": 12}
CLASSES = ("dark", "light", "plain")
BANDS = 13


def picture(index: int, channels: int = 3) -> np.ndarray:
    """Smooth float [20, 24, channels] on [0, 1]; its class is index % 3, its brightness grows with that."""
    rng = np.random.default_rng(index)
    coarse = rng.uniform(0, 0.3, (5, 6, channels)) + 0.3 * (index % 3)
    return np.kron(coarse, np.ones((4, 4, 1)))


def write_folder(root: Path) -> dict:
    """JPEGs in class folders of two splits: the settings `data.*` that read them."""
    return _write_files(
        root, "jpg", lambda index, file: Image.fromarray(_scaled(picture(index), 255, np.uint8)).save(file)
    )


def write_bands(root: Path) -> dict:
    """uint16 arrays of 13 bands: band b is (b + 1) times as bright as band 0."""

    def write(index: int, file: Path) -> None:
        base = _scaled(picture(index, 1), 300, np.uint16)
        np.save(file, base * np.arange(1, BANDS + 1, dtype=np.uint16))

    return _write_files(root, "npy", write) | {"value_range": (0, 4000)}


def write_grey12(root: Path) -> dict:
    """12-bit grey values in 16-bit PNGs."""

    def write(index: int, file: Path) -> None:
        Image.fromarray(_scaled(picture(index, 1)[:, :, 0], 4095, np.uint16)).save(file)

    return _write_files(root, "png", write) | {"value_range": (0, 4095)}


def write_gaps(root: Path) -> dict:
    """float32 TIFFs of 2 bands, NaN where nothing was measured, in units of their own."""
    import tifffile

    def write(index: int, file: Path) -> None:
        image = (100 * picture(index, 2) - 40).astype(np.float32)
        image[:6, : 4 + index % 5] = np.nan
        tifffile.imwrite(file, image, planarconfig="contig")

    return _write_files(root, "tif", write) | {"mean": (5.0,), "std": (30.0,)}


def write_labels(root: Path, kind: str) -> dict:
    """A table of the pictures of `write_folder` with several labels a picture, or a number; a column is the split."""
    folder = Path(write_folder(root / "pictures")["path"])
    with open(root / "labels.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("file", "label", "split"))
        for path in sorted(folder.rglob("*.jpg")):
            index = int(path.stem)
            several = [name for name, place in zip(CLASSES, (index % 3, index % 2, 2), strict=True) if place]
            writer.writerow((path.relative_to(root), "|".join(several) if kind == "multi" else 7.5 * (index % 3) - 2,
                             path.parts[-3]))  # fmt: skip
    return {"name": "table", "path": str(root / "labels.csv"), "label_kind": kind} | (
        {"label_separator": "|"} if kind == "multi" else {}
    )


def write_others(root: Path) -> dict[str, dict]:
    """The JPEGs of `write_folder` in every form: name -> settings."""
    folder = write_folder(root / "pictures")
    data = common.get_config().data
    data.update(folder)
    sources = make_sources(data, (16, 16), 3)
    writers = {"table": write_table, "parquet": write_parquet, "webdataset": write_tars}
    return {"folder": folder} | {name: write(root, *sources) for name, write in writers.items()}


def _scaled(image: np.ndarray, high: int, dtype: type) -> np.ndarray:
    return np.round(image * high).astype(dtype)


def _write_files(root: Path, extension: str, write) -> dict:
    index = 0
    for split, count in COUNTS.items():
        for _ in range(count):
            file = root / split / CLASSES[index % 3] / f"{index:03d}.{extension}"
            file.parent.mkdir(parents=True, exist_ok=True)
            write(index, file)
            index += 1
    return {"name": "image_folder", "path": str(root)}


class Killer:
    """A writer of metrics that kills its process, as SIGKILL from outside does, at step 5, with step 3 saved."""

    def __init__(self, workdir, config, start_step):
        self._checkpoint = Path(workdir, "checkpoints", "3")

    def scalars(self, step: int, values: dict) -> None:
        if step == 5:
            while not self._checkpoint.exists():  # it is written in the background
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        pass

    def close(self) -> None:
        pass
