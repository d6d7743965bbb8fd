"""The classifier against Hugging Face's ViT, and what sets it apart from the autoencoder's encoder."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.models.classifier import POOLS, ClassifierConfig, init_classifier, make_bind_classifier
from mae_jax.models.config import MAEConfig
from mae_jax.models.mae import init_params, make_bind
from mae_jax.models.transformer import drop_path_scales
from mae_jax.runtime.errors import UserError
from tests.reference import loop_positions, max_relative, random_batch, random_like, to_hf_state

ENCODER = MAEConfig(12, 4, 3, 16, 3, 2, 2.5, 12, 1, 3, norm_epsilon=1e-3)
CLASSES = 5


def random_classifier(config: ClassifierConfig) -> dict:
    return random_like(jax.eval_shape(lambda: init_classifier(config, jax.random.key(0))[0]))


@functools.cache
def hugging_face():
    """(encoder's parameters, images, ViTForImageClassification with them, its tokens before the final norm)."""
    torch = pytest.importorskip("torch")
    from transformers import ViTConfig, ViTForImageClassification

    params = random_classifier(ClassifierConfig(ENCODER, CLASSES, pool="class"))
    encoder, linear = dict(params["encoder"]), params["head"]["linear"]
    state = to_hf_state({"encoder": {name: tree for name, tree in encoder.items() if name != "positions"}}, ENCODER)
    state["vit.embeddings.position_embeddings"] = encoder["positions"][None]
    state |= {"classifier.weight": linear["kernel"].T.copy(), "classifier.bias": linear["bias"]}
    config = ViTConfig(
        hidden_size=ENCODER.width, num_hidden_layers=ENCODER.depth, num_attention_heads=ENCODER.num_heads,
        intermediate_size=ENCODER.blocks.mlp_width, layer_norm_eps=ENCODER.norm_epsilon, image_size=12, patch_size=4,
        num_labels=CLASSES, attn_implementation="eager",
    )  # fmt: skip
    model = ViTForImageClassification(config).eval()
    model.load_state_dict({name: torch.tensor(value) for name, value in state.items()}, strict=True)
    images, _ = random_batch(ENCODER, 3)
    seen = []
    model.vit.layernorm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        logits = model(torch.tensor(images.transpose(0, 3, 1, 2))).logits
    return params, images, model, logits, seen[0]


def test_logits_of_the_class_token_are_those_of_hugging_face():
    params, images, _, expected, _ = hugging_face()
    model = make_bind_classifier(ClassifierConfig(ENCODER, CLASSES, pool="class"))(params)
    # Float32 in two orders of summation: about ten roundings, 1e-6.
    assert max_relative(model(images), expected) < 1e-5


def test_the_tokens_of_all_patches_are_those_of_hugging_face():
    torch = pytest.importorskip("torch")

    params, images, reference, _, _ = hugging_face()
    with torch.no_grad():
        expected = reference.vit(torch.tensor(images.transpose(0, 3, 1, 2))).last_hidden_state
    model = make_bind_classifier(ClassifierConfig(ENCODER, CLASSES, pool="class"))(params)
    assert max_relative(model.encode(images), expected) < 1e-5


def test_the_tokens_after_chosen_blocks_are_the_normed_hidden_states_of_hugging_face():
    torch = pytest.importorskip("torch")

    params, images, reference, _, _ = hugging_face()
    with torch.no_grad():
        states = reference.vit(torch.tensor(images.transpose(0, 3, 1, 2)), output_hidden_states=True).hidden_states
        expected = [reference.vit.layernorm(states[block]) for block in (2, 1, 3)]
    model = make_bind_classifier(ClassifierConfig(ENCODER, CLASSES, pool="class"))(params)
    found = model.encode(images, layers=(2, -3, -1))
    assert len(found) == 3
    for ours, theirs in zip(found, expected, strict=True):
        assert max_relative(ours, theirs) < 1e-5
    with pytest.raises(UserError, match="layer 4: the encoder has the blocks 1 to 3, or -3 to -1"):
        model.encode(images, layers=(4,))


def torch_pool(pool: str, tokens, norm, head: dict):
    """[B, 1 + L, D] before the final norm -> [B, D], in PyTorch."""
    import torch
    from torch.nn.functional import linear, scaled_dot_product_attention

    match pool:
        case "class":
            return norm(tokens)[:, 0]
        case "mean":
            return norm(tokens)[:, 1:].mean(1)
        case "mean_norm":
            return norm(tokens[:, 1:].mean(1))
    patches = norm(tokens)[:, 1:]
    p = jax.tree.map(torch.tensor, head["pool"])
    if pool == "abmilp":
        scores = torch.tanh(linear(patches, p["key"]["kernel"].T, p["key"]["bias"])) @ p["query"]
        return (torch.softmax(scores, dim=1)[:, :, None] * patches).sum(1)
    key, value = (linear(patches, p[name]["kernel"].T, p[name]["bias"]) for name in ("key", "value"))
    query = p["query"].expand(len(patches), 1, -1)
    q, k, v = (x.reshape(*x.shape[:2], ENCODER.num_heads, -1).transpose(1, 2) for x in (query, key, value))
    return scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(len(patches), -1)


@pytest.mark.parametrize("pool", POOLS)
def test_every_pool_is_that_of_pytorch_on_the_tokens_of_hugging_face(pool):
    torch = pytest.importorskip("torch")
    params, images, reference, _, tokens = hugging_face()
    config = ClassifierConfig(ENCODER, CLASSES, pool=pool)
    head = random_classifier(config)["head"]
    with torch.no_grad():
        pooled = torch_pool(pool, tokens, reference.vit.layernorm, head).numpy()
    expected = pooled.astype(np.float64) @ head["linear"]["kernel"] + head["linear"]["bias"]
    model = make_bind_classifier(config)({"encoder": params["encoder"], "head": head})
    assert max_relative(model(images), expected) < 1e-5


def test_the_encoder_of_a_new_classifier_is_the_autoencoders_with_positions_that_begin_as_its_table():
    config = dataclasses.replace(ENCODER, image_size=(8, 16))
    params, _ = init_classifier(ClassifierConfig(config, CLASSES), jax.random.key(1))
    images, _ = random_batch(config, 2)
    encoder = dict(params["encoder"])
    # The table in float32: half a rounding of 1.
    np.testing.assert_allclose(encoder.pop("positions"), loop_positions(2, 4, 16), rtol=0, atol=6e-8)
    autoencoder = make_bind(config)(init_params(config, jax.random.key(2)) | {"encoder": encoder})
    found = make_bind_classifier(ClassifierConfig(config, CLASSES))(params).encode(images)
    assert max_relative(found, autoencoder.encode(images)) < 1e-6


def test_a_new_head_has_a_kernel_of_the_asked_deviation_and_no_bias():
    config = ClassifierConfig(dataclasses.replace(ENCODER, width=64), 1000, head_std=0.01)
    params, statistics = init_classifier(config, jax.random.key(0))
    kernel = np.asarray(params["head"]["linear"]["kernel"])
    # The deviation of 64,000 values has an error of 0.01 / sqrt(2 x 64,000); five of them.
    assert kernel.std() == pytest.approx(0.01, abs=5 * 0.01 / np.sqrt(2 * kernel.size))
    assert abs(kernel.mean()) < 5 * 0.01 / np.sqrt(kernel.size)
    assert not np.any(params["head"]["linear"]["bias"])
    assert statistics == {}


def test_batch_norm_begins_with_mean_0_and_variance_1_and_without_parameters():
    params, statistics = init_classifier(ClassifierConfig(ENCODER, CLASSES, batch_norm=True), jax.random.key(0))
    assert params["head"].keys() == {"linear"}
    np.testing.assert_array_equal(statistics["head"]["batch_norm"]["mean"], np.zeros(16))
    np.testing.assert_array_equal(statistics["head"]["batch_norm"]["variance"], np.ones(16))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trained_blocks": 1.5}, "trained_blocks=1.5"),
        ({"trained_blocks": 7}, "trained_blocks=7 .*3 .the depth"),
        ({"trained_blocks": -1}, "trained_blocks=-1"),
        ({"num_classes": 1}, "num_classes=1 must be at least 2"),
    ],
)
def test_settings_that_make_no_classifier_are_refused_in_one_line(changes, message):
    with pytest.raises(UserError, match=message) as error:
        ClassifierConfig(**{"encoder": ENCODER, "num_classes": CLASSES} | changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(12, 12, 3), (2, 12, 12, 1), (2, 13, 12, 3)])
