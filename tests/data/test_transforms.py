"""Crops and resizing on the host, against torch and the definitions."""

import functools
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_jax.data.transforms import (
    CROP_TRIES,
    LONGEST,
    Picture,
    centre_crop,
    crop_draws,
    random_crop,
    resize_by_pillow,
    sample_crops,
)

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
sides = st.integers(1, 700)
places = st.integers(0, 2**48)


def loop_box(height: int, width: int, draws: np.ndarray, scale=SCALE, ratio=RATIO, rule="retry") -> tuple:
    """The rules in plain Python, one picture and one try after the other."""
    for area_draw, aspect_draw, top_draw, left_draw in draws.tolist():
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area_draw)
        aspect = ratio[0] * (ratio[1] / ratio[0]) ** aspect_draw
        box_height, box_width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if rule == "clip":
            box_height, box_width = min(max(box_height, 1), height), min(max(box_width, 1), width)
        if 1 <= box_height <= height and 1 <= box_width <= width:
            top = math.floor(top_draw * (height - box_height + 1))
            left = math.floor(left_draw * (width - box_width + 1))
            return top, left, box_height, box_width
    aspect = min(max(width / height, ratio[0]), ratio[1])
    box_height = min(height, max(1, round(width / aspect)))
    box_width = min(width, max(1, round(height * aspect)))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def boxes_of_one_size(height, width, draws, scale=SCALE, ratio=RATIO, rule="retry") -> np.ndarray:
    """[n, 4]: boxes of as many pictures of one size as there are draws."""
    return sample_crops(np.full(len(draws), height), np.full(len(draws), width), draws, scale, ratio, rule)


def noise(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def mild_noise(*shape) -> np.ndarray:
    """Noise that a bicubic filter cannot drive beyond 0..255, where Pillow clips between its two passes."""
    return np.random.default_rng(0).integers(80, 176, shape, np.uint8)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**63), places, st.integers(1, 70))
def test_the_numbers_of_a_place_are_the_same_however_many_are_drawn_at_once(seed, first, count):
    draws = crop_draws(seed, first, count)
    assert draws.shape == (count, CROP_TRIES, 4)
    for row in {0, count // 2, count - 1}:
        np.testing.assert_array_equal(draws[row], crop_draws(seed, first + row, 1)[0])


def test_the_numbers_are_philoxs_counted_on_from_place_to_place():
    # An independent way to the same counters: a place has 10 values of the counter, of 4 numbers each.
    stream = np.random.Generator(np.random.Philox(key=3)).random(7 * 40)
    np.testing.assert_array_equal(crop_draws(3, 5, 2).ravel(), stream[5 * 40 :])
    assert len(np.unique(crop_draws(3, 2**40, 1000))) == 1000 * 40  # no place shares a number with another


def test_the_numbers_of_far_places_and_of_the_augmentation_are_other_ones():
    def bits(counter, count):
        return set(np.random.Philox(key=3, counter=counter).random_raw(count).tolist())

    far = crop_draws(3, 2**40, 100)
    assert ((far >= 0) & (far < 1)).all()
    taken = [set(draws.ravel().tolist()) for draws in (far, crop_draws(3, 0, 100), crop_draws(4, 2**40, 100))]
    assert not (taken[0] & taken[1] or taken[0] & taken[2])
    for place in (0, 1, 2**40, 2**40 + 99):
        crops, augmentation = bits([place * CROP_TRIES, 0, 0, 0], 40), bits([0, 0, 1, place], 4000)
        assert not crops & augmentation


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(sides, sides), min_size=1, max_size=20), places, st.sampled_from(["clip", "retry"]),
       st.sampled_from([SCALE, (0.9, 1.0), (0.01, 0.1)]), st.sampled_from([RATIO, (1, 1), (0.2, 0.5)]))  # fmt: skip
def test_boxes_of_pictures_of_many_sizes_are_those_of_a_loop_over_them(sizes, first, rule, scale, ratio):
    heights, widths = np.asarray(sizes).T
    draws = crop_draws(0, first, len(sizes))
    boxes = sample_crops(heights, widths, draws, scale, ratio, rule)
    assert boxes.dtype == np.int64
    expected = [loop_box(*size, one, scale, ratio, rule) for size, one in zip(sizes, draws, strict=True)]
    np.testing.assert_array_equal(boxes, expected)


