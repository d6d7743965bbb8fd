"""Linear probes of many layers, tokens and learning rates, trained at once on kept features, as in DINOv2.

The best is chosen on held-out training pictures; the evaluation pictures do not decide.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from mae_jax.data.device_batches import DeviceBatches, evaluation_batch_size, on_devices
from mae_jax.data.loader import array_batches
from mae_jax.data.sources import some_of_each_class
from mae_jax.evaluation.classification import rank_of_label
from mae_jax.evaluation.evaluator import EvaluationData, State, pool
from mae_jax.evaluation.scores import with_labels
from mae_jax.models.encoder import find_layer
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.mesh import process_share, put, replicated
from mae_jax.runtime.sharding import on_rows

KEPT_FEATURES_GIB = 8  # on the host, of all images
MOMENTUM = 0.9
STD_FLOOR = 1e-6  # added to the features' deviations
BLOCK = 4096  # rows whose squares the host holds at a time
TOKENS = {"class": (0,), "mean": (1,), "class+mean": (0, 1)}  # -> places in a layer's pair of vectors


class Input(NamedTuple):
    """What a row of heads, one for each learning rate, sees: tokens of some blocks, concatenated."""

    layers: str  # "9+10+11+12"
    token: str
    slots: tuple[int, ...]  # of the kept features [N, slots, D]


class ProbeSweep:
    """Softmax regressions by SGD on standardised features, for each input and learning rate.

    Labels are of the kind class. UserError for unknown layers, and features that are too many to keep.
    """

    def __init__(self, config: ConfigDict, data: EvaluationData):
        self.config, self.data = config, data
        groups = find_groups(config.evaluate.layers, data.model.depth)
        self.layers = tuple(sorted({layer for group in groups for layer in group}))
        places = {layer: 2 * place for place, layer in enumerate(self.layers)}
        self.inputs = [
            Input("+".join(map(str, group)), token, tuple(places[layer] + slot for layer in group for slot in pair))
            for group, (token, pair) in itertools.product(groups, TOKENS.items())
        ]
        self.rates = sorted(config.evaluate.probe_sweep_rates)
        images, each = len(data.train) + len(data.evaluation), 4 * 2 * len(self.layers) * data.model.width
        most = int(KEPT_FEATURES_GIB * 2**30) // each
        if images > most:
            raise UserError(
                f"the features of {images:,} images and {len(self.layers)} blocks take {images * each / 2**30:,.1f} "
                f"GiB, more than {KEPT_FEATURES_GIB}: lower evaluate.max_train_examples, so that there are at most "
                f"{most:,} images, or choose fewer evaluate.layers"
            )
        self.size = f"{len(self.inputs) * len(self.rates)} heads, {images * each / 2**20:,.1f} MiB of features"

    def run(self, state: State) -> list[dict[str, Any]]:
        """{"layers", "token", "learning_rate", "held_out_top1", "held_out_loss", "top1", "top5"} of each head.

        The best on the held-out pictures, by top-1 and then by loss, is the first. Scores of heads that diverged are
        NaN.
        """
        data, share = self.data, self.config.evaluate.probe_sweep_held_out
        encode_rows = on_rows(self._encode, data.mesh)
        splits = (data.extract(state, source, encode_rows=encode_rows) for source in (data.train, data.evaluation))
        (train, labels), (test, test_labels) = (with_labels(*split) for split in splits)
        rng = np.random.default_rng(self.config.data.seed)
        held_out = some_of_each_class(labels, lambda count: min(max(1, round(share * count)), count - 1), rng)
        if not len(held_out) or not len(test):
            raise UserError("no class has two training images, or no evaluation image has a label: there is no choice")
        fitted = np.setdiff1d(np.arange(len(train)), held_out)
        standard = mean_and_std(train, fitted)
        params = self._fit(train, labels, fitted, standard)
        found = (
            self._score(params, standard, *split)
            for split in ((train, labels, held_out), (test, test_labels, np.arange(len(test))))
        )
        rows = []
        for (one, rate), chosen, final in zip(itertools.product(self.inputs, self.rates), *found, strict=True):
            row = {"layers": one.layers, "token": one.token, "learning_rate": rate}
            row |= {f"held_out_{name}": chosen[name] for name in ("top1", "loss")}
            rows.append(row | {name: final[name] for name in ("top1", "top5")})

        def order(row: dict[str, Any]) -> tuple[bool, float, float]:
            return math.isnan(row["held_out_loss"]), -row["held_out_top1"], row["held_out_loss"]

        return sorted(rows, key=order)

    def _encode(self, variables: dict, batch: dict) -> jax.Array:
        """[B, slots, D]: of each layer the class token, and the mean of the patch tokens."""
        tokens = self.data.bind(variables).encode(self.data.normalize(batch["image"]), layers=self.layers)
        return jnp.stack([pool(x, name, self.data.model.class_tokens) for x in tokens for name in ("class", "mean")], 1)

    def _batch_size(self, count: int) -> int:
        return evaluation_batch_size(self.config.evaluate.probe_sweep_batch_size, count, self.data.mesh)

    def _batches(
        self, features: np.ndarray, labels: np.ndarray, rows: np.ndarray, seed: int | None = None
    ) -> DeviceBatches:
        """Batches of these rows: endless with a seed; else each row once, and rows of weight 0 as padding."""
        share, mesh = process_share(self.data.mesh), self.data.mesh
        chosen = array_batches({"row": rows}, self._batch_size(len(rows)), share, seed)
        filled = (
            {"feature": features[batch["row"]], "label": labels[batch["row"]].astype(np.int32)}
            | {"weight": batch.get("weight", np.ones(len(batch["row"]), np.float32))}
            for batch in chosen
        )
        return on_devices(filled, mesh, self.config.data.prefetch_batches)

    def _logits(self, params: list[dict], standard: tuple, features: jax.Array) -> jax.Array:
        """[heads, B, K], the rates of an input side by side."""
        x, found = (features - standard[0]) / standard[1], []
        for one, head in zip(self.inputs, params, strict=True):
            seen = x[:, one.slots].reshape(len(x), -1)
            found.append(jnp.einsum("bd,rdk->rbk", seen, head["w"], precision="highest") + head["b"][:, None])
        return jnp.concatenate(found)

    def _fit(self, features: np.ndarray, labels: np.ndarray, rows: np.ndarray, standard: tuple) -> list[dict]:
        """Heads {"w": [rates, d, K], "b": [rates, K]} of each input, from zeros by SGD with a cosine schedule."""
        size, classes, shape = self._batch_size(len(rows)), self.data.train.num_classes, features.shape[2]
        steps = max(1, round(self.config.evaluate.probe_sweep_epochs * len(rows) / size))
        optimizer = optax.sgd(optax.cosine_decay_schedule(size / 256, steps), momentum=MOMENTUM)
        rates, layout = np.asarray(self.rates, np.float32), replicated(self.data.mesh)

        def loss(params, batch):
            logits = self._logits(params, standard, batch["feature"])
            labels = jnp.broadcast_to(batch["label"], logits.shape[:2])
            return jnp.sum(jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels), axis=1))

        @functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=layout)
        def step(params, state, batch):
            updates, state = optimizer.update(jax.grad(loss)(params, batch), state)
            updates = jax.tree.map(lambda x: x * rates.reshape(-1, *[1] * (x.ndim - 1)), updates)
            return optax.apply_updates(params, updates), state

        shapes = [(len(rates), len(one.slots) * shape, classes) for one in self.inputs]
        params = put([{"w": np.zeros(x, np.float32), "b": np.zeros(x[::2], np.float32)} for x in shapes], layout)
        state = jax.jit(optimizer.init, out_shardings=layout)(params)
        with contextlib.closing(self._batches(features, labels, rows, self.config.data.seed)) as batches:
            for batch in itertools.islice(batches, steps):
                params, state = step(params, state, batch)
        return params

    def _score(
        self, params: list[dict], standard: tuple, features: np.ndarray, labels: np.ndarray, rows: np.ndarray
    ) -> list[dict[str, float]]:
        """{"top1", "top5", "loss"} of each head, over these rows."""

        @functools.partial(jax.jit, out_shardings=replicated(self.data.mesh))
        def sums(params, batch):
            logits, label, weight = self._logits(params, standard, batch["feature"]), batch["label"], batch["weight"]
            rank = jax.vmap(rank_of_label, (0, None))(logits, label)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.broadcast_to(label, rank.shape))
            losses = jnp.where(weight > 0, losses, 0)
            return jnp.stack([(rank < 1) @ weight, (rank < 5) @ weight, losses.sum(axis=1)], axis=1)

        found = sum(np.asarray(sums(params, batch), np.float64) for batch in self._batches(features, labels, rows))
        found = np.where(np.isfinite(found[:, 2:]), found / len(rows), np.nan)
        return [dict(zip(("top1", "top5", "loss"), row, strict=True)) for row in found.tolist()]


def find_groups(layers: Sequence[Sequence[int]] | None, depth: int) -> list[tuple[int, ...]]:
    """The groups of blocks of `evaluate.layers`, counted from 1; by default the last one, and the last four."""
    groups = layers or ((-1,), range(-min(4, depth), 0))
    found = [tuple(find_layer(layer, depth, "evaluate.layers: ") for layer in group) for group in groups]
    return list(dict.fromkeys(found))


def mean_and_std(features: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation, float32 [slots, D], of some rows of the features [N, slots, D]."""
    blocks = [rows[at : at + BLOCK] for at in range(0, len(rows), BLOCK)]
    mean = sum(features[block].sum(axis=0, dtype=np.float64) for block in blocks) / len(rows)
    variance = sum(((features[block] - mean) ** 2).sum(axis=0) for block in blocks) / len(rows)
    return mean.astype(np.float32), (np.sqrt(variance) + STD_FLOOR).astype(np.float32)
