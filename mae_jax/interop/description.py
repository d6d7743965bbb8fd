"""What a file of another program says of its model, and what its shapes tell."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from mae_jax.interop import huggingface, timm
from mae_jax.interop.plain import read_json
from mae_jax.interop.preprocessor import done_otherwise, read_preprocessor
from mae_jax.interop.tensors import TensorFile
from mae_jax.interop.torch_layout import State, listed, stacked_shape
from mae_jax.models.classifier import ClassifierConfig
from mae_jax.models.config import SIZES, MAEConfig
from mae_jax.models.positions import sincos_table
from mae_jax.runtime.errors import UserError, first_line
from mae_jax.settings.checks import check_value_range
from mae_jax.settings.fields import from_dict

WRAPPERS = ("module.", "_orig_mod.", "model.", "backbone.", "base_model.")  # put in front of names by other programs
ESSENTIAL = ("cls_token", "patch_embed.proj.weight", "blocks.0.norm1.weight", "blocks.0.mlp.fc1.weight")
DECODER_ESSENTIAL = ("decoder_embed.weight", "decoder_blocks.0.mlp.fc1.weight")
TABLES = {"pos_embed": "width", "decoder_pos_embed": "decoder_width"}
# Names without a counterpart, without which a ViT gives other results: extra tokens, layer scale, qk-norm, ...
CHANGES_RESULTS = re.compile(
    r"(decoder_)?blocks\.|encoder\.|decoder\.|layers\.|patch_embed\.|.*(pre_logits|reg_token|dist_token|distillation|"
    r"register|storage_token|norm_pre|rope|relative_position|attn_pool)"
)
HEADS_OF_WIDTH = {size["width"]: size["num_heads"] for size in SIZES.values()} | {1408: 16, 1664: 16}  # ViT-g, ViT-G
DECODER_HEADS = 16  # of all released autoencoders
PICTURES = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "eval_crop": 0.875}  # ImageNet's
LEAST_STD, LEAST_CROP = 1e-6, 0.01  # below, values overflow, and pictures are made as large as memory
# What a user may say of a file that does not say it.
GUESSABLE = ("num_heads", "decoder_num_heads", "normalize_targets", "norm_epsilon", "activation", "image_size")


class Description:
    """What a file says of its model, as far as it says anything."""

    def __init__(self, path: Path, file: TensorFile):
        tensors = {_unwrapped(name): tensor for name, tensor in file.tensors.items()}
        if len(tensors) < len(file.tensors):
            raise UserError(f"{path} has tensors whose names differ only in a prefix ({', '.join(WRAPPERS)})")
        self.hugging = hugging = huggingface.is_huggingface(tensors)
        self.path, self.notes = path, []
        self.state: State
        self.state = huggingface.to_state(tensors) if hugging else {name: (t,) for name, t in tensors.items()}
        if missing := [name for name in ESSENTIAL if name not in self.state]:
            has = listed(list(self.state)) or "nothing"
            raise UserError(f"{path} holds no ViT and no masked autoencoder: it lacks {listed(missing)}; it has {has}")
        self.has_head = "head.weight" in self.state or "head.1.weight" in self.state
        decoder = [name for name in self.state if name == "mask_token" or name.startswith("decoder_")]
        self.has_decoder = bool(decoder) and not self.has_head
        if self.has_decoder and (missing := [name for name in DECODER_ESSENTIAL if name not in self.state]):
            raise UserError(f"{path} has parts of a decoder, but lacks {listed(missing)}: it is not whole")
        self.usual_epsilon = 1e-12 if hugging else 1e-6  # of the programs that write these files

        folder = path if path.is_dir() else path.parent
        beside, self.pool, self.class_names = _read_json(folder / "config.json"), None, None
        if hugging and beside.get("model_type"):
            self.settings = huggingface.read_settings(beside, str(folder / "config.json"))
            preprocessor = _read_json(folder / "preprocessor_config.json")
            self.data = read_preprocessor(preprocessor)
            self.class_names = huggingface.class_names(beside)
            self.notes += huggingface.unused_settings(beside) + done_otherwise(preprocessor)
        elif not hugging and timm.is_timm(beside):
            self.settings, self.data = timm.read_settings(beside), timm.read_data(beside)
            self.class_names, self.pool = beside.get("label_names"), timm.read_pool(beside)
            self.notes += timm.done_otherwise(beside)
        else:
            self.settings, self.data = _read_arguments(file.others.get("args")), {}
        spelling = "Hugging Face" if hugging else "timm" if timm.is_timm(beside) else "facebookresearch/mae"
        self.origin = f"spelt as by {spelling}"
        own = from_dict(file.others.get("mae_jax") or {})  # what our own export writes into a .pth
        self.settings |= own.get("model", {})
        self.data |= own.get("data", {})
        self.class_names = own.get("class_names") or self.class_names
        step = own.get("step") or beside.get("step")
        self.step = step if type(step) is int and step >= 0 else 0

    def model_config(self, asked: dict[str, Any]) -> MAEConfig:
        """The settings that the file states, else those asked for, else those of the shapes, else the usual ones."""
        size, asked = asked.get("image_size"), {k: v for k, v in asked.items() if k != "image_size"}
        for name, value in asked.items():
            if self.settings.get(name, value) != value:
                raise UserError(f"{name}={value!r} cannot be set: in {self.path} it is {self.settings[name]!r}")
        settings = self._of_shapes() | asked | self.settings
        for stack, name in (("blocks", "depth"), ("decoder_blocks", "decoder_depth"))[: 1 + self.has_decoder]:
            numbers = self._blocks(stack)
            if len(numbers) != settings[name]:
                raise UserError(f"{self.path}: {name} is {settings[name]!r}, but it has {len(numbers)} {stack}")
            if max(numbers) >= len(numbers):
                text = f"{len(numbers)} {stack}, but one of them has the number {max(numbers)}"
                raise UserError(f"{self.path} has {text}")
        self._assume(settings)
        if "image_size" not in settings:
            settings["image_size"] = self._image_size(settings["patch_size"], size)
        self._check_kinds(settings)
        model = MAEConfig(**settings)
        learned = settings.get("positions") == "learned" or not self._tables_are_fixed(model)
        return dataclasses.replace(model, positions="learned" if learned else "sincos")

    def _check_kinds(self, settings: dict[str, Any]) -> None:
        """Raises UserError for a number, or a yes or no, that is something else."""
        kinds = {field.name: field.type for field in dataclasses.fields(MAEConfig)}
        for name, value in settings.items():
            kind = kinds.get(name)
            if kind is bool and type(value) is not bool:
                raise UserError(f"{self.path}: {name}={value!r} is neither true nor false")
            if kind is int and type(value) is not int:
                raise UserError(f"{self.path}: {name}={value!r} is no whole number of 64 bits")
            if kind is float and not is_number(value):
                raise UserError(f"{self.path}: {name}={value!r} is no finite number")

    def _of_shapes(self) -> dict[str, Any]:
        def shape(name: str) -> tuple[int, ...]:
            return stacked_shape(self.state[name])

        kernel = shape("patch_embed.proj.weight")
        if len(kernel) != 4 or kernel[2] != kernel[3]:
            raise UserError(f"{self.path}: patch_embed.proj.weight has shape {kernel}; patches must be square")
        settings = {
            "width": shape("cls_token")[-1],
            "channels": kernel[1],
            "patch_size": kernel[2],
            "depth": len(self._blocks("blocks")),
            "mlp_width": shape("blocks.0.mlp.fc1.weight")[0],
            "qkv_bias": "blocks.0.attn.qkv.bias" in self.state,
        }
        if self.has_decoder:
            settings |= {
                "decoder_width": shape("decoder_embed.weight")[0],
                "decoder_depth": len(self._blocks("decoder_blocks")),
                "decoder_mlp_width": shape("decoder_blocks.0.mlp.fc1.weight")[0],
            }
        return settings

    def _blocks(self, stack: str) -> set[int]:
        """Numbers of the blocks that have tensors."""
        return {int(name.split(".")[1]) for name in self.state if re.match(rf"{stack}\.\d+\.", name)}

    def _assume(self, settings: dict[str, Any]) -> None:
        """Fills in, and notes, what neither file nor user says."""
        assumed = {}
        if "norm_epsilon" not in settings:
            settings["norm_epsilon"] = self.usual_epsilon
            if self.usual_epsilon != 1e-6:  # a bare file of Hugging Face's; all others have this one
                assumed["norm_epsilon"] = self.usual_epsilon
        if "num_heads" not in settings:
            heads, rest = divmod(settings["width"], 64)
            assumed["num_heads"] = HEADS_OF_WIDTH.get(settings["width"], 0 if rest else heads)
        if self.has_decoder and "decoder_num_heads" not in settings:
            assumed["decoder_num_heads"] = DECODER_HEADS
        if self.has_decoder and "normalize_targets" not in settings:
            # The released files with "visualize" in their names predict plain pixels, the others normalised ones.
            assumed["normalize_targets"] = "visualize" not in self.path.name
        for name, width in (("num_heads", "width"), ("decoder_num_heads", "decoder_width")):
            heads = assumed.get(name)
            if heads is not None and (heads < 1 or settings[width] % heads):
                raise UserError(
                    f"{self.path} does not say its {name}, and {width} {settings[width]} is no usual one: say it, "
                    f"by mae_jax.load(path, {name}=...) or --config.assume.{name}=..."
                )
        settings |= assumed
        if assumed:
            text = ", ".join(f"{name}={value}" for name, value in assumed.items())
            self.notes.append(f"{text} assumed, since the file does not say it")

    def _image_size(self, patch_size: int, asked: int | tuple[int, int] | None) -> int | tuple[int, int]:
        """The size that the table of positions is of: that asked for if it has as many patches, else a square."""
        if "pos_embed" not in self.state:
            raise UserError(f"{self.path} lacks pos_embed, its table of positions: it is not whole")
        patches = stacked_shape(self.state["pos_embed"])[-2] - 1
        side = math.isqrt(patches)
        square = side * side == patches
        table = self.state["pos_embed"][0].read()[0]
        if asked is not None and not (square and _is_formula(table, (side, side))):
            height, width = (asked, asked) if isinstance(asked, int) else asked
            if (height // patch_size) * (width // patch_size) == patches:
                if square:
                    self.notes.append(f"its positions are taken to be of {height} x {width} images")
                return asked
        if not square:
            raise UserError(
                f"{self.path} has positions for {patches} patches, which make no square: "
                "say the size of its images, by mae_jax.load(path, image_size=(height, width)) or "
                "--config.assume.image_size='(height,width)'"
            )
        return side * patch_size

    def _tables_are_fixed(self, model: MAEConfig) -> bool:
        """Whether the file's tables are the formula's, to the last bit of their precision."""
        for name, width in TABLES.items():
            if name == "decoder_pos_embed" and not self.has_decoder:
                continue
            if name not in self.state:
                raise UserError(f"{self.path} lacks {name}, its table of positions: it is not whole")
            shape, expected = stacked_shape(self.state[name]), (1, 1 + model.num_patches, getattr(model, width))
            if shape != expected:
                raise UserError(f"{self.path}: {name} has shape {shape}, but the model's settings make it {expected}")
            if not _is_formula(self.state[name][0].read()[0], model.grid):
                return False
        return True

    def classifier_config(self, model: MAEConfig) -> ClassifierConfig:
        """Of a file with a head."""
        batch_norm = "head.1.weight" in self.state
        pool = "mean_norm" if "fc_norm.weight" in self.state else self.pool or "class"
        weight = self.state["head.1.weight" if batch_norm else "head.weight"]
        return ClassifierConfig(model, stacked_shape(weight)[0], pool, batch_norm=batch_norm)

    def data_settings(self, channels: int) -> dict[str, Any]:
        """The settings of `data.*` that the file states or that are usual; which pictures it does not say."""
        usual = PICTURES if channels == 3 else PICTURES | {"mean": (0.5,), "std": (0.5,)}
        if "mean" not in self.data and channels != 3:
            self.notes.append("mean and std of its pictures are not in it: both are taken as 0.5")
        elif "mean" not in self.data and self.hugging:  # facebookresearch's are ImageNet's
            self.notes.append("mean and std of its pictures are not in it: ImageNet's are taken")
        data = {"name": None} | usual | self.data
        for name in ("mean", "std"):
            values = data[name]
            if len(values) not in (1, channels) or not all(is_number(value) for value in values):
                text = f"{name}={values!r} must be one number, or one for each of {channels} channels"
                raise UserError(f"{self.path}: {text}")
        std, crop = data["std"], data["eval_crop"]
        if min(std) < LEAST_STD or not (is_number(crop) and LEAST_CROP <= crop <= 1):
            raise UserError(
                f"{self.path}: std={std} must be above {LEAST_STD}, and crop_pct={crop!r} from {LEAST_CROP} to 1"
            )
        check_value_range(data.get("value_range"))
        return data

    def left_over(self, used: set[str]) -> list[str]:
        """A note on tensors that no parameter takes.

        Raises:
          UserError: for tensors without which the model would give other results.
        """
        left = sorted(name for name in set(self.state) - used if not name.endswith("num_batches_tracked"))
        unused_decoder = "decoder" if self.has_head else "-"  # a classifier computes without it
        if serious := [name for name in left if CHANGES_RESULTS.match(name) and not name.startswith(unused_decoder)]:
            raise UserError(f"{self.path} is not a plain ViT: {listed(serious)} have no place in this model")
        return [f"left over: {', '.join(left)}"] if left else []


def is_number(value: Any) -> bool:
    """Whether a value is a number that float32 holds, and no truth value."""
    return type(value) in (int, float) and abs(value) < 3e38


def _is_formula(table: np.ndarray, grid: tuple[int, int]) -> bool:
    """Whether a table [1 + L, D] is the sine-cosine table, to the last bit of its own precision."""
    return table.shape[1] % 4 == 0 and np.array_equal(table, sincos_table(grid, table.shape[1]).astype(table.dtype))


def _unwrapped(name: str) -> str:
    while wrapper := next((wrapper for wrapper in WRAPPERS if name.startswith(wrapper)), None):
        name = name.removeprefix(wrapper)
    return name


def _read_json(path: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing if there is no file."""
    if not path.is_file():
        return {}
    try:
        return read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON ({first_line(error)}); download it again") from error


def _read_arguments(arguments: Any) -> dict[str, Any]:
    """Settings that the arguments of facebookresearch's programs state, if the file has kept them."""
    arguments = arguments if isinstance(arguments, dict) else {}
    settings = timm.heads_of_name(str(arguments.get("model", "")))
    names = {
        "normalize_targets": ("norm_pix_loss", bool), "mask_ratio": ("mask_ratio", float),
        "image_size": ("input_size", int),
    }  # fmt: skip
    return settings | {
        ours: arguments[name] for ours, (name, kind) in names.items() if type(arguments.get(name)) is kind
    }
