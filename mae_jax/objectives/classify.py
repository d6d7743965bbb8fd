"""Classification, from a checkpoint's encoder or from scratch: fine-tuning; linear, partial and pooling probes.

The settings decide which: `classifier.trained_blocks`, `.pool` and `.batch_norm`, the optimizer, and augmentation.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax.data.augment import augment, augmentations
from mae_jax.data.device_batches import DeviceBatches, evaluation_batch_size, on_devices
from mae_jax.data.loader import array_batches
from mae_jax.data.resolutions import Stage
from mae_jax.data.sources import Labelled, Source, count_images, random_subset, stratified_subset
from mae_jax.evaluation.evaluator import State, extract_features
from mae_jax.evaluation.scores import MAIN, tell
from mae_jax.evaluation.unseen import take_pictures
from mae_jax.interop.transfer import describe_start, resolve_model, starting_params
from mae_jax.interop.workdirs import Weights
from mae_jax.models.classifier import (
    POOLS,
    ClassifierConfig,
    abstract_variables,
    init_classifier,
    make_bind_classifier,
    make_classifier_config,
    split_classifier,
)
from mae_jax.models.execution import describe_execution, fit_step
from mae_jax.models.flops import classifier_train_flops, classify_flops, classify_train_flops, represent_flops
from mae_jax.models.parameters import count_parameters, join
from mae_jax.objectives.label_losses import OUTPUTS, balanced_weights, fit_to_kind, label_loss, make_targets, units_of
from mae_jax.objectives.objective import LossDetails, Objective, Variables, check_model
from mae_jax.runtime.console import si
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.mesh import process_share
from mae_jax.runtime.sharding import on_rows

KEPT_FEATURES_GIB = 8  # a frozen encoder's output for all images is cached up to this size


class Classification(Objective):
    """A classifier on the encoder's tokens (paper, section 4.3 and appendix A)."""

    decay_tokens = False
    has_decoder = False
    evaluators = ("accuracy",)
    _units: dict[str, tuple[float, ...]] = {}  # of a resumed run's numbers

    @classmethod
    def check(cls, config: ConfigDict) -> None:
        super().check(config)
        head_alone, optimizer = config.classifier.trained_blocks == 0, config.optimizer.name
        adamw = "set optimizer.name=adamw"
        if config.data.name is None and not config.init_from:
            raise UserError(
                "init_from is not set, nor is data.name: give a checkpoint, as --config.init_from=runs/digits"
            )
        if optimizer == "lars" and not head_alone:  # its trust ratio would mix the blocks
            raise UserError(f"optimizer.name=lars is for probes: {adamw}, or classifier.trained_blocks=0")
        if optimizer == "muon" and head_alone:
            raise UserError(f"optimizer.name=muon is for blocks; classifier.trained_blocks=0 trains none: {adamw}")
        if not config.init_from:  # otherwise the checkpoint decides the model
            check_model(config, opened=False)

    def __init__(self, config: ConfigDict, workdir: Path, mesh: Mesh):
        super().__init__(config, workdir, mesh)
        data, classifier = config.data, config.classifier
        self._weights = None
        if classifier.class_weights:
            self._weights = balanced_weights(self.train_source, classifier.num_classes)
        rows = data.batch_size // config.train.accumulate_steps
        self._step_model = fit_step(self.model, mesh, rows, masked=False)
        self._bind_to_train = make_bind_classifier(dataclasses.replace(self.classifier, encoder=self._step_model))
        self._start_text = self._describe_start()
        self._statistics_shapes = jax.eval_shape(self.init, jax.random.key(0)).statistics

        # If the encoder is frozen and images are not augmented, its output is computed once.
        representation = jax.eval_shape(self._represent, abstract_variables(self.classifier), self.batch).shape[1:]
        self._features_size = 4 * int(np.prod(representation)) * (self.num_train + len(self.eval_source))
        constant = classifier.trained_blocks == 0 and not augmentations(data, of_classifier=True)
        self._keeps_features = constant and self._features_size <= KEPT_FEATURES_GIB * 2**30
        of_class = self.classifier.label_kind == "class"
        shape = (data.batch_size,) if of_class else (data.batch_size, classifier.num_classes)
        self.batch["label"] = jax.ShapeDtypeStruct(shape, jnp.int32 if of_class else jnp.float32)
        if self._keeps_features:
            del self.batch["image"]
            self.batch["feature"] = jax.ShapeDtypeStruct((data.batch_size, *representation), jnp.float32)
            if config.train.resolutions:
                raise UserError(
                    f"train.resolutions={config.train.resolutions}: a frozen encoder's features are computed once, "
                    "at one size; leave it out, or let the pictures change (such as data.flip=True)"
                )

    @functools.cached_property
    def classifier(self) -> ClassifierConfig:
        return make_classifier_config(self.config.model, self.config.classifier, self.facts)

    def make_bind(self) -> Callable[[dict], Any]:
        return make_bind_classifier(self.classifier)

    @property
    def mixes_pairs(self) -> bool:
        return self.config.data.mixup > 0 or self.config.data.cutmix > 0

    def take_over(self, trained: dict[str, Any]) -> list[str]:
        config, changed = self.config, resolve_model(self.config, trained)
        if self.weights is None:  # the run is resumed
            config.data.batch_size = config.data.batch_size or trained["data"]["batch_size"]
            self._units = {name: trained[name] for name in ("number_mean", "number_std") if name in trained}
        if config.data.name is not None:
            return changed
        take_pictures(config, trained)
        return []  # everything is as in the checkpoint

    def open_sources(self) -> tuple[Source, Source]:
        config, data, classifier = self.config, self.config.data, self.config.classifier
        train, evaluation = (Labelled(source, data) for source in super().open_sources())
        if data.label_fraction is not None:
            train = stratified_subset(train, data.label_fraction, data.seed)
        classifier.num_classes = classifier.num_classes or train.num_classes
        if classifier.num_classes < train.num_classes:
            raise UserError(
                f"classifier.num_classes={classifier.num_classes}, but the data have {train.num_classes} classes; "
                f"leave it out, or set it to {train.num_classes} or more"
            )
        self.changed = self.changed + fit_to_kind(config, train)
        self.facts = {"class_names": train.class_names, "label_kind": train.label_kind}
        if train.label_kind == "number":
            self.facts |= self._units or units_of(train)
        return train, random_subset(evaluation, config.evaluate.max_examples or len(evaluation))

    def init(self, key: jax.Array) -> Variables:
        params, statistics = init_classifier(self.classifier, key)
        return Variables(*split_classifier(self.classifier, params), statistics)

    def start_from(self, weights: Weights | None) -> Variables | None:
        if weights is None or self.config.classifier.random_encoder:
            return None
        params = starting_params(weights, self.classifier, self.facts["class_names"])
        head = dict(params.pop("head", {}))
        statistics = {"head": {"batch_norm": head.pop("batch_norm")}} if "batch_norm" in head else {}
        params |= {"head": head} if head else {}
        return Variables(*split_classifier(self.classifier, params), statistics)

    def _describe_start(self) -> str:
        text = self.config.init_from or "random weights (init_from is not set)"
        if self.config.classifier.random_encoder:
            text = f"random weights, of the size of those in {self.config.init_from} (classifier.random_encoder)"
        elif self.weights is not None:
            text = describe_start(self.weights, self.classifier, self.config, self.facts["class_names"])
        return "; ".join([text, *self.changed])

    def describe(self, variables: Variables) -> dict[str, str]:
        model, encoder = self.classifier, self.model
        trained, frozen = count_parameters(variables.params), count_parameters(variables.frozen)
        height, width = encoder.image_size
        rows = {
            "encoder": f"{encoder.depth} blocks x {encoder.width}, {encoder.num_heads} heads",
            "start": self._start_text,
            "trains": f"{model.trained_parts}: {trained:,} of {trained + frozen:,} parameters",
            "head": f"{POOLS[model.pool]}{', BatchNorm' if model.batch_norm else ''}, {model.num_classes} "
            f"{OUTPUTS[model.label_kind]}",
            "images": f"{height} x {width} x {encoder.channels}, patch {encoder.patch_size}: "
            f"{encoder.num_patches} patches",
            "augment": ", ".join(augmentations(self.config.data, of_classifier=True)) or "nothing",
            "compute": f"{si(represent_flops(model) + classify_flops(model))}FLOP forward, "
            f"{si(self.train_flops(encoder.image_size))}FLOP per training image, "
            f"{describe_execution(self._step_model, masked=False)}",
        }
        if self._keeps_features:
            rows["features"] = f"of the frozen encoder, computed once: {self._features_size / 2**20:,.1f} MiB"
        return rows

    def loss_fn(self, params: dict, frozen: dict, batch: dict, keys: jax.Array) -> tuple[jax.Array, LossDetails]:
        """`label_loss` with soft targets; each example's key decides its augmentation and dropped paths."""
        config, model = self.config, self.classifier
        # Training uses the batch's statistics; these zeros only complete the model.
        unused = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), self._statistics_shapes)
        classifier = self._bind_to_train(join(frozen, params, unused))
        targets = make_targets(batch["label"], model, config.classifier.label_smoothing)
        if self._keeps_features:
            x = batch["feature"]
        else:
            augment_keys, drop_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
            images, targets = augment(config.data, augment_keys, batch["image"], targets)
            x = classifier.represent(images, drop_keys if model.trained_blocks != 0 else None)
        outputs, statistics = classifier.classify(x, training=True)
        return label_loss(outputs, targets, model, self._weights), LossDetails(statistics=statistics)

    def train_flops(self, image_size: tuple[int, int]) -> int:
        if self._keeps_features:
            return classify_train_flops(self.classifier)
        encoder = dataclasses.replace(self.model, image_size=image_size)
        return classifier_train_flops(dataclasses.replace(self.classifier, encoder=encoder))

    def batches(self, state: State, steps: range, stages: tuple[Stage, ...]) -> DeviceBatches:
        if not self._keeps_features:
            return super().batches(state, steps, stages)
        config, data, kept = self.config, self.evaluation.data, {}
        represent = functools.partial(on_rows(self._represent, self.mesh), state.variables())
        for split, source in (("train", self.train_source), ("eval", self.eval_source)):
            features, labels = extract_features(represent, data.batches(source), len(source))
            kept[split] = {"feature": features, "label": labels}
        share, prefetch = process_share(self.mesh), config.data.prefetch_batches
        size = evaluation_batch_size(config.evaluate.batch_size, len(self.eval_source), self.mesh)
        data.kept_batches = lambda: on_devices(array_batches(kept["eval"], size, share), self.mesh, prefetch)
        batches = array_batches(kept["train"], config.data.batch_size, share, config.data.seed, steps.start)
        return on_devices(batches, self.mesh, prefetch, self.batch)

    def _represent(self, variables: dict, batch: dict) -> jax.Array:
        data = self.evaluation.data
        return data.bind(variables).represent(data.normalize(batch["image"]))

    def result(self, state: State, scores: dict[str, float]) -> tuple[dict[str, Any], list[str]]:
        model = self.classifier
        weights = "the last weights" if self.config.train.ema_decay is None else "the moving average of the weights"
        head = f"{POOLS[model.pool]}{', BatchNorm' if model.batch_norm else ''}"
        images = f"{count_images(self.train_source, self.eval_source)}, centre crops"
        protocol = f"trained: {model.trained_parts}; head: {head}; {images}; {weights}"
        result = {f"eval/{name}": value for name, value in scores.items()} | {"protocol": protocol}
        line = f"done: {int(state.step):,} steps"
        if MAIN[model.label_kind] in scores:
            line += f"; {tell(scores)} on {count_images(None, self.eval_source)}"
        return result, [line, protocol, f"see {self.workdir}/result.json"]
