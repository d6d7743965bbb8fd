"""The count of floating-point operations against XLA's, of programs without loops (it counts a loop's body once)."""

import jax
import jax.numpy as jnp
import pytest

from mae_jax.models.flops import forward_flops, train_flops
from mae_jax.models.mae import MAEConfig, init_params, make_bind
from mae_jax.models.mae_config import SIZES


def xla_flops(config: MAEConfig, transform, batch: int = 2) -> float:
    """Operations of one image that XLA counts in transform(loss)."""

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
