"""Models in files of other programs: facebookresearch/mae, Hugging Face and timm. The content tells which one wrote it.

Settings come from what the file says (`description`), else from the shapes of its tensors, else they are the usual
ones. Notes list what is assumed, missing or left over. What would change the model's results is refused.
"""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from mae_jax.interop.description import Description, State, data_settings, describe, is_number
from mae_jax.interop.tensors import Tensor, read_tensors
from mae_jax.interop.torch_layout import listed, read_params, their_names
from mae_jax.interop.workdirs import Weights
from mae_jax.models.classifier import ClassifierConfig, abstract_variables
from mae_jax.models.config import SIZES, MAEConfig
from mae_jax.models.mae import abstract_params
from mae_jax.models.positions import sincos_table
from mae_jax.runtime.errors import UserError, first_line

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pth", "*.pt")
WRAPPERS = re.compile(r"^((module|_orig_mod|model|backbone|base_model)\.)+")  # added to names by other programs
ESSENTIAL = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight", "blocks.0.mlp.fc1.weight")
DECODER_ESSENTIAL = ("decoder_embed.weight", "decoder_pos_embed", "decoder_blocks.0.mlp.fc1.weight")
TABLES = (("pos_embed", "width"), ("decoder_pos_embed", "decoder_width"))
STACKS = (("blocks", "depth"), ("decoder_blocks", "decoder_depth"))
# Tensors without a counterpart that change a ViT's results: extra tokens, layer scale, qk-norm, ...
CHANGES_RESULTS = re.compile(
    r"(decoder_)?blocks\.|encoder\.|decoder\.|layers\.|patch_embed\.|.*(pre_logits|reg_token|dist_token|distillation|"
    r"register|storage_token|norm_pre|rope|relative_position|attn_pool)"
)
HEADS_OF_WIDTH = {size["width"]: size["num_heads"] for size in SIZES.values()} | {1408: 16, 1664: 16}  # ViT-g, ViT-G
DECODER_HEADS = 16  # of all released autoencoders
# Settings that the user may give if a file does not state them.
GUESSABLE = ("num_heads", "decoder_num_heads", "normalize_targets", "norm_epsilon", "activation", "image_size")


def is_foreign(path: Path) -> bool:
    """Whether a path is a file, or a folder with weights of other programs."""
    if path.is_file():
        return True
    own = (path / "params").is_dir() or (path / "checkpoints").is_dir()
    return path.is_dir() and not own and any(next(path.glob(pattern), None) for pattern in WEIGHT_FILES)


def read_foreign(path: Path, asked: dict[str, Any] | None = None) -> Weights:
    """Reads a file, or a folder of files; `asked` gives settings that they do not state (`GUESSABLE`).

    Raises UserError if a file is damaged, would run code, holds no ViT like ours, or contradicts `asked`.
    """
    tensors, others = read_tensors(path)
    try:  # the files may hold anything, of any type
        found = describe(path if path.is_dir() else path.parent, _unwrapped(tensors), others)
        return _read(found, asked or {}, path.name)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        text = f"or a JSON file beside it, has an unknown form ({first_line(error)})"
        raise UserError(f"{path}, {text}") from error


def _read(found: Description, asked: dict[str, Any], file_name: str) -> Weights:
    _check_whole(found)
    model = _model_config(found, asked, file_name)
    config: dict[str, Any] = {"task": "pretrain", "seed": 0, "model": _as_settings(model)}
    config["data"] = data_settings(found, model)
    if found.has_head:
        batch_norm, names = "head.1.weight" in found.state, found.class_names
        classes = found.state["head.1.weight" if batch_norm else "head.weight"].shape[0]
        pool = "mean_norm" if "fc_norm.weight" in found.state else found.pool
        classifier = ClassifierConfig(model, classes, pool, batch_norm=batch_norm)
        shapes = abstract_variables(classifier)
        config["class_names"] = names if names and len(names) == classifier.num_classes else None
        config["task"] = "classify"
        config["classifier"] = {k: v for k, v in dataclasses.asdict(classifier).items() if k != "encoder"}
    else:
        classifier, shapes = None, abstract_params(model, decoder=found.has_decoder)
        if not found.has_decoder:
            found.notes.append("no decoder in it: it can encode, not reconstruct")
    found.notes += _left_over(found, {name for _, names in their_names(shapes, classifier) for name in names})
    params = read_params(found.state, shapes, classifier, model.patch_size)
    return Weights(config, params, found.step, found.origin, tuple(found.notes))