@settings(deadline=None, max_examples=300)
@given(sides, sides, places, st.sampled_from(["clip", "retry"]))
def test_a_sampled_box_lies_inside_the_picture(height, width, place, rule):
    ((top, left, box_height, box_width),) = boxes_of_one_size(height, width, crop_draws(0, place, 1), rule=rule)
    assert box_height >= 1 and box_width >= 1
    assert top >= 0 and left >= 0 and top + box_height <= height and left + box_width <= width


@settings(deadline=None, max_examples=300)
@given(st.integers(100, 700), st.floats(3 / 4, 4 / 3), places)
def test_a_sampled_box_has_an_area_and_a_ratio_within_the_limits(height, aspect, place):
    width = round(height * aspect)
    ((_, _, box_height, box_width),) = boxes_of_one_size(height, width, crop_draws(0, place, 1))
    # Sides are rounded to whole pixels, by half a pixel at most.
    least, most = (box_height - 0.5) * (box_width - 0.5), (box_height + 0.5) * (box_width + 0.5)
    assert most >= 0.2 * height * width
    assert least <= height * width
    assert (box_width + 0.5) / (box_height - 0.5) >= 3 / 4
    assert (box_width - 0.5) / (box_height + 0.5) <= 4 / 3


def test_the_area_is_uniform_and_the_ratio_log_uniform_where_every_draw_fits():
    boxes = boxes_of_one_size(1000, 1000, crop_draws(0, 0, 4000), (0.1, 0.5))
    areas = boxes[:, 2] * boxes[:, 3] / 1e6
    ratios = np.log(boxes[:, 3] / boxes[:, 2])
    for values, low, high in ((areas, 0.1, 0.5), (ratios, math.log(3 / 4), math.log(4 / 3))):
        uniform = (np.sort(values) - low) / (high - low)
        # Kolmogorov-Smirnov: 1.95 / sqrt(n) is the bound at 0.1 %.
        assert np.abs(uniform - np.arange(4000) / 4000).max() < 1.95 / math.sqrt(4000)


def test_every_place_of_a_box_is_possible():
    tops = set(map(tuple, boxes_of_one_size(4, 4, crop_draws(0, 0, 300), (0.25, 0.25), (1, 1))[:, :2].tolist()))
    assert tops == {(top, left) for top in range(3) for left in range(3)}


def test_the_greatest_number_below_one_places_a_box_at_the_far_edge_and_not_beyond():
    draws = np.full((1, CROP_TRIES, 4), 0.5)
    draws[..., 2:] = 1 - 2.0**-53
    for side in (3, 1000, 2**15, 13_377):
        ((top, left, height, width),) = boxes_of_one_size(side, side, draws)
        assert (top + height, left + width) == (side, side)


@pytest.mark.parametrize("height, width, expected", [
    (10, 1000, (0, 493, 10, 13)),  # too wide: 4/3 as wide as high, in the centre
    (1000, 12, (492, 0, 16, 12)),  # too high: 3/4
])  # fmt: skip
def test_where_no_draw_fits_the_central_box_of_the_nearest_ratio_is_taken(height, width, expected):
    boxes = boxes_of_one_size(height, width, crop_draws(0, 0, 2), (0.9, 1.0))
    np.testing.assert_array_equal(boxes, [expected] * 2)


@settings(deadline=None)
@given(st.integers(100, 700), st.integers(100, 700), places)
def test_the_clipping_rule_cuts_the_first_draw_to_the_picture(height, width, place):
    draws = crop_draws(0, place, 1)
    area = height * width * (0.2 + 0.8 * draws[0, 0, 0])
    aspect = (3 / 4) * (16 / 9) ** draws[0, 0, 1]
    expected = min(round((area / aspect) ** 0.5), height), min(round((area * aspect) ** 0.5), width)
    box = sample_crops(np.asarray([height]), np.asarray([width]), draws, SCALE, RATIO, "clip")
    np.testing.assert_allclose(box[0, 2:], expected, atol=1)  # a half may be rounded either way
    if expected[0] < height and expected[1] < width:  # it fits: both rules agree
        np.testing.assert_array_equal(box, sample_crops(np.asarray([height]), np.asarray([width]), draws, SCALE, RATIO))


