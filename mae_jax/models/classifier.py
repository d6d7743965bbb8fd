"""A classifier (encoder, pool, linear layer) for fine-tuning and probes (paper, section 4.3 and appendix A)."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from mae_jax.models.config import MAEConfig
from mae_jax.models.encoder import Encoder, EncoderOutput, check_layers_alone, patches_of
from mae_jax.models.layers import Linear
from mae_jax.models.parameters import binder, split
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.sharding import batch_devices, mean_over_batch

POOLS = {  # what the head sees
    "mean_norm": "mean of the patch tokens, then a norm",
    "mean": "mean of the normed patch tokens",
    "class": "the normed class token (the mean of several)",
    "attentive": "attention of a learned query to the normed patch tokens",
    "abmilp": "normed patch tokens, weighted by a small network (AbMILP)",
}
LEARNED_POOLS = ("attentive", "abmilp")  # parts of the head, which then sees the patch tokens
BATCH_NORM_EPSILON = 1e-6  # as in the paper's linear probe
# What the training labels decide: beside the settings in a checkpoint's config. An earlier version's has none of them.
LABEL_FACTS = ("label_kind", "number_mean", "number_std")


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """Defines the model: the encoder's settings and the settings `classifier.*`. UserError if they are invalid.

    `label_kind` (see `data.sources.Source`) says what the outputs are: logits of a softmax (class) or of a sigmoid each
    (multi), or numbers, which the linear layer gives in units of `number_std` from `number_mean` (one each; empty: 1
    and 0).
    """

    encoder: MAEConfig
    num_classes: int  # number of outputs
    pool: str = "mean_norm"
    trained_blocks: float | None = None
    batch_norm: bool = False
    head_std: float = 2e-5
    drop_path: float = 0.0
    label_kind: str = "class"
    number_mean: tuple[float, ...] = ()
    number_std: tuple[float, ...] = ()

    def __post_init__(self):
        trained, depth = self.trained_blocks, self.encoder.depth
        if trained is not None and trained != 0.5 and trained not in range(depth + 1):
            raise UserError(f"classifier.trained_blocks={trained} must be one of 0, 0.5, 1, ..., {depth} (the depth)")
        if self.pool not in POOLS:
            raise UserError(f"classifier.pool={self.pool!r} is not one of {', '.join(POOLS)}")
        least = 1 if self.label_kind == "number" else 2
        if self.num_classes < least:
            raise UserError(f"classifier.num_classes={self.num_classes} must be at least {least}")

    @property
    def frozen_blocks(self) -> int:  # the number of first blocks
        return 0 if self.trained_blocks is None else self.encoder.depth - math.ceil(self.trained_blocks)

    @property
    def trained_parts(self) -> str:
        names = {None: "everything", 0: "the head", 0.5: "the last block's MLP, norm and head"}
        blocks = self.trained_blocks
        return names.get(blocks) or f"the last {int(blocks)} of {self.encoder.depth} blocks, norm and head"

    @property
    def drop_path_rates(self) -> tuple[float, ...] | None:
        """[depth] rates, rising linearly from 0 to `drop_path` at the last block; frozen blocks have none."""
        rates = np.linspace(0, self.drop_path, self.encoder.depth)
        rates[: self.frozen_blocks] = 0
        return tuple(rates.tolist()) if self.drop_path else None


def make_classifier_config(model: Mapping, classifier: Mapping, facts: Mapping | None = None) -> ClassifierConfig:
    """The config from settings `model.*` and `classifier.*`, `num_classes` set, and `LABEL_FACTS` if there are any."""
    facts = {name: value for name, value in (facts or {}).items() if name in LABEL_FACTS}
    names = [field.name for field in dataclasses.fields(ClassifierConfig)][1 : -len(LABEL_FACTS)]
    return ClassifierConfig(MAEConfig(**model), *(classifier[name] for name in names), **facts)


def is_classifier(config: Mapping) -> bool:
    """Whether a run's resolved config describes a classifier; otherwise it is a masked autoencoder."""
    own = ":" in config["task"] and "class_names" in config  # a user's objective with class labels
    return config["task"] == "classify" or own