def _unwrapped(tensors: State) -> State:
    state = {WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    if len(state) < len(tensors):
        raise UserError(f"it has tensors whose names differ only in a prefix ({WRAPPERS.pattern})")
    return state


def _check_whole(found: Description) -> None:
    needed = ESSENTIAL + (DECODER_ESSENTIAL if found.has_decoder else ())
    if missing := [name for name in needed if name not in found.state]:
        has = listed(list(found.state)) or "nothing"
        raise UserError(f"it has no complete ViT or masked autoencoder: it lacks {listed(missing)}; it has {has}")


def _model_config(found: Description, asked: dict[str, Any], file_name: str) -> MAEConfig:
    """Settings come from the file, else from the user, else from the shapes, else they are the usual ones."""
    size, asked = asked.get("image_size"), {k: v for k, v in asked.items() if k != "image_size"}
    for name, value in asked.items():
        if found.model.get(name, value) != value:
            raise UserError(f"{name}={value!r} cannot be set: it is {found.model[name]!r} in the file")
    settings = _settings_of_shapes(found) | asked | found.model
    for stack, name in STACKS[: 1 + found.has_decoder]:
        numbers = _block_numbers(found.state, stack)
        if len(numbers) != settings[name] or max(numbers) >= len(numbers):
            text = f"it has {len(numbers)} {stack}, up to number {max(numbers)}"
            raise UserError(f"{name} is {settings[name]!r}, but {text}")
    _assume(settings, found, file_name)
    if "image_size" not in settings:
        settings["image_size"] = _image_size(found, settings["patch_size"], size)
    _check_types(settings)
    model = MAEConfig(**settings)
    learned = settings.get("positions") == "learned" or not _tables_are_fixed(found, model)
    return dataclasses.replace(model, positions="learned" if learned else "sincos")


def _settings_of_shapes(found: Description) -> dict[str, Any]:
    state = found.state
    kernel = state["patch_embed.proj.weight"].shape
    if len(kernel) != 4 or kernel[2] != kernel[3]:
        raise UserError(f"patch_embed.proj.weight has shape {kernel}; patches must be square")
    settings = {
        "width": state["cls_token"].shape[-1],
        "channels": kernel[1],
        "patch_size": kernel[2],
        "depth": len(_block_numbers(state, "blocks")),
        "mlp_width": state["blocks.0.mlp.fc1.weight"].shape[0],
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
    }
    if found.has_decoder:
        settings |= {
            "decoder_width": state["decoder_embed.weight"].shape[0],
            "decoder_depth": len(_block_numbers(state, "decoder_blocks")),
            "decoder_mlp_width": state["decoder_blocks.0.mlp.fc1.weight"].shape[0],
        }
    return settings


def _block_numbers(state: State, stack: str) -> set[int]:
    return {int(name.split(".")[1]) for name in state if re.match(rf"{stack}\.\d+\.", name)}


def _assume(settings: dict[str, Any], found: Description, file_name: str) -> None:
    """Fills in, and notes, what neither the file nor the user says."""
    width = settings["width"]
    usual = {"norm_epsilon": found.norm_epsilon}
    usual["num_heads"] = HEADS_OF_WIDTH.get(width, 0 if width % 64 else width // 64)
    if found.has_decoder:
        # Released files with "visualize" in their names predict plain pixels, all others normalised ones.
        usual |= {"decoder_num_heads": DECODER_HEADS, "normalize_targets": "visualize" not in file_name}
    assumed = {name: value for name, value in usual.items() if name not in settings}
    for name, width in (("num_heads", "width"), ("decoder_num_heads", "decoder_width")):
        if name in assumed and (assumed[name] < 1 or settings[width] % assumed[name]):
            raise UserError(
                f"it does not say its {name}, and {width} {settings[width]} is no usual one: give it "
                f"with mae_jax.load(path, {name}=...) or --config.assume.{name}=..."
            )
    settings |= assumed
    if found.norm_epsilon == 1e-6:  # the usual one, except in Hugging Face's files
        assumed.pop("norm_epsilon", None)
    if assumed:
        text = ", ".join(f"{name}={value}" for name, value in assumed.items())
        found.notes.append(f"{text} assumed, since the file does not say it")


def _image_size(found: Description, patch_size: int, asked: int | tuple[int, int] | None) -> int | tuple[int, int]:
    """The image size of the position table: `asked` if it has as many patches, else a square."""
    table = found.state["pos_embed"]
    patches = table.shape[-2] - 1
    side = math.isqrt(patches)
    square = side * side == patches
    if asked is not None and not (square and _is_formula(table, (side, side))):
        height, width = (asked, asked) if isinstance(asked, int) else asked
        if (height // patch_size) * (width // patch_size) == patches:
            if square:
                found.notes.append(f"its positions are taken to be of {height} x {width} images")
            return asked
    if not square:
        raise UserError(
            f"it has positions for {patches} patches, which do not form a square: give the image size with "
            "mae_jax.load(path, image_size=(height, width)) or --config.assume.image_size='(height,width)'"
        )
    return side * patch_size


def _check_types(settings: dict[str, Any]) -> None:
    for field in dataclasses.fields(MAEConfig):
        value = settings.get(field.name, field.default)
        right = is_number(value) if field.type is float else field.type not in (bool, int) or type(value) is field.type
        if not right:
            raise UserError(f"{field.name}={value!r} is no {field.type.__name__}")


def _tables_are_fixed(found: Description, model: MAEConfig) -> bool:
    """Whether the file's position tables are those of the sine-cosine formula."""
    for name, width in TABLES[: 1 + found.has_decoder]:
        shape, expected = found.state[name].shape, (1, 1 + model.num_patches, getattr(model, width))
        if shape != expected:
            raise UserError(f"{name} has shape {shape}, but the model's settings make it {expected}")
        if not _is_formula(found.state[name], model.grid):
            return False
    return True


def _is_formula(tensor: Tensor, grid: tuple[int, int]) -> bool:
    """Whether a tensor [1, 1 + L, D] is the sine-cosine table, to the last bit of its own precision."""
    table, width = tensor.read()[0], tensor.shape[-1]
    return width % 4 == 0 and np.array_equal(table, sincos_table(grid, width).astype(table.dtype))


def _left_over(found: Description, used: set[str]) -> list[str]:
    """A note on tensors that no parameter uses. Raises UserError if the results would differ without them."""
    left = sorted(found.state.keys() - used - {name for name, _ in TABLES})
    left = [name for name in left if not name.endswith("num_batches_tracked")]
    unused_decoder = "decoder" if found.has_head else "-"  # a classifier does not use it
    if serious := [name for name in left if CHANGES_RESULTS.match(name) and not name.startswith(unused_decoder)]:
        raise UserError(f"it is not a plain ViT: {listed(serious)} have no place in this model")
    return [f"left over: {', '.join(left)}"] if left else []


def _as_settings(model: MAEConfig) -> dict[str, Any]:
    """The settings `model.*` of this model; MLP widths that follow from `mlp_ratio` are None."""
    settings = dataclasses.asdict(model)
    for name, width in (("mlp_width", model.width), ("decoder_mlp_width", model.decoder_width)):
        settings[name] = None if settings[name] == int(model.mlp_ratio * width) else settings[name]
    return settings
