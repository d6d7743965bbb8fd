"""Hugging Face's names of tensors, its config.json and preprocessor_config.json.

BeitForImageClassification without relative positions and layer scale is a plain ViT with `pool=mean_norm`, which
transformers' ViT lacks.
"""

import math
import re
from typing import Any

import numpy as np

from mae_jax.interop.tensors import Tensor
from mae_jax.interop.workdirs import Weights
from mae_jax.models.classifier import ClassifierConfig, is_classifier
from mae_jax.models.config import MAEConfig
from mae_jax.runtime.errors import UserError

# Ours -> theirs, and transformers' default if config.json lacks the key.
SETTINGS = {
    "image_size": ("image_size", 224),
    "patch_size": ("patch_size", 16),
    "channels": ("num_channels", 3),
    "width": ("hidden_size", 768),
    "depth": ("num_hidden_layers", 12),
    "num_heads": ("num_attention_heads", 12),
    "mlp_width": ("intermediate_size", 3072),
    "activation": ("hidden_act", "gelu"),
    "norm_epsilon": ("layer_norm_eps", 1e-12),
    "qkv_bias": ("qkv_bias", True),
}
AUTOENCODER_SETTINGS = {  # of model_type vit_mae only
    "decoder_width": ("decoder_hidden_size", 512),
    "decoder_depth": ("decoder_num_hidden_layers", 8),
    "decoder_num_heads": ("decoder_num_attention_heads", 16),
    "decoder_mlp_width": ("decoder_intermediate_size", 2048),
    "mask_ratio": ("mask_ratio", 0.75),
    "normalize_targets": ("norm_pix_loss", False),
}
ACTIVATIONS = {  # theirs -> ours, where the names differ
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_accurate": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh", "gelu_python": "gelu", "swish": "silu",
}  # fmt: skip
# Theirs -> facebookresearch's: whole modules between dots. Of two spellings the last, of transformers 4, is written.
NAMES = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layers": "blocks",
    "encoder.layer": "blocks",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.q_proj": "attn.q",
    "attention.k_proj": "attn.k",
    "attention.v_proj": "attn.v",
    "attention.o_proj": "attn.proj",
    "attention.attention.query": "attn.q",
    "attention.attention.key": "attn.k",
    "attention.attention.value": "attn.v",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "layernorm": "norm",
    "decoder.mask_token": "mask_token",
    "decoder.decoder_pos_embed": "decoder_pos_embed",
    "decoder.decoder_embed": "decoder_embed",
    "decoder.decoder_encoder.layer": "decoder_blocks",
    "decoder.decoder_layers": "decoder_blocks",
    "decoder.decoder_norm": "decoder_norm",
    "decoder.decoder_pred": "decoder_pred",
    "classifier": "head",
    "pooler.layernorm": "fc_norm",  # BEiT's
}
BEIT = "BeitForImageClassification"
PROBLEMS = {  # label_kind -> problem_type
    "class": "single_label_classification", "multi": "multi_label_classification", "number": "regression",
}  # fmt: skip
DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob")
BICUBIC = 3  # Pillow's number for the filter


def architecture_of(weights: Weights) -> str:
    """The class of transformers that holds a model."""
    if is_classifier(weights.config):
        pool = weights.config["classifier"]["pool"]
        return BEIT if pool == "mean_norm" else "ViTForImageClassification"
    return "ViTMAEForPreTraining" if "decoder" in weights.params else "ViTModel"


def to_state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors under facebookresearch's names."""
    state, split = {}, {}
    for name, tensor in tensors.items():
        name = _renamed(re.sub(r"^(vit|beit)\.", "", name), NAMES)
        if found := re.fullmatch(r"(\w+\.\d+\.attn\.)([qkv])(\.\w+)", name):
            split.setdefault(f"{found[1]}qkv{found[3]}", {})[found[2]] = tensor
        else:
            state[name] = tensor
    return state | {name: _joined(name, parts) for name, parts in split.items()}


def _renamed(name: str, names: dict[str, str]) -> str:
    pattern = rf"(?<![^.])({'|'.join(map(re.escape, names))})(?![^.])"  # before and after: a dot or nothing
    return re.sub(pattern, lambda found: names[found[0]], name)


