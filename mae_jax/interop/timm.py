"""timm's Vision Transformers: the config.json beside their tensors, whose names are facebookresearch's."""

import re
from typing import Any

from mae_jax.models.classifier import ClassifierConfig
from mae_jax.models.config import SIZES, MAEConfig
from mae_jax.runtime.errors import UserError

# Ours -> the argument of timm's VisionTransformer.
ARGUMENTS = {
    "image_size": "img_size",
    "patch_size": "patch_size",
    "channels": "in_chans",
    "width": "embed_dim",
    "depth": "depth",
    "num_heads": "num_heads",
    "qkv_bias": "qkv_bias",
}
EPSILON = 1e-6  # of its norms
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_tanh", "relu": "relu", "silu": "silu", "quick_gelu": "quick_gelu"}


def is_timm(config: dict[str, Any]) -> bool:
    """Whether a config.json is timm's."""
    return "architecture" in config and ("pretrained_cfg" in config or "num_features" in config)


def read_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Settings of `model.*` that timm's config.json states; shapes of the tensors tell the others."""
    arguments = config.get("model_args") or {}
    settings = heads_of_name(config["architecture"])
    size = (config.get("pretrained_cfg") or {}).get("input_size")
    if size:
        settings["image_size"] = size[1:]
    settings |= {ours: arguments[theirs] for ours, theirs in ARGUMENTS.items() if theirs in arguments}
    if isinstance(settings.get("image_size"), list):
        settings["image_size"] = tuple(settings["image_size"])
    if "act_layer" in arguments:
        settings["activation"] = next(
            (ours for ours, theirs in ACTIVATIONS.items() if theirs == arguments["act_layer"]), arguments["act_layer"]
        )
    return settings


def read_data(config: dict[str, Any]) -> dict[str, Any]:
    """Settings of `data.*` that timm's config.json states."""
    pretrained = config.get("pretrained_cfg") or {}
    names = {"mean": "mean", "std": "std", "eval_crop": "crop_pct"}
    data = {ours: pretrained[theirs] for ours, theirs in names.items() if pretrained.get(theirs) is not None}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}


def done_otherwise(config: dict[str, Any]) -> list[str]:
    """Notes on how timm's config.json prepares pictures otherwise than is done here."""
    pretrained, usual = config.get("pretrained_cfg") or {}, {"interpolation": "bicubic", "crop_mode": "center"}
    differing = [f"{name}={pretrained[name]!r}" for name in usual if pretrained.get(name, usual[name]) != usual[name]]
    return [f"{' and '.join(differing)} of its pictures: here bicubic, and the centre"] if differing else []


def heads_of_name(name: str) -> dict[str, int]:
    """The setting num_heads that a model's name states, such as vit_base_patch16_224 or mae_vit_large_patch16."""
    size = re.match(r"(?:mae_)?vit_(\w+?)_patch\d+", name)
    return {"num_heads": SIZES[size[1]]["num_heads"]} if size and size[1] in SIZES else {}


def read_pool(config: dict[str, Any]) -> str:
    """What the head sees, as classifier.pool has it; a norm of its own (mean_norm) shows in the tensors."""
    pool = (config.get("model_args") or {}).get("global_pool") or config.get("global_pool") or "token"
    if pool not in ("token", "avg"):
        raise UserError(f"timm's global_pool={pool!r} has no counterpart here (token and avg have)")
    return "class" if pool == "token" else "mean"


def check(model: MAEConfig) -> list[str]:
    """Notes on what of a model timm's VisionTransformer has otherwise.

    Raises:
      UserError: for what makes another model of it.
    """
    if model.activation not in ACTIVATIONS:
        raise UserError(f"timm has no activation {model.activation}; export format=huggingface or facebook")
    if model.norm_epsilon > 1e-5:
        raise UserError(
            f"timm's norms have epsilon {EPSILON:g}, the model's {model.norm_epsilon:g}, which makes another model of "
            "it; export format=huggingface or facebook"
        )
    if model.norm_epsilon == EPSILON:
        return []
    return [f"timm's norms have epsilon {EPSILON:g}, not {model.norm_epsilon:g}: its results differ by about 1e-4"]


def left_unsaid(model: MAEConfig) -> list[str]:
    """Notes on how timm prepares pictures otherwise than we do."""
    height, width = model.image_size
    return [] if height == width else ["timm rounds the sizes of pictures differently: they may be a pixel off"]


def crop_share(image_size: tuple[int, int], eval_crop: float) -> float:
    """The crop_pct of square images with which timm, which rounds side / crop_pct down, resizes to our size."""
    height, width = image_size
    resized = round(height / eval_crop)
    if height != width or int(height / eval_crop) == resized:
        return eval_crop
    return height / (resized + 0.25)  # which we round back


def make_config(
    model: MAEConfig, classifier: ClassifierConfig | None, data: dict[str, Any], class_names: list[str] | None
) -> dict[str, Any]:
    """The config.json that `timm.create_model("local-dir:FOLDER")` builds the model from."""
    pool = {None: "token", "class": "token", "mean": "avg", "mean_norm": "avg"}[classifier and classifier.pool]
    classes = classifier.num_classes if classifier else 0
    arguments = {theirs: getattr(model, ours) for ours, theirs in ARGUMENTS.items()}
    arguments |= {
        "img_size": list(model.image_size),
        "mlp_ratio": _ratio(model.width, model.blocks.mlp_width),
        "act_layer": ACTIVATIONS[model.activation],
        "global_pool": pool,
        "fc_norm": bool(classifier and classifier.pool == "mean_norm"),
    }
    config = {
        "architecture": _architecture(model),
        "num_classes": classes,
        "num_features": model.width,
        "global_pool": pool,
        "model_args": arguments,
        "pretrained_cfg": {
            "num_classes": classes,
            "input_size": [model.channels, *model.image_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_mode": "center",
            "crop_pct": crop_share(model.image_size, data["eval_crop"]),
            "mean": list(data["mean"]),
            "std": list(data["std"]),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    return config | ({"label_names": list(class_names)} if class_names and classes == len(class_names) else {})


def _ratio(width: int, mlp_width: int) -> float:
    """The ratio from which int(width * ratio) is the hidden width."""
    ratio = mlp_width / width
    return ratio if int(width * ratio) == mlp_width else (mlp_width + 0.5) / width


def _architecture(model: MAEConfig) -> str:
    """timm's name of the nearest architecture; model_args say in what ours differs."""
    for name, size in SIZES.items():
        if model.width == size["width"] and model.depth == size["depth"] and model.patch_size == size["patch_size"]:
            return f"vit_{name}_patch{model.patch_size}_224"
    return "vit_base_patch16_224"
