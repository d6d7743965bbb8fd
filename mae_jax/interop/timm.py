"""timm's Vision Transformers: their config.json. Their tensors have facebookresearch's names."""

import re
from typing import Any

from mae_jax.models.classifier import ClassifierConfig
from mae_jax.models.config import SIZES, MAEConfig
from mae_jax.runtime.errors import UserError
from mae_jax.settings.fields import from_dict

# Ours -> arguments of timm's VisionTransformer.
ARGUMENTS = {
    "image_size": "img_size",
    "patch_size": "patch_size",
    "channels": "in_chans",
    "width": "embed_dim",
    "depth": "depth",
    "num_heads": "num_heads",
    "qkv_bias": "qkv_bias",
    "activation": "act_layer",
}
EPSILON = 1e-6  # of its norms
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "quick_gelu")  # of the same name in both
POOLS = {"class": "token", "mean": "avg", "mean_norm": "avg"}  # the last two differ in `fc_norm`


def read_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings `model.*` in timm's config.json; the shapes of the tensors give the rest."""
    arguments = config.get("model_args") or {}
    size = (config.get("pretrained_cfg") or {}).get("input_size")
    settings = heads_of_name(config["architecture"]) | ({"image_size": size[1:]} if size else {})
    return settings | {ours: arguments[theirs] for ours, theirs in ARGUMENTS.items() if theirs in arguments}


def read_data(config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The settings `data.*` in timm's config.json, and notes on what is done differently here."""
    pretrained = config.get("pretrained_cfg") or {}
    names = {"mean": "mean", "std": "std", "eval_crop": "crop_pct"}
    data = from_dict({ours: pretrained[name] for ours, name in names.items() if pretrained.get(name) is not None})
    usual = {"interpolation": "bicubic", "crop_mode": "center"}
    differing = [f"{name}={pretrained[name]!r}" for name in usual if pretrained.get(name, usual[name]) != usual[name]]
    notes = [f"{' and '.join(differing)} of its pictures: here bicubic, cropped to the centre"] if differing else []
    return data, notes


def heads_of_name(name: str) -> dict[str, int]:
    """num_heads by a model's name, such as vit_base_patch16_224 or mae_vit_large_patch16; empty if unknown."""
    size = re.match(r"(?:mae_)?vit_(\w+?)_patch\d+", name)
    return {"num_heads": SIZES[size[1]]["num_heads"]} if size and size[1] in SIZES else {}


def read_pool(config: dict[str, Any]) -> str:
    """classifier.pool in a config.json; whether it is mean_norm shows only in the tensors."""
    pool = (config.get("model_args") or {}).get("global_pool") or config.get("global_pool") or "token"
    if pool not in ("token", "avg"):
        raise UserError(f"timm's global_pool={pool!r} has no counterpart here (token and avg have)")
    return "class" if pool == "token" else "mean"


def check(model: MAEConfig) -> list[str]:
    """Notes on what differs in timm's VisionTransformer. Raises UserError if it would be another model."""
    remedy = "export format=huggingface or facebook"
    if model.activation not in ACTIVATIONS:
        raise UserError(f"timm has no activation {model.activation}; {remedy}")
    epsilons = f"timm's norms have epsilon {EPSILON:g}, the model's {model.norm_epsilon:g}"
    if model.norm_epsilon > 1e-5:
        raise UserError(f"{epsilons}, which makes another model of it; {remedy}")
    notes = [] if model.norm_epsilon == EPSILON else [f"{epsilons}: its results differ by about 1e-4"]
    height, width = model.image_size
    if height != width:
        notes.append("timm rounds the sizes of pictures differently: they may be a pixel off")
    return notes


def crop_share(image_size: tuple[int, int], eval_crop: float) -> float:
    """The crop_pct of square images with which timm, which rounds side / crop_pct down, resizes to our size."""
    height, width = image_size
    resized = round(height / eval_crop)
    rounded_alike = height != width or int(height / eval_crop) == resized
    return eval_crop if rounded_alike else height / (resized + 0.25)  # we round it to ours


def make_config(
    model: MAEConfig, classifier: ClassifierConfig | None, data: dict[str, Any], class_names: list[str] | None
) -> dict[str, Any]:
    """The config.json that `timm.create_model("local-dir:FOLDER")` builds the model from."""
    pool, classes = (POOLS[classifier.pool], classifier.num_classes) if classifier else ("token", 0)
    heads = {"num_heads": model.num_heads}  # timm's nearest name may have others: model_args say how ours differs
    name = next((name for name, size in SIZES.items() if (size | heads).items() <= vars(model).items()), "base")
    ratio, mlp_width = model.blocks.mlp_width / model.width, model.blocks.mlp_width
    config = {
        "architecture": f"vit_{name}_patch{SIZES[name]['patch_size']}_224",
        "num_classes": classes,
        "num_features": model.width,
        "global_pool": pool,
        "model_args": {theirs: getattr(model, ours) for ours, theirs in ARGUMENTS.items()}
        | {
            "img_size": list(model.image_size),
            # timm rounds width * ratio down.
            "mlp_ratio": ratio if int(model.width * ratio) == mlp_width else (mlp_width + 0.5) / model.width,
            "global_pool": pool,
            "fc_norm": bool(classifier and classifier.pool == "mean_norm"),
        },
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
    if classifier and classifier.label_kind != "class":
        config["label_kind"] = classifier.label_kind  # not read by timm
    return config | ({"label_names": list(class_names)} if class_names and classes == len(class_names) else {})