def _joined(name: str, parts: dict[str, Tensor]) -> Tensor:
    """Queries, keys and values, concatenated along the first axis."""
    first, shapes = next(iter(parts.values())), [part.shape for part in parts.values()]
    if name.endswith(".bias") and parts.keys() == {"q", "v"}:  # BEiT's keys have none
        parts["k"] = first._replace(read=lambda: np.zeros(first.shape, np.float32))
    if parts.keys() != {"q", "k", "v"}:
        raise UserError(f"{name}: the file has only {', '.join(parts)} of q, k and v; the model needs all or none")
    if len(set(shapes)) > 1:
        raise UserError(f"{name}: query, key and value have the shapes {shapes}; they must have the same")
    shape = (3 * first.shape[0], *first.shape[1:])
    return Tensor(name, shape, lambda: np.concatenate([parts[letter].values() for letter in "qkv"]))


def from_state(state: dict[str, np.ndarray], architecture: str) -> dict[str, np.ndarray]:
    """facebookresearch's arrays under the names that transformers reads for an architecture."""
    ours, tensors = {ours: theirs for theirs, ours in NAMES.items()}, {}
    for name, values in state.items():
        parts = np.split(values, 3) if ".attn.qkv." in name else [values]
        for letter, part in zip("qkv", parts, strict=False):
            tensors[_renamed(name.replace(".qkv.", f".{letter}."), ours)] = part
    prefix = {"ViTModel": "", BEIT: "beit."}.get(architecture, "vit.")
    if architecture == BEIT:  # it has biases of queries and values; those of keys would change nothing
        zeros = np.zeros_like(state["cls_token"][0, 0])
        for name in [name for name in tensors if name.endswith(("attention.query.weight", "attention.value.weight"))]:
            tensors.setdefault(name.replace(".weight", ".bias"), zeros)
        tensors = {name: values for name, values in tensors.items() if not name.endswith("attention.key.bias")}
    outside = ("decoder.", "classifier.")
    return {name if name.startswith(outside) else prefix + name: values for name, values in tensors.items()}


def read_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings `model.*` in a config.json, with transformers' defaults for those that it leaves out."""
    kind = config.get("model_type")
    if kind not in ("vit_mae", "vit", "beit"):
        raise UserError(f"config.json says model_type={kind!r}; autoencoders (vit_mae) and plain ViTs (vit) load")
    known = SETTINGS | (AUTOENCODER_SETTINGS if kind == "vit_mae" else {})
    settings = {ours: config.get(theirs, usual) for ours, (theirs, usual) in known.items()}
    settings["activation"] = ACTIVATIONS.get(settings["activation"], settings["activation"])
    if isinstance(settings["patch_size"], list):
        height, width = settings["patch_size"]
        if height != width:
            raise UserError(f"patch_size {height} x {width}: patches must be square")
        settings["patch_size"] = height
    return settings | ({"qkv_bias": True} if kind == "beit" else {})  # BEiT always has these biases


def make_config(
    model: MAEConfig, architecture: str, class_names: list[str] | None, classifier: ClassifierConfig | None
) -> dict[str, Any]:
    """The config.json from which transformers' `architecture` (ViTMAEForPreTraining, ViTModel, ...) loads a model."""
    autoencoder = architecture.startswith("ViTMAE")
    known = SETTINGS | (AUTOENCODER_SETTINGS if autoencoder else {})
    config = {theirs: getattr(model, ours) for ours, (theirs, _) in known.items()}
    height, width = model.image_size
    config |= {
        "intermediate_size": model.blocks.mlp_width,
        "image_size": height if height == width else [height, width],
        "hidden_act": "gelu_pytorch_tanh" if model.activation == "gelu_tanh" else model.activation,
        "architectures": [architecture],
        "model_type": "vit_mae" if autoencoder else "beit" if architecture == BEIT else "vit",
        "dtype": "float32",
    }
    if architecture == BEIT:  # all that distinguishes it from a ViT is off
        config |= {"use_absolute_position_embeddings": True, "layer_scale_init_value": 0.0, "drop_path_rate": 0.0}
    if autoencoder:
        config["decoder_intermediate_size"] = model.decoder_blocks.mlp_width
    if classifier is not None:
        num_classes = classifier.num_classes
        named = class_names and len(class_names) == num_classes
        labels = class_names if named else [f"LABEL_{n}" for n in range(num_classes)]
        config["id2label"] = {str(n): name for n, name in enumerate(labels)}
        config["label2id"] = {name: n for n, name in enumerate(labels)}
        config["problem_type"] = PROBLEMS[classifier.label_kind]
    return config


