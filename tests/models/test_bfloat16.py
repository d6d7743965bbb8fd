import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.models.mae import MAEConfig, init_params, make_bind

SIZES = dict(image_size=32, patch_size=4, width=64, depth=2, num_heads=4, decoder_width=32, decoder_depth=2,
             decoder_num_heads=4)  # fmt: skip


@pytest.mark.parametrize("batch", [64])
def test_bfloat16_products_change_the_gradients_of_biases_norms_and_tokens_by_less_than_two_percent(batch):
    """A product has 8 bits, a relative error of 0.4 %; sums over a batch must not add their rounding to that.

    A kernel's gradient is itself a product, summed as the hardware does it: jax 0.12's CPU takes bfloat16 sums.
    """
    params = jax.jit(lambda key: init_params(MAEConfig(**SIZES), key))(jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (batch, 32, 32, 3))

    def gradient(dtype):
        bind = make_bind(MAEConfig(**SIZES, dtype=dtype))
        return jax.jit(jax.grad(lambda params: bind(params)(images, key=jax.random.key(2)).loss))(params)

    exact, ours = gradient("float32"), gradient("bfloat16")
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(exact), jax.tree.leaves(ours), strict=True):
        name = jax.tree_util.keystr(path)
        assert b.dtype == jnp.float32
        if "qkv" in name and "bias" in name:  # the gradient of the keys' bias is zero: leave it out
            a, b = (np.delete(x.reshape(len(x), 3, -1), 1, axis=1) for x in (a, b))
        limit = 0.1 if "kernel" in name else 0.02
        assert np.linalg.norm(b - a) <= limit * np.linalg.norm(a), name
