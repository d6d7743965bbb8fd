import functools

import jax
import numpy as np
import pytest

from mae_jax.models.mae import MAEConfig, make_bind
from mae_jax.models.positions import sincos_table
from tests.reference import create_hf_model, from_hf_state, leaves_by_block, random_batch, random_params

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

SIZES = dict(image_size=32, patch_size=4, width=64, depth=4, num_heads=4, decoder_width=32, decoder_depth=2,
             decoder_num_heads=2)  # fmt: skip


@functools.cache
def gradients() -> dict[str, dict[str, np.ndarray]]:
    """Of the autoencoder in bfloat16 and in float32, and of Hugging Face's under autocast and without."""
    config = MAEConfig(**SIZES)
    params, (images, noise) = random_params(config), random_batch(config, 16)
    model = create_hf_model(
        params, config, [sincos_table(config.grid, w) for w in (config.width, config.decoder_width)]
    )

    def ours(dtype):
        bind = make_bind(MAEConfig(**SIZES, dtype=dtype))
        return leaves_by_block(jax.jit(jax.grad(lambda params: bind(params)(images, noise=noise).loss))(params))

    def theirs(autocast):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(pixel_values=torch.tensor(images.transpose(0, 3, 1, 2).copy()), noise=torch.tensor(noise))
        output.loss.backward()
        return from_hf_state({n: p.grad.numpy() for n, p in model.named_parameters() if p.requires_grad}, config)

    return {"bfloat16": ours("bfloat16"), "float32": ours("float32"), "autocast": theirs(True), "torch": theirs(False)}


# PyTorch's residual stream is float32 under autocast. Ours has the compute type: its gradient, which gives those of
# biases, norms and tokens, is rounded once more in each block.
@pytest.mark.parametrize(("kind", "times"), [("kernel", 1.5), ("bias", 1.5), ("scale", 1.5), ("token", 2.5)])
def test_gradients_deviate_from_float32_ones_by_the_noise_of_bfloat16_as_pytorch_s_do_under_autocast(kind, times):
    found = gradients()
    # The gradient of the keys' bias is zero: its noise says nothing.
    names = [name for name in found["float32"] if kind in name and not name.endswith("qkv/bias")]

    def deviation(these, exact):
        errors = sum(np.sum((found[these][name] - found[exact][name]) ** 2.0) for name in names)
        return (errors / sum(np.sum(found[exact][name] ** 2.0) for name in names)) ** 0.5

    assert all(found["bfloat16"][name].dtype == np.float32 for name in names)
    assert deviation("bfloat16", "float32") < min(times * deviation("autocast", "torch"), 0.01)
