"""What one core decodes: `python -m benchmarks.input_decoders DIR [--need=7000] [--cores 16 24] [--json=FILE]`.

From a JPEG in memory to a random crop, picture after picture in this process: the library, other packages that are
installed, and Pillow, which the others are compared with. Then the same for pictures that were made smaller before
(shorter side 256 pixels, quality 95). The ways take turns; CPU seconds count all threads; medians over rounds. "Wait"
is the share of its time that a device waits which needs so many images/s from so many cores, if these do nothing else:
max(0, 1 - cores * rate / need).
"""

import argparse
import importlib.util
import io
import json
import math
import os
import statistics
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.input_programs import BACKENDS, Backend, Job, draw_box, our_crop, pillow, quality
from mae_jax.data.transforms import crop_draws

SHORTER_SIDE, QUALITY = 256, 95
RUN = 32  # pictures in a turn

Picture = dict[str, bytes]  # as a source gives it


def main() -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", metavar="DIR", help="an image folder of JPEG files")
    parser.add_argument("--pictures", type=int, default=256, help="how many, evenly out of all")
    parser.add_argument("--size", type=int, default=224, help="height and width of the crops, pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--need", type=float, default=7000, help="images/s that the device takes")
    parser.add_argument("--cores", type=int, nargs="+", default=[16, 24], help="cores that feed it")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    source = Job(arguments.folder, arguments.size, 1, 0).source()
    indices = np.linspace(0, len(source) - 1, min(len(source), arguments.pictures)).astype(int).tolist()
    stored = [picture for picture in map(source.__getitem__, indices) if is_upright_jpeg(picture["image"])]
    measured = []
    for title, pictures in (("as they are", stored), ("made smaller", [made_smaller(each) for each in stored])):
        sides = np.mean([Image.open(io.BytesIO(picture["image"])).size for picture in pictures], 0)
        size = np.mean([len(picture["image"]) for picture in pictures])
        print(f"\n{len(pictures)} pictures {title}: {sides[0]:.0f} x {sides[1]:.0f} pixels, {size / 1000:.0f} kB\n")
        waits = [f"wait with {cores} cores" for cores in arguments.cores]
        print("| " + " | ".join(["program", "dB to Pillow", "CPU ms", "images/s a core", "to Pillow's", *waits]) + " |")
        print("|---" + "|--:" * (4 + len(waits)) + "|")
        for row in measure(pictures, arguments.size, arguments.rounds):
            row |= {"pictures": title, "wait": [wait(row["rate"], n, arguments.need) for n in arguments.cores]}
            measured.append(row)
            print(describe(row), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(measured, indent=1) + "\n")


def is_upright_jpeg(data: bytes) -> bool:
    picture = Image.open(io.BytesIO(data))
    return picture.format == "JPEG" and picture.getexif().get(0x0112, 1) == 1


def made_smaller(picture: Picture) -> Picture:
    """The picture with a shorter side of at most SHORTER_SIDE pixels, stored as JPEG again."""
    image, stream = Image.open(io.BytesIO(picture["image"])).convert("RGB"), io.BytesIO()
    scale = min(1, SHORTER_SIDE / min(image.size))
    size = round(image.width * scale), round(image.height * scale)
    image.resize(size, Image.Resampling.BICUBIC).save(stream, "JPEG", quality=QUALITY)
    return {"image": stream.getvalue()}


def measure(pictures: list[Picture], size: int, rounds: int) -> list[dict]:
    """Rates of one core, of everything that is installed."""
    backends = {"Pillow": pillow, "mae_jax": our_crop}
    backends |= {name: fn for name, (package, fn) in DECODERS.items() if importlib.util.find_spec(package)}
    items = [(picture["image"], crop_draws(0, index, 1), (size, size)) for index, picture in enumerate(pictures)]
    seconds: dict[str, list[float]] = {name: [] for name in backends}
    for turn in range(rounds + 1):  # the first one warms up
        taken = dict.fromkeys(backends, 0.0)
        for start in range(0, len(items), RUN):
            for name, backend in backends.items():
                before = time.process_time()
                for item in items[start : start + RUN]:
                    backend(*item)
                taken[name] += (time.process_time() - before) / len(items)
        for name in backends if turn else ():
            seconds[name].append(taken[name])
    rows = []
    for name, backend in backends.items():
        ratios = [other / own for other, own in zip(seconds["Pillow"], seconds[name], strict=True)]
        median, decibels = statistics.median(seconds[name]), quality(backend, pictures, size, len(pictures))
        rows.append({"program": name, "cpu_ms": 1000 * median, "rate": 1 / median, "ratio": statistics.median(ratios),
                     "decibels": None if math.isinf(decibels) else decibels})  # fmt: skip
    return rows


def wait(rate: float, cores: int, need: float) -> float:
    """The share of the time that a device waits which needs `need` images/s of `cores` that make `rate` each."""
    return max(0.0, 1 - cores * rate / need)


def describe(row: dict) -> str:
    decibels = "same" if row["decibels"] is None else f"{row['decibels']:.1f}"
    waits = [f"{100 * share:.0f} %" for share in row["wait"]]
    cells = [row["program"], decibels, f"{row['cpu_ms']:.2f}", f"{row['rate']:.0f}", f"{row['ratio']:.2f}", *waits]
    return "| " + " | ".join(cells) + " |"


def simplejpeg_and_cykooz(data: bytes, draws: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    import cykooz_resizer as resizer
    import simplejpeg

    image = simplejpeg.decode_jpeg(data)
    top, left, height, width = draw_box(*image.shape[:2], draws)
    pixels = image[top : top + height, left : left + width].tobytes()
    target = resizer.ImageData(size[1], size[0], resizer.PixelType.U8x3)
    catmull_rom = resizer.ResizeAlg.convolution(resizer.FilterType.catmull_rom)  # bicubic with a = -1/2
    source = resizer.ImageData(width, height, resizer.PixelType.U8x3, pixels)
    resizer.Resizer().resize(source, target, resizer.ResizeOptions(resize_alg=catmull_rom))
    return np.frombuffer(target.get_buffer(), np.uint8).reshape(*size, 3)


def opencv_halved(data: bytes, draws: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The decoder shrinks the picture by 2 (DCT scaling), however large the box is."""
    import cv2

    image = Image.fromarray(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_REDUCED_COLOR_2)[..., ::-1])
    top, left, height, width = draw_box(*Image.open(io.BytesIO(data)).size[::-1], draws)
    box = left / 2, top / 2, min((left + width) / 2, image.width), min((top + height) / 2, image.height)
    return np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC, box))


def tensorflow_box(data: bytes, draws: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Only the box is decoded: rows above are skipped, those below never read."""
    import tensorflow as tf

    box = draw_box(*Image.open(io.BytesIO(data)).size[::-1], draws)
    image = tf.image.decode_and_crop_jpeg(data, box, channels=3, dct_method="INTEGER_ACCURATE").numpy()
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))


DECODERS: dict[str, tuple[str, Backend]] = BACKENDS | {
    "OpenCV, halved by the decoder, Pillow bicubic": ("cv2", opencv_halved),
    "simplejpeg, cykooz-resizer": ("cykooz_resizer", simplejpeg_and_cykooz),
    "TensorFlow, the box alone, Pillow bicubic": ("tensorflow", tensorflow_box),
}
del DECODERS["Pillow"]


if __name__ == "__main__":
    main()