class BatchNorm(nnx.Module):
    """BatchNorm without scale and bias; statistics over all devices, for each of `train.accumulate_steps` parts."""

    def __init__(self, width: int):
        self.mean = nnx.BatchStat(jnp.zeros(width))
        self.variance = nnx.BatchStat(jnp.ones(width))

    def __call__(self, x: jax.Array, training: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Normalises [B, D]; in training also returns the batch's mean and unbiased variance."""
        if not training:
            return (x - self.mean[...]) * jax.lax.rsqrt(self.variance[...] + BATCH_NORM_EPSILON), {}
        mean = mean_over_batch(jnp.mean(x, axis=0))
        variance = mean_over_batch(jnp.mean((x - mean) ** 2, axis=0))
        count = len(x) * batch_devices()
        unbiased = variance * (count / max(count - 1, 1))
        return (x - mean) * jax.lax.rsqrt(variance + BATCH_NORM_EPSILON), {"mean": mean, "variance": unbiased}


class AttentivePool(nnx.Module):
    """Cross-attention of one learned query to all patch tokens: the probe of AIM (arXiv 2401.08541)."""

    def __init__(self, width: int, num_heads: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.num_heads, self.dtype = num_heads, dtype
        self.query = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, 1, width)))
        self.key = Linear(width, width, dtype=dtype, rngs=rngs)
        self.value = Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:  # [b, n, d] -> [b, d]
        query = jnp.broadcast_to(self.query[...], (len(tokens), 1, tokens.shape[-1]))
        heads = (query, self.key(tokens), self.value(tokens))
        q, k, v = (rearrange(x.astype(self.dtype), "b n (h d) -> b n h d", h=self.num_heads) for x in heads)
        return rearrange(jax.nn.dot_product_attention(q, k, v), "b 1 h d -> b (h d)").astype(jnp.float32)


class AbMILP(nnx.Module):
    """Multiple-instance pooling (arXiv 1802.04712, eq. 7-8; of MAE's patches 2412.03215): the tokens' weighted mean.

    A token h has the weight softmax(w tanh(V h + b)) over the tokens; w is `query`, V and b are `key`.
    """

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.query = nnx.Param(0.02 * jax.random.normal(rngs.params(), (width,)))
        self.key = Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:  # [b, n, d] -> [b, d]
        weights = jax.nn.softmax(jnp.tanh(self.key(tokens).astype(jnp.float32)) @ self.query[...], axis=1)
        return jnp.einsum("bn,bnd->bd", weights, tokens.astype(jnp.float32))


class Head(nnx.Module):
    """The learned pool (if any), BatchNorm (if any), and the linear layer."""

    def __init__(self, config: ClassifierConfig, *, rngs: nnx.Rngs):
        encoder, dtype = config.encoder, jnp.dtype(config.encoder.blocks.dtype)
        pool = AttentivePool(encoder.width, encoder.num_heads, dtype=dtype, rngs=rngs)
        if config.pool == "abmilp":
            pool = AbMILP(encoder.width, dtype=dtype, rngs=rngs)
        self.pool = pool if config.pool in LEARNED_POOLS else None
        self.batch_norm = BatchNorm(encoder.width) if config.batch_norm else None
        self.linear = Linear(encoder.width, config.num_classes, dtype=jnp.dtype("float32"), rngs=rngs)
        self.linear.kernel[...] = config.head_std * jax.random.normal(rngs.params(), self.linear.kernel.shape)


