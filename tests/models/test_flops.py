"""The count of floating-point operations against XLA's, of programs without loops (it counts a loop's body once)."""

import jax
import jax.numpy as jnp
import pytest

from mae_jax.models.classifier import ClassifierConfig, init_classifier, make_bind_classifier, split_classifier
from mae_jax.models.config import SIZES
from mae_jax.models.flops import (
    classifier_train_flops,
    classify_flops,
    classify_train_flops,
    forward_flops,
    represent_flops,
    train_flops,
)
from mae_jax.models.mae import MAEConfig, init_params, make_bind
from mae_jax.models.parameters import join


def xla_flops(config: MAEConfig, transform, batch: int = 8) -> float:
    """Operations of one image that XLA counts in transform(loss).

    The products of norms and kernels are made once a batch: of 8 images they come to little.
    """

    def loss(params, images, noise):
        return make_bind(config)(params)(images, noise=noise).loss

    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    images = jax.ShapeDtypeStruct((batch, *config.image_size, config.channels), jnp.float32)
    noise = jax.ShapeDtypeStruct((batch, config.num_patches), jnp.float32)
    analysis = jax.jit(transform(loss)).lower(params, images, noise).compile().cost_analysis()
    return analysis["flops"] / batch


@pytest.mark.parametrize(
    "config",
    [
        MAEConfig(**SIZES["tiny"], scan_unroll=12),
        pytest.param(MAEConfig(**SIZES["base"], scan_unroll=12), marks=pytest.mark.slow),
        MAEConfig((96, 64), 8, 4, 256, 2, 4, 3.0, 128, 3, 4, 0.4, scan_unroll=3),
    ],
    ids=["tiny", "base", "wide patches, few hidden"],
)
def test_a_forward_pass_takes_the_operations_that_xla_counts(config):
    assert forward_flops(config) == pytest.approx(xla_flops(config, lambda loss: loss), rel=0.02)


@pytest.mark.slow
def test_a_training_step_takes_the_operations_that_xla_counts():
    config = MAEConfig(width=384, depth=3, num_heads=6, decoder_width=256, decoder_depth=2, decoder_num_heads=4,
                       scan_unroll=3)  # fmt: skip
    assert train_flops(config) == pytest.approx(xla_flops(config, jax.grad), rel=0.02)


def xla_classifier_flops(config: ClassifierConfig, transform, batch: int = 8) -> float:
    """Operations of one image that XLA counts in transform(loss of the trained parameters)."""

    def loss(trained, frozen, images):
        model = make_bind_classifier(config)(join(frozen, trained))
        return jnp.sum(model.classify(model.represent(images))[0] ** 2)

    shapes = jax.eval_shape(lambda: init_classifier(config, jax.random.key(0))[0])
    trained, frozen = jax.eval_shape(lambda params: split_classifier(config, params), shapes)
    images = jax.ShapeDtypeStruct((batch, *config.encoder.image_size, config.encoder.channels), jnp.float32)
    analysis = jax.jit(transform(loss)).lower(trained, frozen, images).compile().cost_analysis()
    return analysis["flops"] / batch


WIDE = MAEConfig(112, 16, 3, 384, 3, 6, scan_unroll=3)


@pytest.mark.parametrize("pool", ["mean_norm", "attentive", "abmilp"])
def test_a_classifiers_forward_pass_takes_the_operations_that_xla_counts(pool):
    config = ClassifierConfig(WIDE, 100, pool=pool)
    expected = xla_classifier_flops(config, lambda loss: loss)
    assert represent_flops(config) + classify_flops(config) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("trained_blocks", [None, 0, 0.5, 1, 2])
def test_a_classifiers_training_step_takes_the_operations_that_xla_counts(trained_blocks):
    config = ClassifierConfig(WIDE, 100, trained_blocks=trained_blocks)
    assert classifier_train_flops(config) == pytest.approx(xla_classifier_flops(config, jax.grad), rel=0.02)


@pytest.mark.parametrize("pool", ["class", "attentive", "abmilp"])
def test_a_probes_training_step_takes_the_operations_that_xla_counts(pool):
    config = ClassifierConfig(WIDE, 1000, pool=pool, trained_blocks=0)
    assert classifier_train_flops(config) == pytest.approx(xla_classifier_flops(config, jax.grad), rel=0.02)


@pytest.mark.parametrize("pool", ["mean_norm", "attentive", "abmilp"])
def test_a_probes_step_on_kept_features_takes_the_operations_that_xla_counts(pool):
    config = ClassifierConfig(WIDE, 5000, pool=pool, trained_blocks=0)

    def loss(trained, frozen, features):
        return jnp.sum(make_bind_classifier(config)(join(frozen, trained)).classify(features)[0] ** 2)

    shapes = jax.eval_shape(lambda: init_classifier(config, jax.random.key(0))[0])
    trained, frozen = jax.eval_shape(lambda params: split_classifier(config, params), shapes)
    features = jax.ShapeDtypeStruct((8, 384) if pool == "mean_norm" else (8, 49, 384), jnp.float32)
    found = jax.jit(jax.grad(loss)).lower(trained, frozen, features).compile().cost_analysis()["flops"] / 8
    assert classify_train_flops(config) == pytest.approx(found, rel=0.02)
