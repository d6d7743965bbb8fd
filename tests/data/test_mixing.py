"""Mixup, cutmix and soft targets, against loops in NumPy and PyTorch's cross-entropy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from mae_jax.data.augment import cutmix_boxes, mix, soft_targets

BOTH = {"mixup": 0.8, "cutmix": 1.0, "mix_probability": 1.0, "mix_switch_probability": 0.5}
MIXUP, CUTMIX = BOTH | {"cutmix": 0.0}, BOTH | {"mixup": 0.0}


def make_batch(b, height=8, width=6, classes=5, seed=0):
    rng = np.random.default_rng(seed)
    images = jnp.asarray(rng.standard_normal((b, height, width, 3)), jnp.float32)
    labels = jnp.asarray(rng.permutation(np.arange(b)) % classes)
    return jax.random.split(jax.random.key(seed), b), images, soft_targets(labels, classes, 0.1)


def compiled_mix(batch, settings):
    """What `mix` makes of (keys, images, targets), as one program like that of a training step."""
    return jax.jit(functools.partial(mix, ConfigDict(settings)))(*batch)


def kept_shares(targets, mixed) -> np.ndarray:
    """Lambda of each row, as mixed = lambda * own + (1 - lambda) * partner's says; nan where both targets are equal."""
    targets, mixed = np.asarray(targets, np.float64), np.asarray(mixed, np.float64)
    shares = []
    for i in range(len(targets)):
        difference = targets[i] - targets[i ^ 1]
        norm = (difference**2).sum()
        shares.append(((mixed[i] - targets[i ^ 1]) * difference).sum() / norm if norm else np.nan)
    return np.asarray(shares)


def test_soft_targets_are_one_hot_vectors_smoothed_over_all_classes():
    targets = soft_targets(jnp.asarray([2, 0]), 4, 0.1)
    np.testing.assert_allclose(targets, [[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]], atol=1e-7)
    np.testing.assert_array_equal(soft_targets(jnp.asarray([1]), 3, 0.0), [[0, 1, 0]])


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_soft_targets_give_torchs_label_smoothing_loss(smoothing):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((6, 5)), rng.integers(0, 5, 6)
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits), torch.from_numpy(labels), label_smoothing=smoothing
    )
    targets = soft_targets(jnp.asarray(labels), 5, smoothing)
    loss = -(targets * jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))).sum(-1).mean()
    assert float(loss) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("settings", [BOTH, MIXUP, CUTMIX, BOTH | {"mix_probability": 0.5}])
def test_targets_are_distributions_before_and_after_mixing(settings):
    keys, images, targets = make_batch(64)
    _, mixed = compiled_mix((keys, images, targets), settings)
    for rows in (targets, mixed):
        np.testing.assert_allclose(rows.sum(1), 1, atol=1e-6)
        assert (rows >= 0).all()


def test_without_alphas_nothing_is_changed():
    keys, images, targets = make_batch(3)  # odd: there is nothing to pair
    result = mix(ConfigDict(BOTH | {"mixup": 0.0, "cutmix": 0.0}), keys, images, targets)
    assert result[0] is images and result[1] is targets


def test_an_odd_batch_cannot_be_paired():
    with pytest.raises(ValueError, match="there are 3: their number must be even"):
        mix(ConfigDict(BOTH), *make_batch(3))


def test_mixup_weighs_an_image_and_its_partner_by_the_lambda_of_their_targets():
    keys, images, targets = make_batch(64)
    mixed_images, mixed_targets = map(np.asarray, compiled_mix((keys, images, targets), MIXUP))
    shares = kept_shares(targets, mixed_targets)
    images = np.asarray(images)
    for i in range(64):
        if not np.isnan(shares[i]):
            expected = shares[i] * images[i] + (1 - shares[i]) * images[i ^ 1]
            np.testing.assert_allclose(mixed_images[i], expected, atol=1e-5)
    assert np.nanmin(shares) < 0.2 and np.nanmax(shares) > 0.8
    np.testing.assert_allclose(shares[::2], shares[1::2], atol=1e-5)  # one lambda a pair


def test_cutmix_pastes_one_box_of_the_partner_and_weighs_targets_by_the_pixels():
    keys, images, targets = make_batch(64, height=12, width=10)
    mixed_images, mixed_targets = map(np.asarray, compiled_mix((keys, images, targets), CUTMIX))
    shares = kept_shares(targets, mixed_targets)
    images = np.asarray(images)
    for i in range(64):
        pasted = np.zeros((12, 10), bool)
        for y in range(12):
            for x in range(10):
                pasted[y, x] = (mixed_images[i, y, x] == images[i ^ 1, y, x]).all()
                assert pasted[y, x] or (mixed_images[i, y, x] == images[i, y, x]).all()
        ys, xs = np.nonzero(pasted)
        if len(ys):
            assert pasted.sum() == (ys.max() - ys.min() + 1) * (xs.max() - xs.min() + 1)  # a box without holes
        if not np.isnan(shares[i]):
            assert shares[i] == pytest.approx(1 - len(ys) / 120, abs=1e-5)


