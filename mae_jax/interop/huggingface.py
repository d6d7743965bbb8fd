"""Hugging Face's names of tensors, and its config.json.

Reads ViTMAEForPreTraining, ViTMAEModel, ViTModel and ViTForImageClassification of transformers 4 and 5, and
BeitForImageClassification without relative positions and layer scale, which is a plain ViT with `pool=mean_norm`. Such
classifiers are written as BEiT too: transformers' ViT cannot average patch tokens. Names are written as in transformers
4 and on the hub, which both versions read.
"""

import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from mae_jax.interop.tensors import Tensor
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
# transformers 5 -> transformers 4, after the model's own prefix.
OLDER_SPELLING = (
    (r"^layers\.", "encoder.layer."),
    (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
# transformers 4 -> facebookresearch: modules, stacks, and modules in a block.
MODULES = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
    "decoder.mask_token": "mask_token",
    "decoder.decoder_pos_embed": "decoder_pos_embed",
    "decoder.decoder_embed": "decoder_embed",
    "decoder.decoder_norm": "decoder_norm",
    "decoder.decoder_pred": "decoder_pred",
    "classifier": "head",
    "pooler.layernorm": "fc_norm",  # BEiT's
}
BEIT = "BeitForImageClassification"
STACKS = {"encoder.layer": "blocks", "decoder.decoder_layers": "decoder_blocks"}
IN_BLOCK = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.attention.query": "attn.q",
    "attention.attention.key": "attn.k",
    "attention.attention.value": "attn.v",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
NUMBERED = re.compile(r"(.+?)\.(\d+)\.(.+)")  # a tensor in a block of a stack


def is_huggingface(names: Iterable[str]) -> bool:
    return any("embeddings.patch_embeddings.projection" in name for name in names)


def to_state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors under facebookresearch's names; those without a counterpart keep their own."""
    state, split = {}, {}
    for name, tensor in tensors.items():
        name = re.sub(r"^(vit|beit)\.", "", name)
        older = name
        for pattern, replacement in OLDER_SPELLING:
            older = re.sub(pattern, replacement, older)
        name = _translated(older, MODULES, STACKS, IN_BLOCK) or name
        if found := re.fullmatch(r"(\w+\.\d+\.attn\.)([qkv])(\.\w+)", name):
            split.setdefault(f"{found[1]}qkv{found[3]}", {})[found[2]] = tensor
        else:
            state[name] = tensor
    return state | {name: _joined(name, parts) for name, parts in split.items()}


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
    modules, stacks, in_block = ({ours: theirs for theirs, ours in t.items()} for t in (MODULES, STACKS, IN_BLOCK))
    split = {}
    for name, values in state.items():
        parts = np.split(values, 3) if ".attn.qkv." in name else [values]
        split |= {name.replace(".qkv.", f".{letter}."): part for letter, part in zip("qkv", parts, strict=False)}
    tensors = {_translated(name, modules, stacks, in_block): values for name, values in split.items()}
    prefix = {"ViTModel": "", BEIT: "beit."}.get(architecture, "vit.")
    if architecture == BEIT:  # it has biases of queries and values; those of keys would change nothing
        zeros = np.zeros_like(state["cls_token"][0, 0])
        for name in [name for name in tensors if name.endswith(("attention.query.weight", "attention.value.weight"))]:
            tensors.setdefault(name.replace(".weight", ".bias"), zeros)
        tensors = {name: values for name, values in tensors.items() if not name.endswith("attention.key.bias")}
    outside = ("decoder.", "classifier.")
    return {name if name.startswith(outside) else prefix + name: values for name, values in tensors.items()}


def _translated(name: str, modules: dict[str, str], stacks: dict[str, str], in_block: dict[str, str]) -> str | None:
    found, prefix = NUMBERED.fullmatch(name), ""
    if found and found[1] in stacks:
        prefix, name, modules = f"{stacks[found[1]]}.{int(found[2])}.", found[3], in_block
    module = next((module for module in modules if name == module or name.startswith(f"{module}.")), None)
    return module and prefix + modules[module] + name.removeprefix(module)


def read_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings `model.*` in a config.json, with transformers' defaults for those that it leaves out."""
    kind = config.get("model_type")
    if kind not in ("vit_mae", "vit", "beit"):
        raise UserError(
            f"config.json says model_type={kind!r}; masked autoencoders (vit_mae) and plain ViTs (vit) load"
        )
    known = SETTINGS | (AUTOENCODER_SETTINGS if kind == "vit_mae" else {})
    settings = {ours: config.get(theirs, usual) for ours, (theirs, usual) in known.items()}
    settings["activation"] = ACTIVATIONS.get(settings["activation"], settings["activation"])
    if isinstance(settings["patch_size"], list):
        height, width = settings["patch_size"]
        if height != width:
            raise UserError(f"patch_size {height} x {width}: patches must be square")
        settings["patch_size"] = height
    return settings | ({"qkv_bias": True} if kind == "beit" else {})  # BEiT always has these biases


def unused_settings(config: dict[str, Any]) -> list[str]:
    """Notes on settings of a config.json that have no effect here, but do elsewhere."""
    names = [name for name in ("hidden_dropout_prob", "attention_probs_dropout_prob") if config.get(name)]
    return [f"{name}={config[name]!r} is not used: there is no dropout here" for name in names]


def make_config(model: MAEConfig, architecture: str, class_names: list[str] | None, num_classes: int | None) -> dict:
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
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "dtype": "float32",
    }
    if architecture == BEIT:  # all that distinguishes it from a ViT is off
        config |= {
            "use_mean_pooling": True, "use_absolute_position_embeddings": True, "use_relative_position_bias": False,
            "use_shared_relative_position_bias": False, "use_mask_token": False, "layer_scale_init_value": 0.0,
            "drop_path_rate": 0.0,
        }  # fmt: skip
    if autoencoder:
        config["decoder_intermediate_size"] = model.decoder_blocks.mlp_width
    if num_classes is not None:
        named = class_names and len(class_names) == num_classes
        labels = list(class_names) if named else [f"LABEL_{n}" for n in range(num_classes)]
        config["id2label"] = {str(n): name for n, name in enumerate(labels)}
        config["label2id"] = {name: n for n, name in enumerate(labels)}
    return config


def class_names(config: dict[str, Any]) -> list[str] | None:
    """Class names in a config.json; None if there are only transformers' LABEL_0, LABEL_1, ..."""
    labels = {int(number): name for number, name in (config.get("id2label") or {}).items()}
    names = [labels[number] for number in sorted(labels)]
    return None if all(re.fullmatch(r"LABEL_\d+", name) for name in names) else names
