"""Each option of the model, and many at once, against a plain version of it in PyTorch (tests/torch_mae.py)."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from mae_jax.models.mae import PREDICTED, MAEConfig, make_bind
from mae_jax.models.masking import some_hidden
from tests.reference import drawn_masks, random_batch, random_params

torch = pytest.importorskip("torch")

PLAIN = MAEConfig((12, 16), 4, 1, 16, 2, 2, 2.0, 12, 2, 3, 0.5, False)  # 3 x 4 patches, 6 of them hidden
OPTIONS = {
    "loss of all patches": dict(loss_patches="all", normalize_targets=True),
    "principal components": dict(pca_targets=5),
    "cross-attention": dict(decoder_attention="cross"),
    "all with cross-attention": dict(
        decoder_attention="cross", prediction_ratio=0.34, class_tokens=2, registers=1, qk_norm=True, masks_per_image=2,
        uniformity=0.3, pca_targets=7, positions="learned", image_size=(16, 16), mask_cell=2,
    ),
    "all with mask tokens": dict(
        encoder_mask_tokens=True, loss_patches="all", class_tokens=2, registers=1, qk_norm=True, masks_per_image=2,
        uniformity=0.3, normalize_targets=True, mask_sampling="block",
    ),
}  # fmt: skip
BATCH = 3


@functools.cache
def case(name):
    """(config, parameters, images, (loss, gradients), output of the call for the first mask of each image, masks)."""
    config = dataclasses.replace(PLAIN, **OPTIONS[name])
    params, (images, _) = random_params(config), random_batch(config, BATCH)
    keys = jax.random.split(jax.random.key(1), BATCH)
    bind = make_bind(config)

    @jax.jit
    def run(params, images, keys):
        step = jax.value_and_grad(lambda params: bind(params).training_loss(images, keys)[0])(params)
        # One key for each mask, as the data2vec paper's multi-masking has it.
        each = keys
        if config.masks_per_image > 1:
            each = jax.vmap(lambda key: jax.random.split(key, config.masks_per_image))(keys).reshape(-1)
        masks = drawn_masks(each, config.grid, config.mask_ratio, config.mask_sampling, config.mask_cell)
        ids = masks.ids_hidden
        if config.prediction_ratio is not None:
            count = int(config.num_patches * config.prediction_ratio)
            ids = some_hidden(jax.vmap(jax.random.fold_in, (0, None))(each, PREDICTED), masks, count)
        first = jax.tree.map(lambda leaf: leaf[:: config.masks_per_image], masks)
        return step, bind(params)(images, mask=first), masks.mask, ids

    step, output, hidden, ids = jax.device_get(run(params, images, keys))
    return config, params, images, step, output, hidden, np.array(ids) if config.prediction_ratio else None


@functools.cache
def expected(name):
    """(loss, gradients by name, predictions of all masks) of PyTorch."""
    from tests.torch_mae import to_torch, torch_mae

    config, params, images, _, _, hidden, ids = case(name)
    params = to_torch(params)
    loss, prediction = torch_mae(params, config, images, hidden, ids)
    loss.backward()
    return loss.item(), flatten_dict(jax.tree.map(lambda leaf: leaf.grad, params)), prediction.detach().numpy()


# All at once is fast; one by one tells which it is that fails.
each_option = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name.startswith("all") else pytest.mark.slow) for name in OPTIONS]
)


@each_option
def test_the_training_loss_is_pytorchs(name):
    # A few roundings of float32, of values around 1.
    assert case(name)[3][0] == pytest.approx(expected(name)[0], rel=1e-5)


@each_option
def test_every_gradient_of_the_training_loss_is_pytorchs_and_none_is_zero(name):
    for path, found in flatten_dict(case(name)[3][1]).items():
        reference = expected(name)[1][path]
        reference = np.zeros(found.shape) if reference is None else reference.numpy()
        largest = np.abs(reference).max()
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found, reference, rtol=0, atol=1e-4 * largest + 1e-6, err_msg="/".join(path))
        if "basis" not in path and "qkv" not in path and "kv" not in path:  # a bias of the keys changes nothing
            assert np.abs(found).max() > 1e-6, path


@each_option
def test_predictions_are_pytorchs_and_come_as_patches(name):
    config, params, _, _, output, _, _ = case(name)
    reference = expected(name)[2][:: config.masks_per_image]
    if config.pca_targets is not None:
        basis = params["decoder"]["basis"]
        reference = reference @ basis["components"].astype(np.float64) + basis["mean"]
    assert output.prediction.shape == (BATCH, config.num_patches, 16)
    np.testing.assert_allclose(output.prediction, reference, rtol=0, atol=1e-5 * np.abs(reference).max())


@each_option
def test_a_call_has_the_loss_of_training_where_that_predicts_every_patch_of_one_mask(name):
    config, _, _, (loss, _), output, _, _ = case(name)
    if config.masks_per_image > 1 or config.prediction_ratio or config.uniformity:
        assert abs(output.loss / loss - 1) > 1e-4
    else:
        assert output.loss == pytest.approx(loss, rel=1e-6)
