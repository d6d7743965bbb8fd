"""preprocessor_config.json: transformers gives our pixels with ours, and we take what others' say."""

import json

import numpy as np
import pytest
from PIL import Image

import mae_jax
from mae_jax.data.processor import Processor
from mae_jax.interop.formats import fit
from mae_jax.interop.huggingface import left_unsaid, make_preprocessor, read_preprocessor
from mae_jax.interop.timm import crop_share
from mae_jax.interop.weights import read_weights
from mae_jax.models.config import MAEConfig
from tests.interop.others import hugging_face, our_weights

pytestmark = pytest.mark.filterwarnings("ignore:.*(mean and std|its processor)")

MEAN, STD = (0.3, 0.4, 0.5), (0.2, 0.25, 0.3)


def both(tmp_path, size, eval_crop, channels=3):
    """(our processor, the one that transformers makes of the file that we write)."""
    transformers = pytest.importorskip("transformers")
    mean, std = MEAN[:channels], STD[:channels]
    data = {"mean": mean, "std": std, "eval_crop": eval_crop}
    written = make_preprocessor(MAEConfig(image_size=size, patch_size=4, channels=channels), data)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(written))
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    # Without torchvision it is BitImageProcessorPil; torchvision's resize is up to two grey levels from Pillow's.
    theirs = theirs if theirs.backend == "pil" else transformers.BitImageProcessorPil(**theirs.to_dict())
    return Processor(size, channels, mean, std, eval_crop), theirs


def images_of(processors, picture):
    ours, theirs = processors
    pixels = theirs(picture, return_tensors="np")["pixel_values"]
    return np.asarray(ours(picture))[0], np.asarray(pixels)[0].transpose(1, 2, 0)


def photograph(height, width, mode="RGB"):
    """Smooth, as photographs are: a pixel's shift is a small difference, and no other is."""
    rows, columns = np.mgrid[:height, :width] / max(height, width)
    planes = [np.sin(9 * rows + phase) * np.cos(7 * columns - phase) for phase in range(3)]
    return Image.fromarray(np.uint8(np.round(127.5 + 127 * np.stack(planes, 2)))).convert("RGB").convert(mode)


@pytest.mark.parametrize("eval_crop", [0.875, 1.0, 0.7])
@pytest.mark.parametrize("size", [16, 60])
def test_transformers_gives_our_pixels_of_pictures_of_every_shape(tmp_path, size, eval_crop):
    processors, shorter = both(tmp_path, size, eval_crop), round(size / eval_crop)
    for height, width in [(16, 16), (40, 50), (50, 40), (61, 40), (31, 90), (90, 31), (9, 12), (200, 133), (60, 60)]:
        ours, theirs = images_of(processors, photograph(height, width))
        spare = [shorter * side // min(height, width) - size for side in (height, width)]
        # Between two pixels torchvision, as we, begins with the even one, transformers always with the first.
        top, left = (round(n / 2) - n // 2 for n in spare)
        assert {top, left} <= {0, 1} and (top or left) == any(n % 4 == 3 for n in spare)
        np.testing.assert_allclose(
            ours[: size - top, : size - left], theirs[top:, left:], rtol=0, atol=1e-6, err_msg=f"{height} x {width}"
        )


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "P", "1", "CMYK", "YCbCr"])
def test_transformers_gives_our_pixels_of_pictures_of_every_mode(tmp_path, mode):
    picture = photograph(40, 50, mode)
    if mode in ("RGBA", "LA"):
        picture.putalpha(photograph(40, 50, "L"))
    ours, theirs = images_of(both(tmp_path, 16, 0.875), picture)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def test_a_grey_model_has_our_pixels_of_grey_pictures(tmp_path):
    ours, theirs = images_of(both(tmp_path, 16, 0.875, channels=1), photograph(40, 50, "L"))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("eval_crop", [0.875, 1.0])
