"""The interface of evaluators, the images, masks and features that they share, and their suite."""

import functools
import math
import runpy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax.data.augment import normalize
from mae_jax.data.device_batches import evaluation_batch_size, on_devices
from mae_jax.data.loader import make_eval_batches
from mae_jax.data.sources import Source, count_images, is_labelled, random_subset
from mae_jax.models.config import MAEConfig
from mae_jax.models.encoder import find_layer
from mae_jax.models.mae import MAEOutput
from mae_jax.models.masking import check_given_mask, given_masks
from mae_jax.runtime.errors import UserError, first_line
from mae_jax.runtime.mesh import process_share, whole
from mae_jax.runtime.seeds import make_key
from mae_jax.runtime.sharding import on_rows
from mae_jax.settings.registry import Registry

EVALUATORS: Registry[type["Evaluator"]] = Registry("evaluate.evaluators")
EVALUATORS["accuracy"] = "mae_jax.evaluation.classification:Accuracy"
EVALUATORS["few_shot"] = "mae_jax.evaluation.few_shot:FewShot"
EVALUATORS["knn"] = "mae_jax.evaluation.features:KNN"
EVALUATORS["linear_probe"] = "mae_jax.evaluation.linear_probe:LinearProbe"
EVALUATORS["loss"] = "mae_jax.evaluation.autoencoder:MaskedLoss"
EVALUATORS["rankme"] = "mae_jax.evaluation.features:RankMe"
EVALUATORS["reconstructions"] = "mae_jax.evaluation.autoencoder:ReconstructionSheet"


TOKENS = {"mean": "mean of the patch tokens", "class": "the class token", "patches": "the patch tokens"}
FURTHER_DRAWS = 2**31  # beyond the indices of pictures


class State(Protocol):
    """A model to evaluate: the state of a training run, or a `Trained`."""

    step: Any  # steps done: an int or a scalar array

    def variables(self) -> dict:
        """The model's variables as one nested dict, placed on the mesh."""


class Trained(NamedTuple):
    """A model that is not being trained, such as a checkpoint."""

    step: int
    values: dict  # see `State.variables`
    name: str  # for captions

    def variables(self) -> dict:
        return self.values


class HiddenPatches:
    """Masks of `count` images: from `evaluate.mask`, or drawn from seed and index. UserError for unusable ones."""

    def __init__(self, config: ConfigDict, model: MAEConfig, count: int):
        settings = config.evaluate
        self._model, self._key, self._given = model, make_key(config.seed, "evaluate"), None
        self._ratio = model.mask_ratio if settings.mask_ratio is None else settings.mask_ratio
        if settings.mask:
            self._given, self._visible = read_masks(settings.mask, count, model.grid)
        else:
            self._visible = model.num_visible(self._ratio, name="evaluate.mask_ratio")

    def apply(
        self,
        model,
        images: jax.Array,
        index: jax.Array,
        number: jax.Array,
        valid: jax.Array | None = None,
        draw: int = 0,
    ) -> MAEOutput:
        """Output for images [B, H, W, C], `valid` where they have data.

        Index [B] seeds random masks, of which each `draw` gives others; number [B] picks given ones.
        """
        if self._given is not None:
            return model(images, mask=given_masks(jnp.asarray(self._given)[number], self._visible), valid=valid)
        key = jax.random.fold_in(self._key, FURTHER_DRAWS + draw) if draw else self._key
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)
        return model(images, key=keys, mask_ratio=self._ratio, valid=valid)

    @property
    def description(self) -> str:
        """For example "75% of the patches hidden"."""
        share = self._ratio if self._given is None else 1 - self._visible / self._model.num_patches
        return f"{share:.0%} of the patches hidden{', as given' if self._given is not None else ''}"

    @property
    def counted(self) -> str:
        """The patches that the loss averages over; all of them if none is hidden."""
        all_count = self._model.loss_patches == "all" or self._visible == self._model.num_patches
        return "all" if all_count else "the hidden"


