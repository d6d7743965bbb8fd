"""Models in files of other programs: facebookresearch/mae, Hugging Face and timm. The content tells which one wrote it.

Notes list what is assumed, missing or left over. What would change the model's results is refused.
"""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from mae_jax.data.files import first_few
from mae_jax.data.processor import Processor
from mae_jax.interop import huggingface, timm
from mae_jax.interop.tensors import Tensor, plain, read_json, read_tensors
from mae_jax.interop.torch_layout import read_params, their_names
from mae_jax.interop.workdirs import Weights
from mae_jax.models.classifier import LABEL_FACTS, ClassifierConfig, abstract_variables
from mae_jax.models.config import SIZES, MAEConfig
from mae_jax.models.mae import abstract_params
from mae_jax.models.positions import sincos_table
from mae_jax.runtime.errors import UserError, first_line
from mae_jax.settings.fields import from_dict

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pth", "*.pt")
WRAPPERS = re.compile(r"^((module|_orig_mod|model|backbone|base_model)\.)+")  # added to names by other programs
STACKS = (("blocks", "depth"), ("decoder_blocks", "decoder_depth"))
TABLES = (("pos_embed", "width"), ("decoder_pos_embed", "decoder_width"))
# Tensors without a counterpart that change a ViT's results: extra tokens, layer scale, qk-norm, ...
CHANGES_RESULTS = re.compile(
    r"(decoder_)?blocks\.|encoder\.|decoder\.|layers\.|patch_embed\.|.*(pre_logits|reg_token|dist_token|distillation|"
    r"register|storage_token|norm_pre|rope|relative_position|attn_pool)"
)
HEADS_OF_WIDTH = {size["width"]: size["num_heads"] for size in SIZES.values()} | {1408: 16, 1664: 16}  # ViT-g, ViT-G
DECODER_HEADS = 16  # of all released autoencoders
# Settings that the user may give if a file does not state them.
GUESSABLE = ("num_heads", "decoder_num_heads", "normalize_targets", "norm_epsilon", "activation", "image_size")
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "eval_crop": 0.875}
LEAST_STD = 1e-6  # below this, values overflow
# Ours -> facebookresearch's arguments, and their type.
ARGUMENTS = {
    "normalize_targets": ("norm_pix_loss", bool),
    "mask_ratio": ("mask_ratio", float),
    "image_size": ("input_size", int),
}


class State(dict[str, Tensor]):
    """A file's tensors by facebookresearch's names. A missing one is the user's mistake."""

    def __missing__(self, name: str):
        has = first_few(list(self)) or "nothing"
        raise UserError(f"it has no complete ViT or masked autoencoder: it lacks {name}; it has {has}")


@dataclasses.dataclass
class Description:
    """What a file says about its model and its pictures."""

    state: State
    origin: str  # for people
    norm_epsilon: float = 1e-6  # the writing program's, if `model` does not say; another one only of Hugging Face's
    model: dict[str, Any] = dataclasses.field(default_factory=dict)  # settings `model.*`
    data: dict[str, Any] = dataclasses.field(default_factory=dict)  # settings `data.*`
    pool: str = "class"
    class_names: list[str] | None = None
    label_kind: str = "class"
    notes: list[str] = dataclasses.field(default_factory=list)
    step: int = 0

    @property
    def has_head(self) -> bool:
        return "head.weight" in self.state or "head.1.weight" in self.state

    @property
    def has_decoder(self) -> bool:
        parts = (name for name in self.state if name == "mask_token" or name.startswith("decoder_"))
        return not self.has_head and any(parts)


def is_foreign(path: Path) -> bool:
    """Whether a path is a file, or a folder with weights of other programs."""
    own = (path / "params").is_dir() or (path / "checkpoints").is_dir()
    return path.is_file() or not own and any(next(path.glob(pattern), None) for pattern in WEIGHT_FILES)


def read_foreign(path: Path, asked: dict[str, Any] | None = None) -> Weights:
    """Reads a file or folder; `asked` gives settings that it does not state (`GUESSABLE`). UserError if unusable."""
    tensors, others = read_tensors(path)
    try:  # the files may hold anything, of any type
        found = _describe(path if path.is_dir() else path.parent, tensors, others)
        return _read(found, asked or {}, path.name)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        text = f"or a JSON file beside it, has an unknown form ({first_line(error)})"
        raise UserError(f"{path}, {text}") from error