def test_an_oblong_model_has_our_pixels_of_pictures_of_its_aspect(tmp_path, eval_crop):
    processors = both(tmp_path, (16, 32), eval_crop)
    for height, width in [(16, 32), (40, 80), (110, 220)]:
        ours, theirs = images_of(processors, photograph(height, width))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "model, words",
    [
        (dict(), None),
        (dict(image_size=(16, 32)), "stretches pictures whose aspect is not that of 16 x 32"),
        (dict(channels=1), "does not turn colours into grey"),
        (dict(channels=4), "none of 4 channels"),
    ],
)
def test_what_the_file_cannot_say_is_noted(model, words):
    model = dict(image_size=16, patch_size=4) | model
    notes = left_unsaid(MAEConfig(**model))
    assert (words in notes[0]) if words else notes == []
    assert list(fit(our_weights(**model), "huggingface", encoder_only=True).notes) == notes


@pytest.mark.parametrize("eval_crop", [0.875, 0.9, 1.0, 0.333])
@pytest.mark.parametrize("size", [16, (16, 32)])
def test_what_is_written_is_read_to_the_same_crop_also_when_transformers_has_saved_it(tmp_path, size, eval_crop):
    model = MAEConfig(image_size=size, patch_size=4)
    data = {"mean": MEAN, "std": STD, "eval_crop": eval_crop}
    written = make_preprocessor(model, data)
    assert read_preprocessor(written) == (data, [])
    del written["crop_pct"]  # which other programs may drop
    assert round(16 / read_preprocessor(written)[0]["eval_crop"]) == round(16 / eval_crop)
    _, theirs = both(tmp_path, size, eval_crop)
    theirs.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert read_preprocessor(saved)[0] == data


@pytest.mark.parametrize(
    "preprocessor, eval_crop, notes",
    [
        # What this program wrote before.
        ({"size": {"height": 20, "width": 20}, "resample": 3, "crop_pct": 0.9}, 0.9, []),
        # As on the hub: ViTMAE, DINOv2, CLIP of transformers 4.0.
        ({"size": 224, "resample": 2}, 1.0, ["stretches", "resample=2"]),
        ({"size": {"height": 224, "width": 224}}, 1.0, ["stretches"]),
        ({"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}, 0.875, []),
        ({"size": 256, "do_center_crop": True, "crop_size": 224, "resample": 3}, 0.875, []),
        ({"size": {"shortest_edge": 224}, "do_center_crop": False, "crop_size": 112}, 1.0, []),
        ({"size": {"shortest_edge": 200}, "crop_size": [224, 224]}, 1.0, []),  # it would pad
        ({}, None, []),
    ],
)  # fmt: skip
def test_the_crop_of_files_of_others_is_taken_and_what_differs_is_noted(preprocessor, eval_crop, notes):
    data, found = read_preprocessor(preprocessor)
    assert data.get("eval_crop") == eval_crop
    assert len(found) == len(notes) and all(word in note for word, note in zip(notes, found, strict=True))


def test_what_a_processor_does_otherwise_is_told_when_its_model_is_loaded(write_model):
    path = write_model(*hugging_face())
    (path.parent / "preprocessor_config.json").write_text(json.dumps({"size": 20, "resample": 2}))
    assert [note for note in read_weights(path.parent).notes if "processor" in note] == [
        "its processor stretches pictures; here they keep their aspect and are cropped to the centre",
        "its processor resizes with resample=2; here by Pillow's bicubic filter",
    ]
    with pytest.warns(UserWarning, match="its processor stretches"):
        mae_jax.load(path.parent)


@pytest.mark.parametrize("eval_crop", [0.875, 0.9, 1.0, 0.95, 0.333])
def test_timm_resizes_to_the_size_that_we_do_and_its_share_is_read_to_the_same_size(eval_crop):
    for side in range(8, 512, 4):
        share = crop_share((side, side), eval_crop)
        assert int(side / share) == round(side / share) == round(side / eval_crop)  # timm's math.floor, and ours