def test_lambda_follows_the_beta_distribution():
    stats = pytest.importorskip("scipy.stats")
    keys = jax.random.split(jax.random.key(0), 8000)
    targets = jnp.tile(jnp.eye(2), (4000, 1))
    _, mixed = compiled_mix((keys, jnp.zeros((8000, 1, 1, 1)), targets), MIXUP)
    shares = np.asarray(mixed[::2, 0])
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is the bound at 0.1 %.
    assert stats.kstest(shares, stats.beta(0.8, 0.8).cdf).statistic < 1.95 / np.sqrt(4000)


def test_the_probabilities_decide_which_pairs_are_mixed_and_how():
    b = 4000
    keys = jax.random.split(jax.random.key(0), b)
    images = jnp.broadcast_to(jnp.arange(b, dtype=jnp.float32)[:, None, None, None], (b, 16, 16, 1))
    settings = {"mixup": 1.0, "cutmix": 1.0, "mix_probability": 0.6, "mix_switch_probability": 0.25}
    mixed = np.asarray(compiled_mix((keys, images, jnp.eye(2)[jnp.arange(b) % 2]), settings)[0])[::2, :, :, 0]
    own = np.arange(0, b, 2)[:, None, None]
    cut = ((mixed == own) | (mixed == own + 1)).all((1, 2)) & (mixed != own).any((1, 2))
    blended = ((mixed != own) & (mixed != own + 1)).all((1, 2))
    # Boxes of less than a pixel cannot be seen: side share below 1/16, which is 1/256 of the lambdas.
    for share, expected in ((blended.mean(), 0.6 * 0.75), (cut.mean(), 0.6 * 0.25)):
        assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / (b / 2)) + 0.004


@pytest.mark.parametrize("height, width", [(8, 8), (32, 20)])
def test_cutmix_boxes_have_the_side_shares_lambda_asks_for_and_are_cut_off_at_the_border(height, width):
    draw = jax.jit(cutmix_boxes, static_argnums=(2, 3))
    keys, lam = jax.random.split(jax.random.key(0), 2000), jnp.linspace(0, 1, 2000)
    top, left, box_height, box_width, kept = map(np.asarray, draw(keys, lam, height, width))
    assert (top >= 0).all() and (left >= 0).all() and (box_height >= 0).all() and (box_width >= 0).all()
    assert (top + box_height <= height).all() and (left + box_width <= width).all()
    np.testing.assert_allclose(kept, 1 - box_height * box_width / (height * width), atol=1e-6)
    asked = np.sqrt(1 - np.asarray(lam, np.float64))
    for start, size, side in ((top, box_height, height), (left, box_width, width)):
        free = (start > 0) & (start + size < side)
        assert (size <= np.floor(side * asked + 1e-4)).all()
        assert (np.abs(size - side * asked) <= 1 + 1e-4)[free].all() and free.sum() > 500
    lam = jnp.full(2000, 1 - (2.5 / height) ** 2)  # boxes 2 pixels high: centred between 0 and 1, ..., last but one
    top, _, box_height, _, _ = map(np.asarray, draw(keys, lam, height, width))
    assert np.bincount(top + box_height, minlength=height + 1)[1:].min() > 0.6 * 2000 / height
    assert (box_height[top == 0] == 1).any() and (box_height[top > 0] == 2).all()


def test_a_pair_is_mixed_by_the_key_of_its_first_row_alone():
    keys, images, targets = make_batch(16)
    compiled = jax.jit(functools.partial(mix, ConfigDict(BOTH)))
    together = compiled(keys, images, targets)
    for i in range(0, 16, 2):
        rows = slice(i, i + 2)
        apart = compiled(keys[jnp.asarray([i, 3])], images[rows], targets[rows])
        np.testing.assert_allclose(apart[0], together[0][rows], atol=1e-6)
        np.testing.assert_allclose(apart[1], together[1][rows], atol=1e-6)


@pytest.mark.parametrize("b", [32, 8])  # of 8, partners lie on different devices
def test_mixing_is_the_same_on_eight_devices_and_on_one(b):
    batch = make_batch(b)
    compiled = jax.jit(functools.partial(mix, ConfigDict(BOTH)))
    mesh = Mesh(np.asarray(jax.devices()[:8]), ("data",))
    spread = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    for one, many in zip(compiled(*batch), compiled(*spread), strict=True):
        assert len(many.sharding.device_set) == 8
        np.testing.assert_allclose(one, many, atol=1e-6)