def read_masks(given: str, count: int, grid: tuple[int, int]) -> tuple[np.ndarray, int]:
    """Masks bool [count, L] (True = hidden) from FILE.npy or FILE.py:FUNCTION, and the visible count; or UserError."""
    path, _, name = given.rpartition(":") if ".py:" in given else (given, "", "")
    try:
        mask = runpy.run_path(path)[name] if name else np.load(path, allow_pickle=False)
        return check_given_mask(mask, count, grid)
    except UserError as error:
        raise UserError(f"evaluate.mask={given}: {error}") from error
    except Exception as error:  # the file holds no mask, or the user's code failed
        why = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"evaluate.mask={given} cannot be used ({why}); give FILE.npy or FILE.py:FUNCTION") from error


class EvaluationData:
    """The images that evaluators share, and their features, computed once for each state.

    `bind` makes a model of variables. k-NN and probes learn from `train`, if any. Both sources are cut to fixed random
    subsets of `evaluate.max_train_examples` and `evaluate.max_examples` pictures.
    """

    # Device batches {"feature", "label", "weight"} of the evaluation images, if the outputs of a frozen encoder
    # (`Classifier.represent`) are cached.
    kept_batches: Callable[[], Iterator[dict]] | None = None

    def __init__(
        self, config: ConfigDict, bind: Callable[[dict], Any], mesh: Mesh, train: Source | None, evaluation: Source
    ):
        self.config, self.bind, self.mesh = config, bind, mesh
        self.model = MAEConfig(**config.model)
        settings = config.evaluate
        if settings.layer is not None:
            find_layer(settings.layer, self.model.depth, "evaluate.layer: ")
        self.train = None if train is None else random_subset(train, settings.max_train_examples or len(train))
        self.evaluation = random_subset(evaluation, settings.max_examples or len(evaluation))
        self.encode_rows = on_rows(self._encode, mesh)  # (variables, batch) -> features [B, D]
        self.forget()

    @functools.cached_property
    def hidden_patches(self) -> HiddenPatches:
        """The masks of the evaluation images: the same in every evaluation."""
        return HiddenPatches(self.config, self.model, len(self.evaluation))

    @property
    def labelled(self) -> bool:
        """Whether there are training images and labels of one kind, so that features can be measured."""
        if self.train is None or self.train.label_kind != self.evaluation.label_kind:
            return False
        return is_labelled(self.train) and is_labelled(self.evaluation)

    @property
    def description(self) -> str:
        """The features and the images, in words."""
        token, layer = TOKENS[self.config.evaluate.token], self.config.evaluate.layer
        where = "" if layer is None else f" of block {layer}"
        return f"features: {token}{where} after the final norm, {self.images}"

    @property
    def images(self) -> str:
        """The images, in words."""
        return f"{count_images(self.train, self.evaluation)}, centre crops"

    def batches(self, source: Source) -> Iterator[dict]:
        """Device batches {"image" of `data.dtype`, "label", "index", "weight"}; rows of weight 0 are padding."""
        data, sizes = self.config.data, (self.model.image_size, self.model.channels)
        batch_size = evaluation_batch_size(self.config.evaluate.batch_size, len(source), self.mesh)
        batches = make_eval_batches(source, data, batch_size, *sizes, process_share(self.mesh))
        return on_devices(batches, self.mesh, data.prefetch_batches)

    def normalize(self, images: jax.Array) -> jax.Array:
        """Images [B, H, W, C] from `data.dtype` to the model's range."""
        return normalize(images, self.config.data)

    def features(self, state: State, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Features [N, D] (float32) and labels (`Source.labels`) of a split, "train" or "evaluation"; cached."""
        if self._state is not state:
            self._state, self._features = state, {}
        if split not in self._features:
            self._features[split] = self.extract(state, getattr(self, split))
        return self._features[split]

    def extract(
        self,
        state: State,
        source: Source,
        out: np.ndarray | None = None,
        encode_rows: Callable[[dict, dict], jax.Array] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Features and labels of any source, not cached; see `extract_features`.

        `encode_rows`: (variables, batch) -> replicated rows (`on_rows`), instead of the features of `evaluate.token`.
        """
        feature_fn = functools.partial(encode_rows or self.encode_rows, state.variables())
        return extract_features(feature_fn, self.batches(source), len(source), out)

    def forget(self) -> None:
        """Drops the cached features and their state."""
        self._state, self._features = None, {}

    def _encode(self, variables: dict, batch: dict) -> jax.Array:
        layer, encode = self.config.evaluate.layer, self.bind(variables).encode
        images = self.normalize(batch["image"])
        tokens = encode(images) if layer is None else encode(images, layers=(layer,))[0]
        return pool(tokens, self.config.evaluate.token, self.model.class_tokens)


class Evaluator:
    """One measurement of a model: the base class, also for evaluators of your own."""

    measures_features = False  # whether it measures frozen features; if so, a random encoder is measured too
    protocol = ""  # how it measures, in words

    def __init__(self, config: ConfigDict, data: EvaluationData):
        self.config, self.data = config, data

    def run(self, state: State) -> Iterator[tuple[str, float | np.ndarray]]:
        """Yields (name, value): a number, or a picture uint8 [height, width, 3]."""
        raise NotImplementedError


class EvaluationSuite:
    """Evaluators, by name or "module:class", on the same data. UserError for unknown names or unsuitable settings."""

    def __init__(self, config: ConfigDict, data: EvaluationData, names: Sequence[str]):
        self.data = data
        self.evaluators = [EVALUATORS.find(name)(config, data) for name in names]
        self._of_features = [one for one in self.evaluators if getattr(one, "measures_features", False)]

    def run(self, state: State, *, features_only: bool = False) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Numbers and pictures by name. A "loss" that is not finite ends the evaluation and is returned alone."""
        numbers, pictures = {}, {}
        try:
            for evaluator in self._of_features if features_only else self.evaluators:
                for name, value in evaluator.run(state):
                    if np.ndim(value):
                        pictures[name] = value
                        continue
                    numbers[name] = float(value)
                    if name == "loss" and not math.isfinite(value):
                        return {name: numbers[name]}, {}
        finally:
            self.data.forget()
        return numbers, pictures

    @property
    def measures_features(self) -> bool:
        """Whether some evaluator measures features and the data have labels for it."""
        return self.data.labelled and bool(self._of_features)

    @property
    def protocol(self) -> str:
        """How features are measured, in words."""
        return "; ".join([self.data.description, *(evaluator.protocol for evaluator in self._of_features)])


def pool(tokens: jax.Array, token: str, class_tokens: int = 1) -> jax.Array:
    """Features [B, D] from tokens [B, C + L, D]: the mean of the C class tokens (token="class") or of the L patches.

    token="patches": the patch tokens themselves, [B, L, D].
    """
    if token == "patches":
        return tokens[:, class_tokens:]
    return jnp.mean(tokens[:, :class_tokens] if token == "class" else tokens[:, class_tokens:], axis=1)


def extract_features(
    feature_fn: Callable[[dict], jax.Array], batches: Iterable[dict], count: int, out: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Features (float32) [N, D], or tokens [N, L, D], and labels (`Source.labels`) of all N = count examples, in order.

    Rows of weight 0 are padding. `out` is an array to fill, such as a memory map.
    """
    labels, done = None, 0
    computed = ((feature_fn(batch), *whole((batch["label"], batch["weight"]))) for batch in batches)
    for found, label, weight in one_ahead(computed):
        out = np.empty((count, *found.shape[1:]), np.float32) if out is None else out
        if labels is None:
            labels = np.empty((count, *label.shape[1:]), np.float32 if label.ndim > 1 else np.int64)
        real = np.asarray(weight) > 0
        rows = slice(done, done + np.count_nonzero(real))
        out[rows], labels[rows] = np.asarray(found)[real], np.asarray(label)[real]
        done = rows.stop
    if done != count or out is None:
        raise ValueError(f"the batches have {done:,} examples; count={count:,} must be their number, at least 1")
    return out, labels


def one_ahead(items: Iterable) -> Iterator:
    """Yields each item only after the next one is made, which keeps the device busy."""
    items = iter(items)
    for item in items:
        for following in items:
            yield item
            item = following
        yield item