def test_every_place_of_a_clipped_box_is_possible():
    boxes = boxes_of_one_size(2, 50, crop_draws(0, 0, 1000), (0.36, 0.36), (1, 1), "clip")  # 6 x 6, cut to 2 x 6
    assert set(map(tuple, boxes.tolist())) == {(0, left, 2, 6) for left in range(45)}


def torch_resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    torch = pytest.importorskip("torch")
    batch = torch.from_numpy(image.astype(np.float64)).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(batch, size, mode="bicubic", antialias=True, align_corners=False)
    return resized[0].permute(1, 2, 0).clamp(0, 255).numpy()


@pytest.mark.parametrize("shape, size", [
    ((37, 53, 3), (16, 16)), ((37, 53, 1), (64, 48)), ((50, 20, 4), (31, 17)), ((21, 22, 13), (8, 9)),
    ((8, 8, 3), (32, 32)),
])  # fmt: skip
def test_resizing_agrees_with_torch_bicubic_antialias_within_rounding(shape, size):
    image = mild_noise(*shape)
    resized = resize_by_pillow(image, size)
    assert resized.shape == (*size, shape[2]) and resized.dtype == np.uint8
    # Pillow rounds after each of its two passes: a half each time, the first widened by the filter's negative lobes.
    np.testing.assert_allclose(resized, torch_resize(image, size), atol=1.3)


@pytest.mark.parametrize("rule", ["retry", "clip"])
def test_a_random_crop_is_its_box_cut_out_and_then_resized(rule):
    image = mild_noise(60, 80, 3)
    (draws,) = crop_draws(5, 0, 1)
    crop = random_crop(Picture(image), 0, (24, 24), seed=5, scale=(0.9, 1.0), ratio=RATIO, rule=rule)
    top, left, height, width = loop_box(60, 80, draws, (0.9, 1.0), RATIO, rule)
    # What lies outside the box does not bleed in: the reference never sees it.
    reference = torch_resize(image[top : top + height, left : left + width], (24, 24))
    np.testing.assert_allclose(crop, reference, atol=1.3)


@given(st.integers(1, 40), st.integers(0, 2**32))
@settings(deadline=None)
def test_a_square_picture_of_the_right_size_is_kept_whole_when_the_crop_is_full(side, seed):
    image = noise(side, side, 1, seed=seed)
    crop = random_crop(Picture(image), 0, (side, side), seed=seed, scale=(1, 1), ratio=(1, 1))
    np.testing.assert_array_equal(crop, image)


def test_a_full_crop_of_an_oblong_picture_is_its_central_square():
    image = noise(8, 12, 1)
    crop = random_crop(Picture(image), 0, (8, 8), seed=0, scale=(1, 1), ratio=(1, 1))
    np.testing.assert_array_equal(crop, image[:, 2:10])


@pytest.mark.parametrize("shape", [(500, 375, 3), (375, 500, 3), (256, 256, 3), (300, 257, 1)])
def test_evaluation_resizes_the_shorter_side_to_256_and_takes_the_central_224(shape):
    image = noise(*shape)
    factor = 256 / min(shape[:2])
    # torchvision: Resize(256) truncates the longer side; CenterCrop(224).
    full = resize_by_pillow(
        image, tuple(256 if side == min(shape[:2]) else int(side * factor + 1e-9) for side in shape[:2])
    )
    top, left = (int(round((side - 224) / 2.0)) for side in full.shape[:2])
    expected = full[top : top + 224, left : left + 224]
    np.testing.assert_array_equal(centre_crop(Picture(image), None, (224, 224), eval_crop=0.875), expected)


def test_the_evaluation_crop_begins_where_torchvisions_does_whatever_is_left_over():
    for left_over in range(40):
        strip = np.arange(20 + left_over, dtype=np.uint8)[:, None, None].repeat(20, 1)
        first = int(round(left_over / 2.0))  # as in its CenterCrop: 1.5 becomes 2, 2.5 becomes 2
        for picture in (strip, strip.transpose(1, 0, 2)):
            crop = centre_crop(Picture(picture), None, (20, 20), eval_crop=1.0)
            assert (crop.min(), crop.max()) == (first, first + 19), left_over


