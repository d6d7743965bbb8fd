"""RandAugment: each operation against its formula, and what is drawn how often."""

import functools
import pickle

import numpy as np
import pytest

from mae_jax.data import rand_augment
from mae_jax.data.rand_augment import OPERATIONS, apply_operation, make_augmentation

FILL = (124, 116, 104)
LEVELS = [0.0, 0.3, 0.77, 1.0]
SIGNS = [1, -1]
LUMA = np.asarray([0.299, 0.587, 0.114])


def noise(height=24, width=31, channels=3, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def apply(name, image, level, sign=1) -> np.ndarray:
    return apply_operation(name, image, level, sign, FILL if image.shape[2] == 3 else FILL[:1])


def make(ops, fill=FILL):
    return functools.partial(rand_augment.rand_augment, ops=ops, magnitude=9.0, std=0.5, fill=fill)


def test_there_are_fifteen_operations():
    assert len(OPERATIONS) == 15


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_operation_keeps_size_and_type_and_does_not_touch_its_input(name, channels):
    for image in (noise(9, 17, channels), noise(1, 1, channels)):
        before = image.copy()
        for level in LEVELS:
            result = apply(name, image, level, -1)
            assert result.shape == image.shape and result.dtype == np.uint8
        np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["rotate", "solarize", "solarize_add", "color", "contrast", "brightness", "sharpness",
                                  "shear_x", "shear_y", "translate_x", "translate_y"])  # fmt: skip
def test_level_zero_changes_nothing(name, channels):
    for sign in SIGNS:
        np.testing.assert_array_equal(apply(name, noise(channels=channels), 0.0, sign), noise(channels=channels))


@pytest.mark.parametrize("level", LEVELS)
def test_inverting_and_solarizing_turn_values_round(level):
    image = noise().astype(int)
    np.testing.assert_array_equal(apply("invert", noise(), level), 255 - image)
    threshold = 256 - int(256 * level)
    np.testing.assert_array_equal(apply("solarize", noise(), level), np.where(image >= threshold, 255 - image, image))
    added = np.where(image < 128, image + int(110 * level), image)
    np.testing.assert_array_equal(apply("solarize_add", noise(), level), added)


