"""What `benchmarks.input_pipeline` compares: ways from JPEG files to batches of random crops, uint8 [b, h, w, 3].

A program is a function of a Job that returns an endless iterator of batches, with `close()`. A back-end decodes, crops
and resizes one picture; it runs in our own loader, so that back-ends differ in nothing else. The other libraries draw
boxes by the same rule. torch's program needs no torchvision, but does the same: Pillow decodes, crops and resizes.
"""

import dataclasses
import functools
import importlib.util
import io
import itertools
import math
import random
from collections.abc import Callable, Iterator

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from configs.common import get_config
from mae_jax.data.decoding import open_picture
from mae_jax.data.loader import make_train_batches
from mae_jax.data.sources import Source, make_source
from mae_jax.data.transforms import CROP_TRIES, Box, crop_draws, sample_crops

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
AHEAD = 2  # batches that each program reads ahead; torch: each worker


@dataclasses.dataclass(frozen=True)
class Job:
    """What to make batches of, and with what: `workers` processes, or with 0 threads of this one (tf: always these)."""

    path: str
    size: int
    batch_size: int
    workers: int
    # Other forms of the same pictures: name -> settings `data.*` that read them.
    kinds: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)

    def settings(self) -> ConfigDict:
        """The group `data` of the library's settings."""
        data = get_config().data
        data.update(name="image_folder", path=self.path, batch_size=self.batch_size, num_workers=self.workers,
                    prefetch_batches=AHEAD, crop_scale=SCALE, crop_ratio=RATIO)  # fmt: skip
        data.update(self.kinds.get("", {}))
        return data

    def source(self) -> Source:
        return make_source(self.settings(), "train", (self.size, self.size), 3)


class Images(Iterator[np.ndarray]):
    """The pictures of the batches that our loader makes."""

    def __init__(self, job: Job, source: Source, settings: ConfigDict):
        self._batches = make_train_batches(source, settings, (job.size, job.size), 3)

    def __next__(self) -> np.ndarray:
        return next(self._batches)["image"]

    def close(self) -> None:
        self._batches.close()


def ours(job: Job, kind: str = "") -> Images:
    """The library as users run it, on the folder or on another form of its pictures."""
    job = dataclasses.replace(job, kinds={"": job.kinds[kind]} if kind else {})
    return Images(job, job.source(), job.settings())


# (encoded picture, draws [1, CROP_TRIES, 4], size) -> uint8 [*size, 3]
Backend = Callable[[bytes, np.ndarray, tuple[int, int]], np.ndarray]


class Prepared(Source):
    """A source whose pictures a back-end has already cropped and resized: the loader's crop has nothing left to do."""

    def __init__(self, source: Source, backend: Backend, size: int):
        self._source, self._backend, self._size = source, backend, (size, size)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        image = self._backend(self._source[index]["image"], crop_draws(0, index, 1), self._size)
        return {"image": image, "label": -1}

    def name_of(self, index: int) -> str:
        return self._source.name_of(index)


