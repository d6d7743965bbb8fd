"""Pre-training: trains a masked autoencoder, draws its reconstructions, measures its encoder."""

import contextlib
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

from mae_jax.data.augment import augmentations, color_jitter, normalize, random_flip, valid_values
from mae_jax.data.files import first_few
from mae_jax.data.loader import make_eval_batches
from mae_jax.data.sources import random_subset
from mae_jax.evaluation.evaluator import State, Trained
from mae_jax.interop.transfer import fitting_params, resolve_pictures
from mae_jax.interop.workdirs import Weights
from mae_jax.models.config import MAEConfig
from mae_jax.models.execution import describe_execution, fit_step
from mae_jax.models.flops import decoder_tokens, encoder_tokens, forward_flops, train_flops
from mae_jax.models.mae import MaskedAutoencoder, abstract_params, fit_fixed, init_params, make_bind, split_fixed
from mae_jax.models.parameters import count_parameters, join
from mae_jax.objectives.objective import LossDetails, LossFn, Objective, Variables, check_model
from mae_jax.runtime.console import si
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.mesh import create
from mae_jax.runtime.processes import from_main
from mae_jax.runtime.seeds import make_key
from mae_jax.settings.fields import defaults

FEATURE_SCORES = {  # title and format
    "knn/top1": ("k-NN, top-1", ".1%"),
    "linear_probe/top1": ("linear probe, top-1", ".1%"),
    "knn/mAP": ("k-NN, mAP", ".1%"),
    "linear_probe/mAP": ("linear probe, mAP", ".1%"),
    "knn/r2": ("k-NN, R2", ".3f"),
    "knn/mae": ("k-NN, absolute error", ".4g"),
    "linear_probe/r2": ("linear probe, R2", ".3f"),
    "linear_probe/mae": ("linear probe, abs. error", ".4g"),
    "rankme": ("RankMe of the features", ".1f"),
}
FITTED_IMAGES = 10_000  # at most, for fitting a target
# Model settings that the summary shows unless they are the defaults.
CHOICES = (
    "mask_sampling", "mask_cell", "encoder_mask_tokens", "loss_patches", "pca_targets", "target", "class_tokens",
    "registers", "qk_norm", "decoder_attention", "prediction_ratio", "masks_per_image", "uniformity",
)  # fmt: skip