@given(sides, sides, st.sampled_from([(8, 8), (224, 224), (96, 32), (10, 70)]), st.sampled_from([1.0, 0.875, 0.95]))
@settings(deadline=None, max_examples=60)
def test_evaluation_always_gives_the_size_asked_for(height, width, size, eval_crop):
    assert centre_crop(Picture(noise(height, width, 1)), None, size, eval_crop=eval_crop).shape == (*size, 1)


@pytest.mark.parametrize("shape", [(1, 30_000, 3), (30_000, 1, 3), (3, 20_000, 1)])
@pytest.mark.parametrize("transform", [
    functools.partial(centre_crop, eval_crop=0.875),
    functools.partial(random_crop, seed=0, scale=(0.2, 1), ratio=RATIO),
    functools.partial(random_crop, seed=0, scale=(0.2, 1), ratio=RATIO, rule="clip"),
    functools.partial(random_crop, seed=0, scale=(0.2, 1), ratio=(1e-4, 1e4), rule="clip"),
], ids=["centre", "retry", "clip", "any ratio"])  # fmt: skip
def test_a_very_long_picture_takes_little_memory(shape, transform):
    picture, shape = Picture(noise(*shape)), (224, 224, shape[2])
    tracemalloc.start()
    crop = transform(picture, 0, (224, 224))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert crop.shape == shape
    assert most < 20 * 2**20  # what Pillow allocates is not traced, but each of its results is copied


@pytest.mark.parametrize("shape", [(20, 20 * LONGEST, 3), (20 * LONGEST, 20, 1), (50, 61, 3)])
def test_up_to_eight_times_as_long_as_wide_all_of_a_picture_is_resized(shape):
    image, least = noise(*shape), 18
    height, width = (least, least * shape[1] // shape[0]) if shape[0] < shape[1] else (least * shape[0] // shape[1], 18)
    top, left = round((height - 16) / 2), round((width - 16) / 2)
    expected = resize_by_pillow(image, (height, width))[top : top + 16, left : left + 16]
    np.testing.assert_array_equal(centre_crop(Picture(image), None, (16, 16), eval_crop=16 / 18), expected)


@pytest.mark.parametrize("shape", [(40, 900, 3), (900, 40, 3), (33, 501, 1)])
def test_the_middle_of_a_longer_picture_looks_as_if_all_of_it_had_been_resized(shape):
    image = mild_noise(*shape)
    height, width = (32, 32 * shape[1] // shape[0]) if shape[0] < shape[1] else (32 * shape[0] // shape[1], 32)
    top, left = (height - 28) // 2, (width - 28) // 2
    whole = resize_by_pillow(image, (height, width))[top : top + 28, left : left + 28].astype(float)
    crop = centre_crop(Picture(image), None, (28, 28), eval_crop=0.875)
    assert np.abs(crop - whole).mean() < np.abs(np.roll(whole, 1, axis=(0, 1)) - whole).mean() / 2


def test_evaluation_keeps_the_aspect_when_the_size_is_oblong():
    # A ramp along each axis: its slope after the crop is the scale along that axis.
    height, width = 120, 300
    ramp = np.zeros((height, width, 2), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(height)[:, None] * 2, np.arange(width) * 0.8
    crop = centre_crop(Picture(ramp), None, (60, 100), eval_crop=1.0).astype(float)
    assert crop.shape == (60, 100, 2)
    vertical = (crop[50, 50, 0] - crop[10, 50, 0]) / 40 / 2  # source pixels a target pixel
    horizontal = (crop[30, 90, 1] - crop[30, 10, 1]) / 80 / 0.8
    assert vertical == pytest.approx(2.0, rel=0.03) and horizontal == pytest.approx(2.0, rel=0.03)


@pytest.mark.parametrize("shape", [(8, 8, 1), (32, 32, 3), (28, 36, 1)])
def test_evaluation_sees_a_picture_of_the_right_size_whole_and_unchanged(shape):
    image = noise(*shape)
    np.testing.assert_array_equal(centre_crop(Picture(image), None, shape[:2], eval_crop=1.0), image)


def test_four_channels_are_not_weighed_by_the_last():
    image = np.full((20, 20, 4), 200, np.uint8)
    image[::2, ::2, 3] = 0  # transparent pixels, if it were alpha
    np.testing.assert_array_equal(resize_by_pillow(image, (10, 10))[..., :3], 200)