@pytest.mark.parametrize("level, bits", [(0.0, 4), (0.24, 4), (0.25, 3), (0.5, 2), (0.9, 1), (1.0, 0)])
def test_posterizing_keeps_fewer_bits_the_higher_the_level(level, bits):
    step = 2 ** (8 - bits)
    np.testing.assert_array_equal(apply("posterize", noise(), level), noise().astype(int) // step * step)


def test_auto_contrast_stretches_each_channel_to_the_whole_range():
    image = (noise() // 3 + np.asarray([10, 50, 90])).astype(np.uint8)
    low, high = image.min((0, 1)).astype(float), image.max((0, 1)).astype(float)
    np.testing.assert_allclose(apply("auto_contrast", image, 0.9), (image - low) * 255 / (high - low), atol=1)


def test_equalizing_makes_every_value_as_frequent_and_keeps_their_order():
    values = np.random.default_rng(0).uniform(size=(100, 100, 3)) ** 3  # mostly dark
    image = np.floor(values * 256).astype(np.uint8)
    equalized = apply("equalize", image, 0.9)
    for c in range(3):
        before, after = image[..., c].ravel(), equalized[..., c].ravel()
        order = np.argsort(before, kind="stable")
        assert (np.diff(after[order].astype(int)) >= 0).all()
        rank = np.asarray([(before < value).mean() for value in range(256)])  # share of darker pixels
        np.testing.assert_allclose(after, rank[before] * 255, atol=6)  # Pillow rounds the pixels a level down


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("sign", SIGNS)
def test_enhancing_moves_away_from_or_towards_a_poorer_picture(level, sign):
    image, factor = noise().astype(float), 1 + sign * 0.9 * level
    grey = (image @ LUMA)[..., None]
    poorer = {"brightness": 0.0, "contrast": grey.mean(), "color": grey}
    for name, other in poorer.items():
        expected = np.clip(other + factor * (image - other), 0, 255)
        np.testing.assert_allclose(apply(name, noise(), level, sign), expected, atol=1.6)
    smooth = sum(  # 13 / 13 in all: the centre counts 5
        weight * image[1 + y : image.shape[0] - 1 + y, 1 + x : image.shape[1] - 1 + x] / 13
        for y in (-1, 0, 1) for x in (-1, 0, 1) for weight in [5 if x == y == 0 else 1]
    )  # fmt: skip
    inner = image[1:-1, 1:-1]
    expected = np.clip(smooth + factor * (inner - smooth), 0, 255)
    np.testing.assert_allclose(apply("sharpness", noise(), level, sign)[1:-1, 1:-1], expected, atol=1.6)


def source_places(name, level, sign, height, width) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) [h, w] each: where the centre of each pixel of the result lies in the picture, from its corner."""
    y, x = np.mgrid[:height, :width] + 0.5
    amount = sign * level
    match name:
        case "shear_x":
            return x + 0.3 * amount * y, y
        case "shear_y":
            return x, y + 0.3 * amount * x
        case "translate_x":
            return x + 0.45 * amount * width, y
        case "translate_y":
            return x, y + 0.45 * amount * height
        case "rotate":  # about the centre, against the clock where y points down
            angle = np.deg2rad(30 * amount)
            x, y = x - width / 2, y - height / 2
            return (np.cos(angle) * x - np.sin(angle) * y + width / 2,
                    np.sin(angle) * x + np.cos(angle) * y + height / 2)  # fmt: skip


@pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y", "translate_x", "translate_y"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("sign", SIGNS)
def test_moving_shows_each_place_where_the_formula_says_and_the_fill_outside(name, level, sign):
    height, width = 40, 60
    y, x = np.mgrid[:height, :width] + 0.5
    # Ramps, whole numbers at the pixels, which bicubic interpolation keeps; away from 0 and 255, where it could clip.
    image = np.stack([20.5 + 3 * x, 30 + 4 * y, 40.5 + x + 2 * y], axis=2)
    result = apply(name, image.astype(np.uint8), level, sign).astype(float)
    x, y = source_places(name, level, sign, height, width)
    inside = (x > 2.5) & (x < width - 2.5) & (y > 2.5) & (y < height - 2.5)
    outside = (x < -0.01) | (x > width + 0.01) | (y < -0.01) | (y > height + 0.01)
    assert inside.mean() > 0.3 and (level == 0 or outside.any())
    expected = np.stack([20.5 + 3 * x, 30 + 4 * y, 40.5 + x + 2 * y], axis=2)
    np.testing.assert_allclose(result[inside], expected[inside], atol=1.5)
    np.testing.assert_array_equal(result[outside], np.broadcast_to(FILL, (outside.sum(), 3)))


@pytest.fixture
def applied(monkeypatch):
    """The operations that are applied from here on, as (name, level, sign), in a list for each picture."""
    calls = []

    def record(name, image, level, sign, fill):
        calls[-1].append((name, level, sign))
        return image

    monkeypatch.setattr(rand_augment, "apply_operation", record)
    return calls


@pytest.mark.parametrize("ops", [1, 2, 4])
def test_each_of_the_operations_drawn_is_applied_with_probability_one_half(applied, ops):
    augment = make(ops)
    for seed in range(2000):
        applied.append([])
        augment(noise(), np.random.default_rng(seed))
    counts = np.bincount([len(calls) for calls in applied], minlength=ops + 1)
    choices = {1: [1, 1], 2: [1, 2, 1], 4: [1, 4, 6, 4, 1]}[ops]
    for count, ways in zip(counts, choices, strict=True):
        expected = ways / 2**ops
        assert abs(count / 2000 - expected) < 4 * np.sqrt(expected * (1 - expected) / 2000)


def test_operations_levels_and_signs_are_drawn_as_the_settings_say(applied):
    applied.append([])
    augment, rng = make(2), np.random.default_rng(0)
    for _ in range(6000):
        augment(noise(1, 1), rng)
    names, levels, signs = zip(*applied[0], strict=True)
    total = len(names)
    for name in OPERATIONS:
        assert abs(names.count(name) / total - 1 / 15) < 4 * np.sqrt(1 / 15 / total)
    assert abs(np.mean(signs)) < 4 / np.sqrt(total) and set(signs) == {1, -1}
    levels = np.asarray(levels)
    assert levels.max() == 1 and abs((levels == 1).mean() - 0.02275) < 0.01  # two deviations above the mean: clipped
    assert abs(np.median(levels) - 0.9) < 0.005 and abs(np.quantile(levels, 0.1587) - 0.85) < 0.005


def test_equal_generators_give_equal_pictures_and_others_do_not():
    augment = make(2)
    copy = pickle.loads(pickle.dumps(augment))
    results = [augment(noise(), np.random.default_rng(seed)).tobytes() for seed in range(30)]
    assert results == [copy(noise(), np.random.default_rng(seed)).tobytes() for seed in range(30)]
    assert len(set(results)) > 15


def test_grey_pictures_stay_grey():
    augment = make(3, FILL[:1])
    for seed in range(30):
        assert augment(noise(channels=1), np.random.default_rng(seed)).shape == (24, 31, 1)


@pytest.mark.parametrize("mean, channels, fill", [
    ((0.485, 0.456, 0.406), 3, (124, 116, 104)), ((0.5,), 3, (128,) * 3), ((0.305,), 1, (78,)), ((2.0,), 1, (255,)),
])  # fmt: skip
def test_what_comes_in_from_outside_has_the_mean_colour_of_the_data(monkeypatch, make_config, mean, channels, fill):
    fills = []
    monkeypatch.setattr(rand_augment, "apply_operation", lambda *arguments: fills.append(arguments[-1]))
    make_augmentation(make_config(augmentation="rand_augment", rand_augment_ops=20, mean=mean), channels)(
        noise(), np.random.default_rng(0)
    )
    assert set(fills) == {fill}


def test_the_settings_say_whether_pictures_are_augmented(make_config):
    assert make_augmentation(make_config(), 13) is None