def _describe(folder: Path, tensors: dict[str, Tensor], others: dict[str, Any]) -> Description:
    """What tensors, the JSON files in their folder, and the rest of a PyTorch file say."""
    state = State((WRAPPERS.sub("", name), tensor) for name, tensor in tensors.items())
    if len(state) < len(tensors):
        raise UserError(f"it has tensors whose names differ only in a prefix ({WRAPPERS.pattern})")
    files = (folder / "config.json", folder / "preprocessor_config.json")
    config, preprocessor = (read_json(file) if file.is_file() else {} for file in files)
    if any("embeddings.patch_embeddings.projection" in name for name in state):
        found = Description(State(huggingface.to_state(state)), "spelt as by Hugging Face", norm_epsilon=1e-12)
        if config.get("model_type"):
            found.model = huggingface.read_settings(config)
            found.data, notes = huggingface.read_preprocessor(preprocessor)
            found.class_names, found.label_kind = huggingface.class_names(config), huggingface.label_kind(config)
            drops = [name for name in huggingface.DROPOUT if config.get(name)]
            found.notes = [f"{name}={config[name]!r} is not used: there is no dropout here" for name in drops]
            found.notes += notes
    elif "architecture" in config and ("pretrained_cfg" in config or "num_features" in config):
        data, notes = timm.read_data(config)
        model, pool, names = timm.read_settings(config), timm.read_pool(config), config.get("label_names")
        kind = config.get("label_kind", "class")
        found = Description(state, "spelt as by timm", 1e-6, model, data, pool, names, kind, notes)
    else:
        arguments = plain(others.get("args"))
        found = Description(state, "spelt as by facebookresearch/mae")
        found.model = timm.heads_of_name(str(arguments.get("model", "")))
        for ours, (theirs, kind) in ARGUMENTS.items():
            if type(arguments.get(theirs)) is kind:
                found.model[ours] = arguments[theirs]
    own = from_dict(plain(others.get("mae_jax") or config.get("mae_jax")))  # what our own export adds
    found.model |= own.get("model", {})
    found.data |= own.get("data", {})
    found.class_names = names = own.get("class_names") or found.class_names
    if names and not (isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)):
        raise TypeError("its class names are not a list of strings")
    found.label_kind = own.get("label_kind", found.label_kind)
    if found.label_kind not in huggingface.PROBLEMS:
        raise ValueError(f"label_kind={found.label_kind!r}")
    step = own.get("step") or config.get("step")
    found.step = step if type(step) is int and 0 <= step < 2**63 else 0
    return found


def _read(found: Description, asked: dict[str, Any], file_name: str) -> Weights:
    model = _model_config(found, asked, file_name)
    settings = dataclasses.asdict(model)
    for name, width in (("mlp_width", model.width), ("decoder_mlp_width", model.decoder_width)):
        if settings[name] == int(model.mlp_ratio * width):
            settings[name] = None  # it follows from mlp_ratio
    config = {"task": "pretrain", "seed": 0, "model": settings, "data": _data_settings(found, model)}
    if found.has_head:
        batch_norm, names = "head.1.weight" in found.state, found.class_names
        classes = found.state["head.1.weight" if batch_norm else "head.weight"].shape[0]
        pool = "mean_norm" if "fc_norm.weight" in found.state else found.pool
        kind = "number" if classes == 1 else found.label_kind  # as transformers takes it
        classifier = ClassifierConfig(model, classes, pool, batch_norm=batch_norm, label_kind=kind)
        shapes = abstract_variables(classifier)
        config["class_names"] = names if names and len(names) == classifier.num_classes else None
        config["task"] = "classify"
        config["label_kind"] = kind
        others = ("encoder", *LABEL_FACTS)
        config["classifier"] = {k: v for k, v in dataclasses.asdict(classifier).items() if k not in others}
    else:
        classifier, shapes = None, abstract_params(model, decoder=found.has_decoder)
        if not found.has_decoder:
            found.notes.append("no decoder in it: it can encode, not reconstruct")
    found.notes += _left_over(found, {name for _, names in their_names(shapes, classifier) for name in names})
    params = read_params(found.state, shapes, classifier, model.patch_size)
    return Weights(config, params, found.step, found.origin, tuple(found.notes))


def _data_settings(found: Description, model: MAEConfig) -> dict[str, Any]:
    usual = {} if model.channels == 3 else {"mean": (0.5,), "std": (0.5,)}
    data = {"name": None, **IMAGENET, **usual, **found.data}
    if "mean" not in found.data and (usual or found.norm_epsilon != 1e-6):  # facebookresearch's are ImageNet's
        taken = "both are taken as 0.5" if usual else "ImageNet's are taken"
        found.notes.append(f"mean and std of its pictures are not in it: {taken}")
    mean, std, crop = data["mean"], data["std"], data["eval_crop"]
    if not all(map(_is_number, (*mean, *std, crop))) or min(std) < LEAST_STD:
        raise UserError(f"mean={mean}, std={std} or crop_pct={crop!r} is not a usable value")
    values = (data.get(name) for name in ("value_range", "dtype", "bands"))
    Processor(model.image_size, model.channels, mean, std, crop, *values)  # refuses what does not fit
    return data