def label_kind(config: dict[str, Any]) -> str:
    """The kind of the labels of a classifier's config.json; class if it leaves that open."""
    kinds = {problem: kind for kind, problem in PROBLEMS.items()}
    return kinds.get(config.get("problem_type"), "class")


def class_names(config: dict[str, Any]) -> list[str] | None:
    """Class names in a config.json; None if there are only transformers' LABEL_0, LABEL_1, ..."""
    labels = {int(number): name for number, name in (config.get("id2label") or {}).items()}
    names = [labels[number] for number in sorted(labels)]
    return None if all(re.fullmatch(r"LABEL_\d+", name) for name in names) else names


def read_preprocessor(preprocessor: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The settings `data.*` in a preprocessor_config.json, and notes on what is done differently here."""
    names = {"mean": "image_mean", "std": "image_std"}
    stated = {ours: preprocessor[theirs] for ours, theirs in names.items() if preprocessor.get(theirs) is not None}
    data = {name: tuple(np.atleast_1d(values).tolist()) for name, values in stated.items()}
    if not preprocessor.get("do_normalize", True):
        data = {"mean": (0.0,), "std": (1.0,)}
    scale = preprocessor.get("rescale_factor", 1 / 255) if preprocessor.get("do_rescale", True) else 1.0
    if not 0 < scale < math.inf:
        raise ValueError(f"rescale_factor={scale!r}")
    if not math.isclose(scale, 1 / 255, rel_tol=1e-3):  # here, pictures are on 0..1 before mean and std
        ratio = 1 / 255 / scale
        data = {name: tuple(value * ratio for value in values) for name, values in data.items()}

    size, kept, filter = (preprocessor.get(name) for name in ("size", "crop_size", "resample"))
    crops = preprocessor.get("crop_pct") or preprocessor.get("do_center_crop", "crop_size" in preprocessor)
    resized, kept = _shorter_side(size), _shorter_side(kept)
    if preprocessor.get("crop_pct"):  # timm's name, which our exports use too
        data["eval_crop"] = preprocessor["crop_pct"]
    elif preprocessor:
        data["eval_crop"] = min(1.0, kept / resized) if resized and kept and crops else 1.0
    notes = []
    if size and not crops and not (isinstance(size, dict) and "shortest_edge" in size):
        notes.append("its processor stretches pictures; here they keep their aspect and are cropped to the centre")
    if filter not in (None, BICUBIC):
        notes.append(f"its processor resizes with resample={filter!r}; here by Pillow's bicubic filter")
    return data, notes


def _shorter_side(size: int | list | dict[str, int] | None) -> int | None:
    if isinstance(size, dict):
        size = [size[name] for name in ("shortest_edge", "height", "width") if size.get(name)]
    return min(size, default=None) if isinstance(size, list) else size


def make_preprocessor(model: MAEConfig, data: dict[str, Any]) -> dict[str, Any]:
    """The preprocessor_config.json with which transformers makes our pixels, from the settings `data.*`.

    BitImageProcessor cannot cover a rectangle: oblong images get the size before the crop, which stretches pictures.
    """
    height, width = model.image_size
    resized = {name: round(side / data["eval_crop"]) for name, side in (("height", height), ("width", width))}
    mean, std = (values * model.channels if len(values) == 1 else values for values in (data["mean"], data["std"]))
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": model.channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": resized["height"]} if height == width else resized,
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": data.get("value_range") is not None or data.get("dtype") in ("uint8", None),
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
        "crop_pct": data["eval_crop"],  # not read by transformers: the sizes above are rounded
    }


def left_unsaid(model: MAEConfig) -> list[str]:
    """Notes on how transformers' processor differs, which its file cannot express."""
    (height, width), notes = model.image_size, []
    if height != width:
        notes.append(f"transformers' processor stretches pictures whose aspect is not that of {height} x {width}")
    if model.channels == 1:
        notes.append("transformers' processor does not turn colours into grey: give it grey pictures")
    elif model.channels != 3:
        notes.append(f"transformers' processor takes grey and RGB pictures, none of {model.channels} channels")
    return notes
