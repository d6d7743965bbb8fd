"""What an exported program computes, and what must be done to a picture before it: alike for StableHLO and ONNX.

A program takes pictures that are only resized and cropped, in the type in which they are stored, and normalises them
itself: mean, std and value range cannot be forgotten, and 8-bit pictures have a quarter of the floats' bytes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mae_jax.data.augment import normalize, unit_range
from mae_jax.data.processor import Processor
from mae_jax.interop.weights import make_bind_of, make_processor
from mae_jax.interop.workdirs import Weights
from mae_jax.models.classifier import is_classifier
from mae_jax.models.config import MAEConfig
from mae_jax.models.masking import count_visible
from mae_jax.models.parameters import count_parameters
from mae_jax.runtime.errors import UserError

ABOUT = "about.json"
NAMES = ("encoder", "classifier", "reconstruction")
MOST_BYTES = 2**31 - 2**26  # of weights in a file: protobuf and flatbuffers hold 2 GiB
RESIZING = (
    "Resize with an antialiasing bicubic filter (Pillow's), keeping the aspect, so that the picture just covers "
    "resize_to_cover; round the longer side down. Cut out the centre: the first row and column are half of what is "
    "left over, .5 rounded to even. (Of a picture more than 8 times as long as the crop's aspect, resize only the "
    "middle.) The program normalises: give it the values as they are."
)
OUTPUTS = {  # of a classifier, by label_kind
    "class": ("logits", "[batch, classes]; their softmax gives the classes' probabilities"),
    "multi": ("logits", "[batch, classes]; the sigmoid of each is the probability that the class applies"),
    "number": ("numbers", "[batch, numbers], in the units of the training labels"),
}


class Program(NamedTuple):
    """A function of a model, for a file of its own."""

    name: str  # one of NAMES
    inputs: dict[str, str]  # name -> what it is, pictures first
    outputs: dict[str, str]
    call: Callable  # (model, normalised images [B, H, W, C], further inputs) -> the outputs, one or a tuple


def programs_of(weights: Weights) -> list[Program]:
    """The programs that a model has: always the encoder."""
    model = MAEConfig(**weights.config["model"])
    (height, width), patches = model.image_size, model.num_patches
    inputs = {"pictures": f"[batch, {height}, {width}, {model.channels}]"}
    tokens = f"[batch, {model.class_tokens} + {patches}, {model.width}], class token first, after the final norm"
    found = [Program("encoder", inputs, {"features": tokens}, lambda model, images: model.encode(images))]
    if is_classifier(weights.config):
        name, meaning = OUTPUTS[weights.config.get("label_kind", "class")]
        found.append(Program("classifier", inputs, {name: meaning}, lambda model, images: model(images)))
    elif "decoder" in weights.params:
        visible = f"the {visible_by_noise(model)} patches with the smallest values stay visible"
        scale = "by mean and std" if model.target_name != "normalized_pixels" else "by each patch's own mean and std"
        values = f"[batch, {patches}, {model.patch_dim}], pixels normalised {scale}, in the order row, column, channel"
        outputs = {"prediction": values, "mask": f"[batch, {patches}]; 1 = hidden"}
        inputs = inputs | {"noise": f"float32 [batch, {patches}], random; {visible}"}
        found.append(Program("reconstruction", inputs, outputs, _reconstruct))
    return found


def visible_by_noise(model: MAEConfig) -> int:
    """The number of patches that noise leaves visible, whatever masks the model was trained with."""
    return count_visible((1, model.num_patches), model.mask_ratio)


def _reconstruct(model, images, noise):
    output = model(images, noise=noise)
    return output.prediction, output.mask


def picture_processor(weights: Weights) -> Processor:
    """The model's processor, with the type of pictures that a program takes."""
    processor = make_processor(weights.config)
    # Pictures of any type with a range of values, which become floats.
    return dataclasses.replace(processor, dtype=processor.dtype or ("float32" if processor.value_range else "uint8"))


def make_call(weights: Weights, program: Program) -> Callable:
    """The program as a function of pictures [B, H, W, C] and its further inputs; B may be symbolic."""
    settings = weights.config["model"] | {"dtype": "float32", "attention": None, "remat": None, "scan_unroll": None}
    weights = weights._replace(config=weights.config | {"model": settings})
    model, processor = make_bind_of(weights)(jax.device_put(weights.params)), picture_processor(weights)

    def call_one(picture: jax.Array, *others: jax.Array):
        outputs = program.call(model, normalize(picture[None], processor), *(x[None] for x in others))
        return jax.tree.map(lambda x: x[0].astype(jnp.float32), outputs)

    # The model sees one picture, so that only JAX meets a number of pictures that is not known.
    return jax.vmap(call_one)


def check_size(weights: Weights, format: str, program: Program) -> None:
    """Raises UserError if a program's weights do not fit into a file."""
    model, encoder = MAEConfig(**weights.config["model"]), weights.params["encoder"]
    tables = 4 * (1 + model.num_patches) * (model.width + model.decoder_width)
    of_encoder, of_all = (4 * count_parameters(parts) + tables for parts in (encoder, weights.params))
    if (size := of_encoder if program.name == "encoder" else of_all) > MOST_BYTES:
        remedy = "export format=huggingface"
        if of_encoder <= MOST_BYTES:
            remedy = "export the encoder: --config.encoder_only=True"
        raise UserError(f"format={format} holds 2 GiB in a file, but the {program.name} has {size:,} bytes: {remedy}")


def describe(weights: Weights, format: str, programs: list[Program]) -> dict[str, Any]:
    """What a user of the programs must know, as JSON: pictures, inputs and outputs, class names."""
    config, processor = weights.config, picture_processor(weights)
    (height, width), model = processor.image_size, MAEConfig(**weights.config["model"])
    cover = [round(side / processor.eval_crop) for side in (height, width)]
    about = {
        "pictures": {
            "shape": ["batch", height, width, model.channels],
            "dtype": processor.dtype,
            "colours": {1: "grey", 3: "RGB"}.get(model.channels) if processor.bands is None else None,
            "bands": list(processor.bands) if processor.bands is not None else None,
            "resize_to_cover": cover,
            "crop": [height, width],
            "rule": RESIZING,
        },
        "normalisation": {
            "in_the_program": True,
            "value_range": list(unit_range(processor)),
            "clipped": processor.value_range is not None,
            "mean": list(processor.mean),
            "std": list(processor.std),
        },
        "programs": {
            program.name: {"file": f"{program.name}.{format}", "inputs": program.inputs, "outputs": program.outputs}
            for program in programs
        },
        "patch_size": model.patch_size,
        "step": weights.step,
    }
    if is_classifier(config):
        names = config.get("class_names")
        about |= {"label_kind": config.get("label_kind", "class"), "class_names": list(names) if names else None}
    return about