def _is_number(value: Any) -> bool:
    """Whether a value is a number, not a bool, that float32 can hold."""
    return type(value) in (int, float) and abs(value) < 3e38


def _model_config(found: Description, asked: dict[str, Any], file_name: str) -> MAEConfig:
    """Settings come from the file, else from the user, else from the shapes, else they are the usual ones."""
    size, asked = asked.get("image_size"), {k: v for k, v in asked.items() if k != "image_size"}
    for name, value in asked.items():
        if found.model.get(name, value) != value:
            raise UserError(f"{name}={value!r} cannot be set: it is {found.model[name]!r} in the file")
    settings = _settings_of_shapes(found) | asked | found.model
    for stack, name in STACKS[: 1 + found.has_decoder]:
        numbers = {int(tensor.split(".")[1]) for tensor in found.state if re.match(rf"{stack}\.\d+\.", tensor)}
        if settings.setdefault(name, len(numbers)) != len(numbers) or max(numbers) >= len(numbers):
            text = f"it has {len(numbers)} {stack}, up to number {max(numbers)}"
            raise UserError(f"{name} is {settings[name]!r}, but {text}")
    _assume(settings, found, file_name)
    if "image_size" not in settings:
        settings["image_size"] = _image_size(found, settings["patch_size"], size)
    for field in dataclasses.fields(MAEConfig):
        value = settings.get(field.name, field.default)
        right = _is_number(value) if field.type is float else field.type not in (bool, int) or type(value) is field.type
        if not right:
            raise UserError(f"{field.name}={value!r} is no {field.type.__name__}")
    model = MAEConfig(**settings)
    learned = settings.get("positions") == "learned" or not _tables_are_fixed(found, model)
    return dataclasses.replace(model, positions="learned" if learned else "sincos")


def _settings_of_shapes(found: Description) -> dict[str, Any]:
    state = found.state
    width, kernel = state["cls_token"].shape[-1], state["patch_embed.proj.weight"].shape
    if len(kernel) != 4 or kernel[2] != kernel[3]:
        raise UserError(f"patch_embed.proj.weight has shape {kernel}; patches must be square")
    settings = {
        "width": width,
        "channels": kernel[1],
        "patch_size": kernel[2],
        "mlp_width": state["blocks.0.mlp.fc1.weight"].shape[0],
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
    }
    if found.has_decoder:
        settings["decoder_width"] = state["decoder_embed.weight"].shape[0]
        settings["decoder_mlp_width"] = state["decoder_blocks.0.mlp.fc1.weight"].shape[0]
    return settings


def _assume(settings: dict[str, Any], found: Description, file_name: str) -> None:
    """Fills in, and notes, what neither the file nor the user says."""
    width = settings["width"]
    usual = {"num_heads": HEADS_OF_WIDTH.get(width, 0 if width % 64 else width // 64)}
    if found.has_decoder:
        # Released files with "visualize" in their names predict plain pixels, all others normalised ones.
        usual |= {"decoder_num_heads": DECODER_HEADS, "normalize_targets": "visualize" not in file_name}
    if found.norm_epsilon == MAEConfig.norm_epsilon:  # the usual one, which needs no note
        settings.setdefault("norm_epsilon", found.norm_epsilon)
    assumed = {k: v for k, v in ({"norm_epsilon": found.norm_epsilon} | usual).items() if k not in settings}
    for name, width in (("num_heads", "width"), ("decoder_num_heads", "decoder_width")):
        if name in assumed and (assumed[name] < 1 or settings[width] % assumed[name]):
            raise UserError(
                f"it does not say its {name}, and {width} {settings[width]} is no usual one: give it "
                f"with mae_jax.load(path, {name}=...) or --config.assume.{name}=..."
            )
    settings |= assumed
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
            return asked
    if not square:
        raise UserError(
            f"it has positions for {patches} patches, which do not form a square: give the image size by "
            "mae_jax.load(path, image_size=(height, width)) or --config.assume.image_size='(height,width)'"
        )
    return side * patch_size


def _tables_are_fixed(found: Description, model: MAEConfig) -> bool:
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
    state = found.state
    left = sorted(state.keys() - used - {name for name, _ in TABLES})
    left = [name for name in left if not name.endswith("num_batches_tracked")]
    unused_decoder = "decoder" if found.has_head else "-"  # a classifier does not use it
    if serious := [name for name in left if CHANGES_RESULTS.match(name) and not name.startswith(unused_decoder)]:
        serious = first_few([state[name].name for name in serious])  # as in the file
        raise UserError(f"it is not a plain ViT: {serious} have no place in this model")
    return [f"left over: {', '.join(left)}"] if left else []