def with_backend(backend: Backend, job: Job) -> Images:
    """Our loader, but another way to decode, crop and resize."""
    settings = job.settings()
    settings.update(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    return Images(job, Prepared(job.source(), backend, job.size), settings)


def draw_box(height: int, width: int, draws: np.ndarray) -> Box:
    """The box of the crop of draws [1, CROP_TRIES, 4]."""
    (box,) = sample_crops(np.asarray([height]), np.asarray([width]), draws, SCALE, RATIO)
    return tuple(box.tolist())


def our_crop(data: bytes, draws: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """What the library does, as a back-end; only its quality is measured so."""
    picture = open_picture(data, 3, 10**9)
    return picture.part(draw_box(picture.height, picture.width, draws), size, exact=False)


def pillow(data: bytes, draws: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Decodes all of the picture, and resizes with an antialiased bicubic filter: what the others are compared with."""
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    return np.asarray(cut(picture, draw_box(picture.height, picture.width, draws), size))


def cut(picture: Image.Image, box: Box, size: tuple[int, int]) -> Image.Image:
    top, left, height, width = box
    picture = picture.crop((left, top, left + width, top + height))
    return picture.resize(size[::-1], Image.Resampling.BICUBIC)


def simplejpeg_and_pillow(data: bytes, draws: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    import simplejpeg

    image = simplejpeg.decode_jpeg(data)
    top, left, height, width = draw_box(*image.shape[:2], draws)
    picture = Image.fromarray(np.ascontiguousarray(image[top : top + height, left : left + width]))
    return np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC))


def opencv_and_pillow(data: bytes, draws: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    picture = Image.fromarray(_opencv_box(data, draws))
    return np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC))


def opencv_area(data: bytes, draws: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes with a box filter, which antialiases, where the crop shrinks; enlarged, it is bilinear."""
    import cv2

    return cv2.resize(_opencv_box(data, draws), size[::-1], interpolation=cv2.INTER_AREA)


def opencv_cubic(data: bytes, draws: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes with a bicubic filter that does not antialias."""
    import cv2

    return cv2.resize(_opencv_box(data, draws), size[::-1], interpolation=cv2.INTER_CUBIC)


def _opencv_box(data: bytes, draws: np.ndarray) -> np.ndarray:
    import cv2

    cv2.setNumThreads(0)  # the loader has threads of its own
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    top, left, height, width = draw_box(*image.shape[:2], draws)
    return np.ascontiguousarray(image[top : top + height, left : left + width])


BACKENDS: dict[str, tuple[str, Backend]] = {  # name -> (package that it needs, the function)
    "Pillow": ("PIL", pillow),
    "simplejpeg, Pillow bicubic": ("simplejpeg", simplejpeg_and_pillow),
    "OpenCV, Pillow bicubic": ("cv2", opencv_and_pillow),
    "OpenCV, box filter": ("cv2", opencv_area),
    "OpenCV, bicubic, not antialiased": ("cv2", opencv_cubic),
}


class TorchPictures:
    """A torch data set, endless: what torchvision's RandomResizedCrop does to Pillow's pictures."""

    def __init__(self, source: Source, size: int):
        self._source, self._size = source, (size, size)

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, place: int):
        import torch

        picture = Image.open(io.BytesIO(self._source[place % len(self._source)]["image"])).convert("RGB")
        return torch.from_numpy(np.array(cut(picture, plain_box(picture.height, picture.width), self._size)))


def plain_box(height: int, width: int) -> Box:
    """The same rule for one picture, in plain Python."""
    for _ in range(CROP_TRIES):
        area = height * width * random.uniform(*SCALE)
        aspect = math.exp(random.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        box_height, box_width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < box_height <= height and 0 < box_width <= width:
            return random.randint(0, height - box_height), random.randint(0, width - box_width), box_height, box_width
    return 0, 0, height, width  # hardly ever


def torch_loader(job: Job):
    """torch's DataLoader, as its users have it: with 0 workers the program itself reads."""
    import torch

    pictures = TorchPictures(job.source(), job.size)
    options = {"multiprocessing_context": "spawn", "prefetch_factor": AHEAD} if job.workers else {}
    loader = torch.utils.data.DataLoader(pictures, job.batch_size, sampler=itertools.count(), num_workers=job.workers,
                                         **options)  # fmt: skip

    def batches():  # a generator, which has close()
        for batch in loader:
            yield batch.numpy()

    return batches()


def tf_data(job: Job):
    """tf.data: decodes the box alone, resizes with an antialiased bicubic filter; `workers` threads, 0: its choice."""
    import tensorflow as tf

    source = job.source()
    paths = tf.data.Dataset.from_tensor_slices([source.name_of(index) for index in range(len(source))])

    def prepare(path):
        data = tf.io.read_file(path)
        shape = tf.io.extract_jpeg_shape(data)
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
            shape, tf.zeros((1, 0, 4)), aspect_ratio_range=RATIO, area_range=SCALE, max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )  # fmt: skip
        image = tf.image.decode_and_crop_jpeg(data, tf.concat([begin[:2], extent[:2]], 0), channels=3)
        image = tf.image.resize(image, (job.size, job.size), "bicubic", antialias=True)
        return tf.cast(tf.round(tf.clip_by_value(image, 0, 255)), tf.uint8)

    options = tf.data.Options()
    if job.workers:
        options.threading.private_threadpool_size = job.workers
    batches = paths.shuffle(len(source)).repeat().map(prepare, job.workers or tf.data.AUTOTUNE).batch(job.batch_size)
    iterator = batches.prefetch(AHEAD).with_options(options).as_numpy_iterator()

    def images():
        yield from iterator

    return images()


def programs(against: list[str], backends: bool = True) -> tuple[dict[str, Callable[[Job], Iterator]], list[str]]:
    """Returns name -> program of what is installed, ours first, and the names of the packages that are missing."""
    needed: dict[str, tuple[str, Callable]] = {"mae_jax": ("PIL", ours)}
    if backends:
        needed |= {
            name: (package, functools.partial(with_backend, backend)) for name, (package, backend) in BACKENDS.items()
        }
    others = {"torch": ("torch DataLoader", torch_loader), "tf": ("tf.data", tf_data)}
    packages = {"torch": "torch", "tf": "tensorflow"}
    needed |= {others[name][0]: (packages[name], others[name][1]) for name in against}
    found, missing = {}, []
    for name, (package, program) in needed.items():
        if importlib.util.find_spec(package):
            found[name] = program
        else:
            missing.append(f"{name} ({package} is not installed)")
    return found, missing


def quality(backend: Backend, source: Source, size: int, count: int = 64) -> float:
    """PSNR, dB, of a back-end's crops to Pillow's, over `count` pictures of all parts; infinite: all are the same."""
    indices = range(0, len(source), max(1, len(source) // count))
    error = 0.0
    for index in indices:
        data, draws = source[index]["image"], crop_draws(0, index, 1)
        made, wanted = (np.asarray(fn(data, draws, (size, size)), np.float64) for fn in (backend, pillow))
        error += ((made - wanted) ** 2).mean() / len(indices)
    return 10 * math.log10(255**2 / error) if error else math.inf
