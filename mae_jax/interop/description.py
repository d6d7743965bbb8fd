"""What a file of another program says of its model and its pictures, outside of its tensors."""

import dataclasses
from pathlib import Path
from typing import Any

from mae_jax.interop import huggingface, timm
from mae_jax.interop.preprocessor import read_preprocessor
from mae_jax.interop.tensors import Tensor, plain, read_json
from mae_jax.runtime.errors import UserError
from mae_jax.settings.checks import check_value_range
from mae_jax.settings.fields import from_dict

PICTURES = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "eval_crop": 0.875}  # ImageNet's
LEAST_STD, LEAST_CROP = 1e-6, 0.01  # below, values overflow, and pictures are made as large as memory
MOST_STEPS = 2**63
# facebookresearch's arguments: ours -> theirs, and their type.
ARGUMENTS = {
    "normalize_targets": ("norm_pix_loss", bool),
    "mask_ratio": ("mask_ratio", float),
    "image_size": ("input_size", int),
}


State = dict[str, Tensor]  # by facebookresearch's names


@dataclasses.dataclass
class Description:
    """What a file says of its model."""

    state: State
    origin: str  # for people
    is_huggingface: bool = False
    norm_epsilon: float = 1e-6  # of the program that wrote it, if `model` does not say
    model: dict[str, Any] = dataclasses.field(default_factory=dict)  # settings `model.*`
    data: dict[str, Any] = dataclasses.field(default_factory=dict)  # settings `data.*`
    pool: str = "class"
    class_names: list[str] | None = None
    step: int = 0
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def has_head(self) -> bool:
        return "head.weight" in self.state or "head.1.weight" in self.state

    @property
    def has_decoder(self) -> bool:
        parts = (name for name in self.state if name == "mask_token" or name.startswith("decoder_"))
        return not self.has_head and any(parts)


def describe(folder: Path, tensors: State, others: dict[str, Any]) -> Description:
    """What tensors, the JSON files in their folder, and the rest of a PyTorch file say."""
    config = _read_json(folder / "config.json")
    if huggingface.is_huggingface(tensors):
        state = huggingface.to_state(tensors)
        found = Description(state, "spelt as by Hugging Face", is_huggingface=True, norm_epsilon=1e-12)
        if config.get("model_type"):
            preprocessor = _read_json(folder / "preprocessor_config.json")
            found.model = huggingface.read_settings(config, str(folder / "config.json"))
            found.data, notes = read_preprocessor(preprocessor)
            found.class_names = huggingface.class_names(config)
            found.notes = huggingface.unused_settings(config) + notes
    elif timm.is_timm(config):
        data, notes = timm.read_data(config)
        found = Description(tensors, "spelt as by timm", model=timm.read_settings(config), data=data, notes=notes)
        found.pool, found.class_names = timm.read_pool(config), config.get("label_names")
    else:
        found = Description(tensors, "spelt as by facebookresearch/mae")
        found.model = _read_arguments(plain(others.get("args")))
    own = from_dict(plain(others.get("mae_jax")))  # what our own export writes into a .pth
    found.model |= own.get("model", {})
    found.data |= own.get("data", {})
    found.class_names = own.get("class_names") or found.class_names
    step = own.get("step") or config.get("step")
    found.step = step if type(step) is int and 0 <= step < MOST_STEPS else 0
    names = found.class_names
    if names and not (isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)):
        raise TypeError("its class names are not a list of strings")
    return found


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _read_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    settings = timm.heads_of_name(str(arguments.get("model", "")))
    stated = {ours: arguments[name] for ours, (name, kind) in ARGUMENTS.items() if type(arguments.get(name)) is kind}
    return settings | stated


def data_settings(found: Description, channels: int) -> dict[str, Any]:
    """The settings of `data.*` that a file states or that are usual; which pictures it does not say.

    Raises:
      UserError: for values that no picture survives.
    """
    usual = PICTURES if channels == 3 else PICTURES | {"mean": (0.5,), "std": (0.5,)}
    if "mean" not in found.data and channels != 3:
        found.notes.append("mean and std of its pictures are not in it: both are taken as 0.5")
    elif "mean" not in found.data and found.is_huggingface:  # facebookresearch's are ImageNet's
        found.notes.append("mean and std of its pictures are not in it: ImageNet's are taken")
    data = {"name": None} | usual | found.data
    for name in ("mean", "std"):
        values = data[name]
        if len(values) not in (1, channels) or not all(is_number(value) for value in values):
            raise UserError(f"{name}={values!r} must be one number, or one for each of {channels} channels")
    std, crop = data["std"], data["eval_crop"]
    if min(std) < LEAST_STD or not (is_number(crop) and LEAST_CROP <= crop <= 1):
        raise UserError(f"std={std} must be above {LEAST_STD}, and crop_pct={crop!r} from {LEAST_CROP} to 1")
    check_value_range(data.get("value_range"))
    return data


def is_number(value: Any) -> bool:
    """Whether a value is a number that float32 holds, and no truth value."""
    return type(value) in (int, float) and abs(value) < 3e38
