"""Pictures of many bands and deep values have the crops and the filter of 8-bit ones."""

import functools

import numpy as np
import pytest
from scipy import ndimage

from mae_jax.data.transforms import Picture, centre_crop, random_crop, resize_by_pillow

RNG = np.random.default_rng(0)
STACK = ndimage.gaussian_filter(RNG.uniform(-0.2, 1.2, (90, 120, 5)), (1.5, 1.5, 0)).clip(0, 1)
STACK = (65535 * (STACK - STACK.min()) / np.ptp(STACK)).astype(np.uint16)  # the full range, without steps
SIZES = [(40, 56), (150, 130), (30, 200)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_bands_are_resized_at_full_depth_as_by_torch(size, dtype):
    torch = pytest.importorskip("torch")
    planes = torch.tensor(np.moveaxis(STACK.astype(np.float64), 2, 0)[None])
    resized = torch.nn.functional.interpolate(planes, size, mode="bicubic", antialias=True)[0]
    wanted = np.moveaxis(resized.numpy(), 0, 2)
    found = resize_by_pillow(STACK.astype(dtype), size)
    assert found.dtype == dtype and found.shape == (*size, 5)
    if dtype == "uint16":  # rounded and clipped
        np.testing.assert_allclose(found, wanted.clip(0, 65535), atol=0.51)
    else:
        np.testing.assert_allclose(found, wanted, atol=0.05)


def test_bands_are_resized_at_full_depth_nearly_as_by_scipy():
    for factor in (0.5, 1.7):
        wide = np.pad(STACK.astype(float), ((30, 30), (30, 30), (0, 0)), mode="edge")
        sigma = max(0, 0.5 / factor - 0.5)  # about the filter that Pillow stretches when it reduces
        wide = ndimage.gaussian_filter(wide, (sigma, sigma, 0))
        scipys = ndimage.zoom(wide, (factor, factor, 1), order=3, grid_mode=True, mode="nearest")
        edge, size = round(30 * factor), (round(90 * factor), round(120 * factor))
        found = resize_by_pillow(STACK, size)
        error = found[8:-8, 8:-8] - scipys[edge:-edge, edge:-edge][8:-8, 8:-8]
        assert np.abs(error).mean() < 0.01 * 65535


@pytest.mark.parametrize("crop", [
    functools.partial(random_crop, seed=3, scale=(0.2, 1.0), ratio=(0.75, 1.33)),
    functools.partial(centre_crop, eval_crop=0.875),
])  # fmt: skip
def test_crops_of_a_stack_are_those_of_its_bands_and_of_8_bit_pictures(crop):
    eight = (STACK >> 8).astype(np.uint8)
    for place in range(5):
        whole = crop(Picture(STACK), place, (32, 48))
        bands = [crop(Picture(STACK[..., band : band + 1]), place, (32, 48)) for band in range(5)]
        np.testing.assert_array_equal(whole, np.concatenate(bands, axis=2))
        small = crop(Picture(eight), place, (32, 48))
        for dtype in ("float32", "int16", "float16"):
            deep = crop(Picture(eight.astype(dtype)), place, (32, 48))
            assert deep.dtype == dtype
            np.testing.assert_allclose(deep, small, atol=1.01)


def test_mirrored_pictures_have_mirrored_centres():
    centre = functools.partial(centre_crop, place=None, size=(30, 40), eval_crop=1.0)
    np.testing.assert_array_equal(centre(Picture(STACK[:, ::-1])), centre(Picture(STACK))[:, ::-1])


def test_a_value_next_to_missing_ones_is_the_mean_of_the_valid_ones_by_the_filters_weights():
    holes = RNG.random(STACK.shape) < 0.2
    holes[20:60, 30:90, 2] = True
    values = np.where(holes, np.nan, STACK).astype(np.float32)
    found = resize_by_pillow(values, (40, 56))
    torch = pytest.importorskip("torch")

    def resized(array):
        planes = torch.tensor(np.moveaxis(array, 2, 0)[None])
        found = torch.nn.functional.interpolate(planes, (40, 56), mode="bicubic", antialias=True)
        return np.moveaxis(found[0].numpy(), 0, 2)

    weights = resized((~holes).astype(np.float64))
    wanted = resized(np.where(holes, 0.0, STACK)) / np.where(weights > 0.5, weights, 1)
    certain = np.abs(weights - 0.5) > 1e-4
    np.testing.assert_array_equal(np.isnan(found)[certain], (weights < 0.5)[certain])
    kept = certain & (weights > 0.5)
    np.testing.assert_allclose(found[kept], wanted[kept], atol=0.2)
    assert np.isnan(found[12:24, 18:38, 2]).all()


def test_no_value_leaves_its_type():
    steps = np.zeros((20, 20, 1), np.uint16)
    steps[:, 10:] = 65535
    found = resize_by_pillow(steps, (50, 50))
    assert found[:, :20].max() < 100 and found[:, 30:].min() > 65435  # an overshoot would wrap around
    half = resize_by_pillow(np.where(steps, np.float16(65504), np.float16(-65504)), (50, 50))
    assert half.dtype == np.float16 and np.isfinite(half).all()