class Pretraining(Objective):
    """The masked autoencoder (He et al. 2021, arXiv 2111.06377, section 3)."""

    evaluators = ("loss", "reconstructions", "knn", "linear_probe", "rankme")

    @classmethod
    def check(cls, config: ConfigDict) -> None:
        if config.data.name is None:
            raise UserError("data.name is not set: which pictures? For example --config.data.name=image_folder")
        super().check(config)
        uniformity = config.model.uniformity
        if uniformity and config.train.accumulate_steps > 1:
            raise UserError(f"model.uniformity={uniformity} needs whole batches: set train.accumulate_steps=1")
        if config.optimizer.name == "lars":
            raise UserError("optimizer.name=lars is for probes of a frozen encoder; set optimizer.name=adamw")
        model = check_model(config, opened=False)
        if config.evaluate.mask_ratio is not None:
            model.num_visible(config.evaluate.mask_ratio, name="evaluate.mask_ratio")

    def __init__(self, config: ConfigDict, workdir: Path, mesh: Mesh):
        super().__init__(config, workdir, mesh)
        self._step_model = fit_step(self.model, mesh, config.data.batch_size // config.train.accumulate_steps)
        self._loss_fn = make_loss_fn(config, self._step_model)
        self._start_notes: list[str] = []

    def take_over(self, trained: dict[str, Any]) -> list[str]:
        return resolve_pictures(self.config, trained) if self.config.init_from else []

    def make_bind(self) -> Callable[[dict], MaskedAutoencoder]:
        return make_bind(self.model)

    def init(self, key: jax.Array) -> Variables:
        return Variables(*split_fixed(self.model, init_params(self.model, key)))

    def start_from(self, weights: Weights | None) -> Variables | None:
        params: dict = {}
        if weights is not None:
            params, self._start_notes = fitting_params(weights, self.config)
        params, fixed = split_fixed(self.model, params)
        if not fixed and split_fixed(self.model, abstract_params(self.model))[1]:
            fixed = self._fit_fixed()
        return Variables(params, fixed) if params or fixed else None

    def _fit_fixed(self) -> dict:
        """Fits the target to training images (such as principal components); the same result in all processes."""
        data, model = self.config.data, self.model
        source = random_subset(self.train_source, FITTED_IMAGES)
        batches = make_eval_batches(source, data, min(len(source), 256), model.image_size, model.channels)
        with contextlib.closing(batches):
            pictures = (batch["image"][batch["weight"] > 0] for batch in batches)
            fitted = fit_fixed(model, (np.where(np.isnan(x), np.nan, normalize(x, data)) for x in pictures))
        # Hosts may round differently, and then axes of nearly equal variance differ.
        found = from_main(jax.tree.map(np.ndarray.tolist, fitted))
        return jax.tree.map(lambda values: np.asarray(values, np.float32), found, is_leaf=lambda x: isinstance(x, list))

    def describe(self, variables: Variables) -> dict[str, str]:
        model, usual, rows = self.model, defaults().model, {}
        encoder, decoder = (count_parameters(variables.params[half]) for half in ("encoder", "decoder"))
        height, width = model.image_size
        if self.config.init_from:
            notes = "; note: ".join([self.config.init_from, *self._start_notes])
            rows["start"] = "; ".join([notes, *self.changed])
        others, decoded = model.class_tokens + model.registers, f"{model.num_patches} + {model.class_tokens}"
        if model.decoder_attention == "cross":
            decoded = f"{decoder_tokens(model)}, which attend to the encoder's"
        rows |= {
            "encoder": f"{model.depth} blocks x {model.width}, {model.num_heads} heads, {encoder:,} parameters",
            "decoder": f"{model.decoder_depth} blocks x {model.decoder_width}, {model.decoder_num_heads} heads, "
            f"{decoder:,} parameters",
            "images": f"{height} x {width} x {model.channels}, patch {model.patch_size}: {model.num_patches} patches, "
            f"{model.num_visible()} visible (mask ratio {model.mask_ratio})",
            "augment": ", ".join(augmentations(self.config.data, of_classifier=False)) or "nothing",
            "tokens": f"encoder {encoder_tokens(model) - others} + {others}, decoder {decoded}",
            "compute": f"{si(forward_flops(model))}FLOP forward, {si(train_flops(model))}FLOP per training image, "
            f"{describe_execution(self._step_model)}",
        }
        if chosen := [f"{name} {getattr(model, name)}" for name in CHOICES if getattr(model, name) != usual[name]]:
            rows["choices"] = ", ".join(chosen)
        names = self.train_source.class_names
        unlabelled = "none, which leaves k-NN and the linear probe out"
        kind = {"class": "classes", "multi": "labels", "number": "numbers"}[self.train_source.label_kind]
        return rows | {kind: f"{len(names):,}: {first_few(names)}" if names else unlabelled}

    def loss_fn(self, params: dict, frozen: dict, batch: dict, keys: jax.Array) -> tuple[jax.Array, LossDetails]:
        return self._loss_fn(params, frozen, batch, keys)

    def train_flops(self, image_size: tuple[int, int]) -> int:
        return train_flops(dataclasses.replace(self.model, image_size=image_size))

    def result(self, state: State, scores: dict[str, float]) -> tuple[dict[str, Any], list[str]]:
        result = {"eval/loss" if name == "loss" else name: value for name, value in scores.items()}
        loss = f", loss on unseen images {scores['loss']:.4f}" if "loss" in scores else ""
        lines = [f"done: {int(state.step):,} steps{loss}"]
        if self.evaluation.measures_features:
            random: dict[str, float] = {}
            if self.config.evaluate.random_encoder:
                init = functools.partial(init_params, self.model)
                params = create(init, make_key(self.config.seed, "init"), self.mesh)
                random, _ = self.evaluation.run(Trained(0, params, "random"), features_only=True)
            result |= {f"random_encoder/{name}": value for name, value in random.items()}
            result["protocol"] = self.evaluation.protocol
            lines.append(f"{'what was learnt':<30}this encoder{'   random encoder' if random else ''}")
            for name, (title, form) in FEATURE_SCORES.items():
                if name in scores:
                    beside = f"{random[name]:>17{form}}" if name in random else ""
                    lines.append(f"  {title:<27}{scores[name]:>14{form}}{beside}")
            lines.append(result["protocol"])
        elif not self.evaluation.data.labelled:
            lines.append("the images have no labels: k-NN and the linear probe are left out")
        picture = self.workdir / "reconstructions" / f"{int(state.step)}.png"
        return result, [*lines, f"see {f'{picture} and ' if picture.exists() else ''}{self.workdir}/result.json"]


def make_loss_fn(config: ConfigDict, model: MAEConfig) -> LossFn:
    """The masked loss of a batch {"image": [B, H, W, C]}; each image's key decides its flip and its masks."""
    bind, data = make_bind(model), config.data

    def loss_fn(params: dict, frozen: dict, batch: dict, keys: jax.Array) -> tuple[jax.Array, LossDetails]:
        flip_keys, mask_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        images = random_flip(flip_keys, batch["image"]) if data.flip else batch["image"]
        valid = valid_values(images)
        if data.color_jitter:
            images = color_jitter(jax.vmap(jax.random.fold_in, (0, None))(flip_keys, 1), images, data.color_jitter)
        loss, parts = bind(join(params, frozen)).training_loss(normalize(images, data), mask_keys, valid)
        return loss, LossDetails(scalars=parts)

    return loss_fn