def test_images_that_do_not_fit_are_refused_in_one_line(shape):
    config = ClassifierConfig(ENCODER, CLASSES)
    model = make_bind_classifier(config)(random_classifier(config))
    with pytest.raises(UserError) as error:
        model(np.zeros(shape, np.float32))
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------------------- drop path


@pytest.mark.parametrize(
    ("trained_blocks", "rates"),
    [(None, (0, 0.1, 0.2, 0.3)), (2, (0, 0, 0.2, 0.3)), (0.5, (0, 0, 0, 0.3)), (0, (0, 0, 0, 0))],
)
def test_drop_path_rises_linearly_from_0_over_the_blocks_and_spares_frozen_ones(trained_blocks, rates):
    encoder = dataclasses.replace(ENCODER, depth=4)
    config = ClassifierConfig(encoder, CLASSES, trained_blocks=trained_blocks, drop_path=0.3)
    assert config.drop_path_rates == pytest.approx(rates, abs=1e-12)
    assert ClassifierConfig(encoder, CLASSES, trained_blocks=trained_blocks).drop_path_rates is None


def test_a_branch_is_dropped_at_its_rate_and_else_scaled_so_that_the_mean_stays():
    rates, count = np.array([0, 0.1, 0.5]), 20_000
    scales = np.asarray(drop_path_scales(jax.random.split(jax.random.key(3), count), rates))
    assert scales.shape == (3, 2, count)
    np.testing.assert_array_equal(scales[0], 1)
    for rate, found in zip(rates[1:], scales[1:], strict=True):
        np.testing.assert_allclose(np.unique(found), [0, 1 / (1 - rate)], rtol=1e-6)
        # One value has the variance rate / (1 - rate); five deviations of the mean.
        assert found.mean(axis=1) == pytest.approx(1, abs=5 * np.sqrt(rate / (1 - rate) / count))
    # The two branches and the blocks are drawn apart: five deviations of a correlation.
    correlations = np.corrcoef(scales[1:].reshape(4, count)) - np.eye(4)
    assert np.abs(correlations).max() < 5 / np.sqrt(count)


