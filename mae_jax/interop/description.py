"""What another program's file says about its model and its pictures, apart from the tensors."""

import dataclasses
from pathlib import Path
from typing import Any

from mae_jax.data.processor import Processor
from mae_jax.interop import huggingface, timm
from mae_jax.interop.preprocessor import read_preprocessor
from mae_jax.interop.tensors import Tensor, plain, read_json
from mae_jax.models.config import MAEConfig
from mae_jax.runtime.errors import UserError
from mae_jax.settings.fields import from_dict

PICTURES = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "eval_crop": 0.875}  # ImageNet's
LEAST_STD = 1e-6  # below this, values overflow
MOST_STEPS = 2**63
# Ours -> facebookresearch's arguments, and their type.
ARGUMENTS = {
    "normalize_targets": ("norm_pix_loss", bool),
    "mask_ratio": ("mask_ratio", float),
    "image_size": ("input_size", int),
}

State = dict[str, Tensor]  # by facebookresearch's names


@dataclasses.dataclass
class Description:
    state: State
    origin: str  # for people
    is_huggingface: bool = False
    norm_epsilon: float = 1e-6  # the writing program's, if `model` does not say
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
    """Reads what tensors, the JSON files in their folder, and the rest of a PyTorch file say."""
    config, preprocessor = (
        read_json(folder / name) if (folder / name).is_file() else {}
        for name in ("config.json", "preprocessor_config.json")
    )
    if huggingface.is_huggingface(tensors):
        found = Description(huggingface.to_state(tensors), "spelt as by Hugging Face", norm_epsilon=1e-12)
        found.is_huggingface = True
        if config.get("model_type"):
            found.model = huggingface.read_settings(config)
            found.data, notes = read_preprocessor(preprocessor)
            found.class_names = huggingface.class_names(config)
            found.notes = huggingface.unused_settings(config) + notes
    elif timm.is_timm(config):
        found = Description(tensors, "spelt as by timm", model=timm.read_settings(config), pool=timm.read_pool(config))
        found.data, found.notes = timm.read_data(config)
        found.class_names = config.get("label_names")
    else:
        arguments = plain(others.get("args"))
        found = Description(tensors, "spelt as by facebookresearch/mae")
        found.model = timm.heads_of_name(str(arguments.get("model", "")))
        for ours, (theirs, kind) in ARGUMENTS.items():
            if type(arguments.get(theirs)) is kind:
                found.model[ours] = arguments[theirs]
    own = from_dict(plain(others.get("mae_jax")))  # what our own export writes into a .pth
    found.model |= own.get("model", {})
    found.data |= own.get("data", {})
    found.class_names = own.get("class_names") or found.class_names
    names = found.class_names or ()
    if not (isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)):
        raise TypeError("its class names are not a list of strings")
    step = own.get("step") or config.get("step")
    found.step = step if type(step) is int and 0 <= step < MOST_STEPS else 0
    return found


def data_settings(found: Description, model: MAEConfig) -> dict[str, Any]:
    """The settings `data.*`, without the data set's name: those that a file states, else the usual ones."""
    data = {"name": None, **PICTURES, **({} if model.channels == 3 else {"mean": (0.5,), "std": (0.5,)}), **found.data}
    if "mean" not in found.data and model.channels != 3:
        found.notes.append("mean and std of its pictures are not in it: both are taken as 0.5")
    elif "mean" not in found.data and found.is_huggingface:  # facebookresearch's are ImageNet's
        found.notes.append("mean and std of its pictures are not in it: ImageNet's are taken")
    mean, std, crop = data["mean"], data["std"], data["eval_crop"]
    if not all(map(is_number, (*mean, *std, crop))) or min(std) < LEAST_STD:
        raise UserError(f"mean={mean}, std={std} or crop_pct={crop!r} is not a usable value")
    Processor(model.image_size, model.channels, mean, std, crop, data.get("value_range"))  # refuses what does not fit
    return data


def is_number(value: Any) -> bool:
    """Whether a value is a number, not a bool, that float32 can hold."""
    return type(value) in (int, float) and abs(value) < 3e38