class Classifier(nnx.Module):
    """`model(images)` gives the outputs, `model.encode(images)` the encoder's tokens; images may have other sizes.

    By `label_kind`, the outputs [B, K] are logits of a softmax over the classes (class), a logit for each class (multi;
    its sigmoid is the probability that the class applies), or numbers in the units of the training labels (number).
    """

    def __init__(self, config: ClassifierConfig, *, rngs: nnx.Rngs):
        self.config = config
        options = dict(frozen_blocks=config.frozen_blocks, drop_path=config.drop_path_rates, rngs=rngs)
        self.encoder = Encoder(config.encoder, learned_positions=True, **options)
        self.head = Head(config, rngs=rngs)
        # Set by `mae_jax.load`; the names of the K outputs are a tuple.
        self.processor = self.class_names = None

    @property
    def label_kind(self) -> str:
        return self.config.label_kind

    def __call__(self, images: jax.Array) -> jax.Array:  # [B, H, W, C], normalised -> [B, K]
        return self.classify(self.represent(images))[0]

    def encode(
        self,
        images: jax.Array,
        *,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        layers: Sequence[int] | None = None,
    ) -> jax.Array | EncoderOutput | tuple[jax.Array, ...]:
        """Tokens [B, 1 + L, D] after the final norm, class token first; with any `output_...`, an EncoderOutput.

        With `layers` alone, a tuple of the tokens after each of these blocks (`Encoder.at_layers`).
        """
        record = (output_hidden_states, output_attentions)
        if layers is not None:
            check_layers_alone(any(record))
            return self.encoder.at_layers(*patches_of(images, self.config.encoder), layers)
        features, recorded = self.encoder(*patches_of(images, self.config.encoder), record=record)
        return EncoderOutput(features, *recorded) if any(record) else features

    def represent(self, images: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """[B, H, W, C] -> [B, D], or patch tokens [B, L, D] for a learned pool. Keys [B] turn on drop path."""
        # Nothing here trains if the encoder is frozen, so a probe runs it once; `classify` is the rest.
        tokens, _ = self.encoder(*patches_of(images, self.config.encoder), keys=keys, norm=False)
        classes, patches = jnp.split(tokens, [self.config.encoder.class_tokens], axis=1)
        if self.config.pool == "mean_norm":
            return jnp.mean(patches, axis=1, dtype=jnp.float32)
        tokens = self.encoder.norm(classes if self.config.pool == "class" else patches)
        return tokens if self.config.pool in LEARNED_POOLS else jnp.mean(tokens, axis=1)

    def classify(self, x: jax.Array, *, training: bool = False) -> tuple[jax.Array, dict]:
        """Outputs [B, K] of `represent`'s result, and in training the batch's statistics as a nested dict."""
        if self.config.pool == "mean_norm":
            x = self.encoder.norm(x)
        if self.head.pool is not None:
            x = self.head.pool(x)
        if self.head.batch_norm is None:
            return self._in_units(self.head.linear(x)), {}
        x, batch = self.head.batch_norm(x, training)
        return self._in_units(self.head.linear(x)), {"head": {"batch_norm": batch}}

    def _in_units(self, outputs: jax.Array) -> jax.Array:
        mean, std = self.config.number_mean, self.config.number_std
        return outputs * jnp.asarray(std, jnp.float32) + jnp.asarray(mean, jnp.float32) if std else outputs


def init_classifier(config: ClassifierConfig, key: jax.Array) -> tuple[dict, dict]:
    """Initial parameters, and BatchNorm's running statistics (empty without it), as nested dicts."""
    params, statistics = nnx.state(Classifier(config, rngs=nnx.Rngs(key)), nnx.Param, nnx.BatchStat)
    return nnx.to_pure_dict(params), nnx.to_pure_dict(statistics)


def split_classifier(config: ClassifierConfig, params: dict) -> tuple[dict, dict]:
    """Splits parameters into (trained, frozen), stacked blocks too; `join(frozen, trained)` inverts it."""
    if config.trained_blocks is None:
        return params, {}
    trained, frozen = {}, {}
    for path, leaf in flatten_dict(params).items():
        if path[:2] == ("encoder", "blocks"):
            only_mlp = config.trained_blocks == 0.5 and path[2] in ("norm1", "attention")
            first = len(leaf) if only_mlp else config.frozen_blocks
        else:
            norm_trains = path[1] == "norm" and (config.pool == "mean_norm" or config.trained_blocks > 0)
            first = 0 if path[0] == "head" or norm_trains else len(leaf)
        if first > 0:
            frozen[path] = leaf[:first]
        if first < len(leaf):
            trained[path] = leaf[first:]
    return unflatten_dict(trained), unflatten_dict(frozen)


def abstract_variables(config: ClassifierConfig) -> dict:
    """Shapes and dtypes of parameters and statistics, as one nested dict."""
    return nnx.to_pure_dict(split(Classifier, config)[1])


def make_bind_classifier(config: ClassifierConfig) -> Callable[[dict], Classifier]:
    """A pure function from parameters and statistics (one nested dict) to the model."""
    return binder(Classifier, config)