@functools.cache
def dropping(rate: float):
    """(images, keys or None) -> [B, D], by a classifier of two blocks, the second of them dropped at `rate`."""
    encoder = dataclasses.replace(ENCODER, depth=2)
    config = ClassifierConfig(encoder, CLASSES, pool="mean", drop_path=rate)
    model = make_bind_classifier(config)(random_classifier(config))
    return jax.jit(lambda images, keys: model.represent(images, keys))


def test_without_keys_nothing_is_dropped():
    images, _ = random_batch(ENCODER, 3)
    np.testing.assert_array_equal(dropping(0.9)(images, None), dropping(0.0)(images, None))
    keys = jax.random.split(jax.random.key(0), 3)
    np.testing.assert_array_equal(dropping(0.0)(images, keys), dropping(0.0)(images, None))
    assert max_relative(dropping(0.9)(images, keys), dropping(0.0)(images, None)) > 1e-2


def test_each_example_drops_each_of_the_two_branches_on_its_own():
    image, _ = random_batch(ENCODER, 1)
    images, keys = np.repeat(image, 32, axis=0), jax.random.split(jax.random.key(0), 32)
    found = np.asarray(dropping(0.5)(images, keys))
    kinds = np.unique(np.round(found, 4), axis=0)  # both branches, attention alone, MLP alone, neither
    assert len(kinds) == 4
    scales = np.asarray(drop_path_scales(keys, np.array([0, 0.5])))[1].T
    for pair in np.unique(scales, axis=0):
        alike = found[np.all(scales == pair, axis=1)]
        # The same numbers, but for the place in the batch.
        np.testing.assert_allclose(alike, np.broadcast_to(alike[0], alike.shape), rtol=0, atol=1e-5)


def test_what_an_example_drops_follows_from_its_own_key_alone():
    images, _ = random_batch(ENCODER, 8)
    keys = jax.random.split(jax.random.key(0), 8)
    order = np.random.default_rng(0).permutation(8)
    found = dropping(0.5)(images, keys)
    np.testing.assert_allclose(dropping(0.5)(images[order], keys[order]), found[order], rtol=0, atol=1e-5)


def test_an_example_that_drops_both_branches_skips_the_block():
    images, _ = random_batch(ENCODER, 8)
    keys = jax.random.split(jax.random.key(0), 8)
    scales = np.asarray(drop_path_scales(keys, np.array([0, 0.5])))[1]
    skipped = ~scales.any(axis=0)
    assert 0 < skipped.sum() < 8
    two = ClassifierConfig(dataclasses.replace(ENCODER, depth=2), CLASSES, pool="mean", drop_path=0.5)
    one = dataclasses.replace(two, encoder=dataclasses.replace(ENCODER, depth=1), drop_path=0.0)
    params = random_classifier(two)
    first = dict(
        params["encoder"], blocks=jax.tree.map(lambda leaf: jnp.asarray(leaf[:1]), params["encoder"]["blocks"])
    )
    expected = make_bind_classifier(one)(params | {"encoder": first}).represent(images)
    np.testing.assert_allclose(dropping(0.5)(images, keys)[skipped], expected[skipped], rtol=0, atol=1e-5)
