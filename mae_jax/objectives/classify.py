"""Classification: fine-tuning, and linear, partial and attentive probes, of a checkpoint's encoder or from scratch.

What makes the one or the other are settings: `classifier.trained_blocks`, `.pool`, `.batch_norm`, the optimizer, and
what happens to the pictures (`data.*`).
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from mae_jax.data.arrays import ArrayBatches, eval_array_batches
from mae_jax.data.augment import normalize
from mae_jax.data.datasets import make_sources
from mae_jax.data.device import (
    DeviceBatches,
    evaluation_batch_size,
    evaluation_batches,
    on_devices,
    to_devices,
    training_batches,
)
from mae_jax.data.mixing import soft_targets
from mae_jax.data.resolutions import Stage, check_resolutions
from mae_jax.data.sources import count_images, describe_sources
from mae_jax.data.subset import Labelled, RandomSubset, StratifiedSubset
from mae_jax.data.supervised import augment, augmentations
from mae_jax.evaluation.classification import predict, summarize_predictions
from mae_jax.evaluation.extraction import extract_features
from mae_jax.evaluation.unseen import keep_hold_out, take_pictures
from mae_jax.interop.transfer import describe_start, find_start, read_start, resolve_model, starting_params
from mae_jax.interop.weights import check_workdir
from mae_jax.interop.workdirs import Weights
from mae_jax.models.classifier import (
    POOLS,
    init_classifier,
    make_bind_classifier,
    make_classifier_config,
    split_classifier,
)
from mae_jax.models.config import MAEConfig, unroll_on_cpu
from mae_jax.models.flops import classifier_train_flops, classify_flops, classify_train_flops, represent_flops
from mae_jax.models.parameters import count_parameters, join
from mae_jax.objectives.objective import LossDetails, Variables, settle_batch_size
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.mesh import check_heads, make_mesh, process_share, settle_dtype
from mae_jax.runtime.sharding import on_rows
from mae_jax.runtime.signals import StopSignal
from mae_jax.runtime.startup import Startup
from mae_jax.runtime.text import si
from mae_jax.settings.checks import check_channels
from mae_jax.training.run import run_training
from mae_jax.training.state import TrainState
from mae_jax.workdir.reporting import Reporter

KEPT_FEATURES_GIB = 8  # a frozen encoder's output for all images is kept if it takes no more than this


def run(config: ml_collections.ConfigDict, workdir: Path, stop: StopSignal, startup: Startup | None = None) -> None:
    """Trains a classifier as `config` says; see `run_training`.

    Raises:
      UserError: for pictures without labels, and checkpoints that do not fit.
    """
    check_workdir(workdir)
    startup = startup or Startup()
    mesh = make_mesh(config.mesh)
    with startup.phase("data"):
        trainee = make_trainee(config, workdir, mesh)
    run_training(config, workdir, stop, trainee, mesh, startup)


def make_trainee(config: ml_collections.ConfigDict, workdir: Path, mesh: Mesh) -> "Classification":
    """What `config` trains; the mesh's devices need not be here.

    Raises:
      UserError: for pictures without labels, and checkpoints that do not fit.
    """
    trained, weights = find_start(config, workdir)
    changed = resolve_model(config, trained) if trained else []
    if trained and config.data.name is None:
        take_pictures(config, trained)
        changed = []  # all is to be as in the checkpoint
    settle_dtype(config, mesh, trained)
    if trained and weights is None and config.data.batch_size is None:  # it goes on
        config.data.batch_size = trained["data"]["batch_size"]
    check_channels(config.data, config.model.channels)
    keep_hold_out(config, workdir)
    return Classification(config, workdir, mesh, weights, changed)


class Classification:
    """The classifier as `run_training` wants it (training.trainee.Trainee)."""

    decay_tokens = False

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        workdir: Path,
        mesh: Mesh,
        weights: Weights | None,
        changed: list[str],
    ):
        self._config, self._workdir, self._mesh, self._weights, self._changed = config, workdir, mesh, weights, changed
        data, encoder = config.data, MAEConfig(**config.model)
        check_heads(mesh, encoder, decoder=False)
        check_resolutions(config.train.resolutions, encoder)
        sources = make_sources(data, encoder.image_size, encoder.channels)
        train_source, eval_source = (Labelled(source, data) for source in sources)
        if data.label_fraction is not None:
            train_source = StratifiedSubset(train_source, data.label_fraction, data.seed)
        self._train_source = train_source
        self._eval_source = RandomSubset(eval_source, config.evaluate.max_examples or len(eval_source))
        self._set_num_classes()
        self._model = model = make_classifier_config(config.model, config.classifier)
        self._bind = make_bind_classifier(model)
        unrolled = dataclasses.replace(model, encoder=unroll_on_cpu(model.encoder, mesh))
        self._bind_to_train = make_bind_classifier(unrolled)
        self.num_train, self.num_eval = len(self._train_source), len(self._eval_source)
        self.mixes_pairs = data.mixup > 0 or data.cutmix > 0
        settle_batch_size(config, self.num_train, mesh, self.mixes_pairs)
        self._data = describe_sources(data.name, self._train_source, self._eval_source)
        self.facts = {"class_names": train_source.class_names}
        self._start = self._describe_start()
        self._representations, self._logits_of = on_rows(self._represent_batch, mesh), on_rows(self._logits, mesh)
        self._statistics_shapes = jax.eval_shape(self.init, jax.random.key(0)).statistics

        # Where the encoder is frozen and the pictures stay the same, its output is computed once.
        shape = (*model.encoder.image_size, model.encoder.channels)
        image = jax.ShapeDtypeStruct((1, *shape), jnp.uint8)
        variables = jax.eval_shape(lambda key: join(*self.init(key)), jax.random.key(0))
        self._representation = jax.eval_shape(self._represent, variables, image).shape[1:]
        self._features_size = 4 * int(np.prod(self._representation)) * (self.num_train + self.num_eval)
        constant = config.classifier.trained_blocks == 0 and not augmentations(data, of_classifier=True)
        self._keeps_features = constant and self._features_size <= KEPT_FEATURES_GIB * 2**30
        self._kept: dict[str, dict[str, np.ndarray]] = {}

        b = data.batch_size
        self.batch = {"label": jax.ShapeDtypeStruct((b,), jnp.int32)}
        if self._keeps_features:
            self.batch["feature"] = jax.ShapeDtypeStruct((b, *self._representation), jnp.float32)
            self.train_flops = classify_train_flops(model)
            if config.train.resolutions:
                raise UserError(
                    f"train.resolutions={config.train.resolutions}: a frozen encoder's features are computed once, "
                    "at one size; leave train.resolutions out, or let the pictures change (such as data.flip=True)"
                )
        else:
            self.batch["image"] = jax.ShapeDtypeStruct((b, *shape), jnp.uint8)
            self.train_flops = classifier_train_flops(model)

    def _set_num_classes(self) -> None:
        classifier, found = self._config.classifier, self._train_source.num_classes
        if classifier.num_classes is None:
            classifier.num_classes = found
        if classifier.num_classes < found:
            raise UserError(
                f"classifier.num_classes={classifier.num_classes}, but the data have {found} classes; "
                f"leave it out, or set it to {found} or more"
            )

    def init(self, key: jax.Array) -> Variables:
        params, statistics = init_classifier(self._model, key)
        return Variables(*split_classifier(self._model, params), statistics)

    def start(self) -> Variables | None:
        if self._config.classifier.random_encoder:
            return None
        # Where the run's own checkpoints turned out to be damaged, it begins again.
        weights, self._weights = self._weights or read_start(self._config, self._workdir), None  # not held in memory
        if weights is None:
            return None
        params = starting_params(weights, self._model, self.facts["class_names"])
        head = dict(params.pop("head", {}))
        statistics = {"head": {"batch_norm": head.pop("batch_norm")}} if "batch_norm" in head else {}
        params |= {"head": head} if head else {}
        return Variables(*split_classifier(self._model, params), statistics)

    def _describe_start(self) -> str:
        if self._config.classifier.random_encoder:
            text = f"random weights, of the size of those in {self._config.init_from} (classifier.random_encoder)"
        elif self._weights is not None:
            text = describe_start(self._weights, self._model, self._config, self.facts["class_names"])
        elif self._config.init_from:
            text = self._config.init_from
        else:
            text = "random weights (init_from is not set)"
        return "; ".join([text, *self._changed])

    def describe(self, variables: Variables) -> dict[str, str]:
        model, encoder, data = self._model, self._model.encoder, self._config.data
        trained, frozen = count_parameters(variables.params), count_parameters(variables.frozen)
        height, width = encoder.image_size
        rows = {
            "encoder": f"{encoder.depth} blocks x {encoder.width}, {encoder.num_heads} heads",
            "start": self._start,
            "trains": f"{model.trained_parts}: {trained:,} of {trained + frozen:,} parameters",
            "head": f"{POOLS[model.pool]}{', BatchNorm' if model.batch_norm else ''}, {model.num_classes} classes",
            "images": f"{height} x {width} x {encoder.channels}, patch {encoder.patch_size}: "
            f"{encoder.num_patches} patches",
            "augment": ", ".join(augmentations(data, of_classifier=True)) or "nothing",
            "compute": f"{si(represent_flops(model) + classify_flops(model))}FLOP forward, "
            f"{si(self.train_flops)}FLOP a training image, {encoder.dtype} products",
            "data": "\n".join(self._data),
        }
        if self._keeps_features:
            rows["features"] = f"of the frozen encoder, computed once: {self._features_size / 2**20:,.1f} MiB"
        return rows

    def loss_fn(self, params: dict, frozen: dict, batch: dict, keys: jax.Array) -> tuple[jax.Array, LossDetails]:
        """Cross-entropy with soft targets; each example's key decides what happens to it."""
        config, model = self._config, self._model
        # A training step uses the batch's own statistics; the running ones only complete the model.
        unused = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), self._statistics_shapes)
        classifier = self._bind_to_train(join(frozen, params, unused))
        targets = soft_targets(batch["label"], model.num_classes, config.classifier.label_smoothing)
        if self._keeps_features:
            x = batch["feature"]
        else:
            augment_keys, drop_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
            images, targets = augment(config.data, augment_keys, batch["image"], targets)
            trains_blocks = config.classifier.trained_blocks != 0
            x = classifier.represent(images, drop_keys if trains_blocks else None)
        logits, statistics = classifier.classify(x, training=True)
        loss = -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1))
        return loss, LossDetails(statistics=statistics)

    def train_flops_at(self, image_size: tuple[int, int]) -> int:
        encoder = dataclasses.replace(self._model.encoder, image_size=image_size)
        return classifier_train_flops(dataclasses.replace(self._model, encoder=encoder))

    def batches(self, state: TrainState, steps: range, stages: tuple[Stage, ...]) -> DeviceBatches:
        config, encoder = self._config, self._model.encoder
        if not self._keeps_features:
            return training_batches(
                self._train_source, config.data, encoder.image_size, encoder.channels,
                self._mesh, self.batch, stages=stages, steps=steps,
            )  # fmt: skip
        variables = state.variables()
        for split, source in (("train", self._train_source), ("eval", self._eval_source)):
            represent = functools.partial(self._representations, variables)
            features, labels = extract_features(represent, self._eval_pictures(source), len(source))
            self._kept[split] = {"feature": features, "label": labels}
        index, count = process_share(self._mesh)
        batches = ArrayBatches(
            self._kept["train"], config.data.batch_size, seed=config.data.seed,
            start_step=steps.start, process_index=index, process_count=count,
        )  # fmt: skip
        return on_devices(batches, self._mesh, self.batch, config.data.prefetch_batches)

    def _represent(self, variables: dict, images: jax.Array) -> jax.Array:
        data = self._config.data
        return self._bind(variables).represent(normalize(images, data.mean, data.std))

    def _represent_batch(self, variables: dict, batch: dict) -> jax.Array:
        return self._represent(variables, batch["image"])

    def evaluate(self, state: TrainState, reporter: Reporter) -> dict[str, float]:
        if self._keeps_features:
            config = self._config
            size = evaluation_batch_size(config.evaluate.batch_size, self.num_eval, self._mesh)
            index, count = process_share(self._mesh)
            arrays = eval_array_batches(self._kept["eval"], size, process_index=index, process_count=count)
            batches = to_devices(arrays, self._mesh, config.data.prefetch_batches)
        else:
            batches = self._eval_pictures(self._eval_source)
        logits_fn = functools.partial(self._logits_of, state.variables())
        return summarize_predictions(predict(logits_fn, batches))

    def _logits(self, variables: dict, batch: dict) -> jax.Array:
        x = batch["feature"] if self._keeps_features else self._represent(variables, batch["image"])
        return self._bind(variables).classify(x)[0]

    def _eval_pictures(self, source):
        config, encoder = self._config, self._model.encoder
        size = config.evaluate.batch_size
        return evaluation_batches(source, config.data, size, encoder.image_size, encoder.channels, self._mesh)

    def result(self, state: TrainState, scores: dict[str, float]) -> tuple[dict[str, Any], list[str]]:
        model = self._model
        protocol = (
            f"trained: {model.trained_parts}; head: {POOLS[model.pool]}"
            f"{', BatchNorm' if model.batch_norm else ''}; {count_images(self._train_source, self._eval_source)}, "
            f"centre crops; {'the moving average of the weights' if state.average else 'the last weights'}"
        )
        result = {f"eval/{name}": value for name, value in scores.items()} | {"protocol": protocol}
        line = (
            f"done: {int(state.step):,} steps; top-1 {scores['top1']:.2%}, top-5 {scores['top5']:.2%}, "
            f"loss {scores['loss']:.4f} on {count_images(None, self._eval_source)}"
        )
        return result, [line, protocol, f"see {self._workdir}/result.json"]
