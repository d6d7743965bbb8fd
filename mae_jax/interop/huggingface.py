"""Hugging Face's spelling: names of tensors, and config.json.

Read: ViTMAEForPreTraining, ViTMAEModel, ViTModel and ViTForImageClassification, as transformers 4 and 5 write them.
Written: what both read, which is the spelling of transformers 4 and of the files on the hub.

transformers' ViT has no classifier of the patch tokens' mean. Its BEiT has one, and without relative positions and
layer scale it is a plain ViT, but for keys without a bias, which would have no influence (softmax). So these
classifiers are written, and read, as BeitForImageClassification.
"""

import re
from typing import Any

import numpy as np

from mae_jax.interop.tensors import Tensor
from mae_jax.interop.torch_layout import State
from mae_jax.models.config import MAEConfig
from mae_jax.runtime.errors import UserError

# Ours -> theirs: settings with one meaning in both. (values: what transformers takes if config.json lacks the key)
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
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_python": "gelu",
    "gelu_python_tanh": "gelu_tanh",
    "swish": "silu",
}
# Patterns of their names (after the wrappers) -> facebookresearch's.
LAYER = {
    r"layernorm_before": "norm1",
    r"layernorm_after": "norm2",
    r"attention\.output\.dense|attention\.o_proj": "attn.proj",
    r"intermediate\.dense|mlp\.fc1": "mlp.fc1",
    r"output\.dense|mlp\.fc2": "mlp.fc2",
    r"attention\.attention\.query|attention\.q_proj": "attn.qkv/0",
    r"attention\.attention\.key|attention\.k_proj": "attn.qkv/1",
    r"attention\.attention\.value|attention\.v_proj": "attn.qkv/2",
}
NAMES = {
    r"embeddings\.cls_token": "cls_token",
    r"embeddings\.position_embeddings": "pos_embed",
    r"embeddings\.patch_embeddings\.projection": "patch_embed.proj",
    r"layernorm": "norm",
    r"decoder\.mask_token": "mask_token",
    r"decoder\.decoder_pos_embed": "decoder_pos_embed",
    r"decoder\.decoder_embed": "decoder_embed",
    r"decoder\.decoder_norm": "decoder_norm",
    r"decoder\.decoder_pred": "decoder_pred",
    r"classifier": "head",
    r"pooler\.layernorm": "fc_norm",  # BEiT's
}
# The encoder's and the decoder's layers; the third spelling of the decoder's is what transformers 5 writes.
STACKS = {
    r"(?:encoder\.layer|layers)\.(\d+)": "blocks",
    r"decoder\.(?:decoder_layers|decoder_encoder\.layer)\.(\d+)": "decoder_blocks",
}
QKV = ("query", "key", "value")
BEIT = "BeitForImageClassification"
WRITTEN = {  # facebookresearch's -> the names that are written
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.decoder_pos_embed",
    "decoder_embed": "decoder.decoder_embed",
    "decoder_norm": "decoder.decoder_norm",
    "decoder_pred": "decoder.decoder_pred",
    "head": "classifier",
    "fc_norm": "vit.pooler.layernorm",
    "blocks": "vit.encoder.layer",
    "decoder_blocks": "decoder.decoder_layers",
}
WRITTEN_LAYER = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def is_huggingface(names) -> bool:
    """Whether tensors with these names are Hugging Face's."""
    return any("embeddings.patch_embeddings.projection" in name for name in names)


def to_state(tensors: dict[str, Tensor]) -> State:
    """Their tensors by facebookresearch's names; those that have no counterpart keep their own."""
    state: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        translated, _, part = _translate(re.sub(r"^(vit|beit)\.", "", name)).partition("/")
        state.setdefault(translated, {})[int(part or 0)] = tensor
    for name, parts in state.items():
        if name.endswith(".attn.qkv.bias") and sorted(parts) == [0, 2]:  # BEiT's keys
            parts[1] = parts[0]._replace(read=lambda shape=parts[0].shape: np.zeros(shape, np.float32))
    for name, parts in state.items():
        if len(shapes := [part.shape for part in parts.values()]) > 1 and len(set(shapes)) > 1:
            raise UserError(f"{name}: query, key and value have the shapes {shapes}; they must have the same")
    broken = [name for name, parts in state.items() if ".attn.qkv." in name and sorted(parts) != [0, 1, 2]]
    if broken:
        kept = ", ".join(QKV[part] for part in sorted(state[broken[0]]))
        raise UserError(f"{broken[0]}: the file has only {kept} of query, key and value; the model needs all or none")
    return {name: tuple(parts[n] for n in sorted(parts)) for name, parts in state.items()}


def _translate(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    for pattern, ours in NAMES.items():
        if re.fullmatch(pattern, name):  # a token or a table
            return ours
        if re.fullmatch(pattern, module):
            return f"{ours}.{leaf}"
    for pattern, ours in STACKS.items():
        found = re.match(pattern + r"\.", name)
        for inner, translated in LAYER.items() if found else ():
            if re.fullmatch(inner, module[found.end() :]):
                translated, _, part = translated.partition("/")
                return f"{ours}.{int(found[1])}.{translated}.{leaf}" + (part and f"/{part}")
    return name


def from_state(state: dict[str, np.ndarray], architecture: str) -> dict[str, np.ndarray]:
    """Arrays by the names that transformers 4 and 5 read for an architecture, from facebookresearch's."""
    tensors = {}
    for name, values in state.items():
        module, _, leaf = name.rpartition(".")
        found = re.match(r"(blocks|decoder_blocks)\.(\d+)\.", name)
        if found is None:
            tensors[WRITTEN.get(name) or f"{WRITTEN[module]}.{leaf}"] = values
            continue
        stack, inner = f"{WRITTEN[found[1]]}.{found[2]}", module[found.end() :]
        if inner == "attn.qkv":
            for letters, part in zip(QKV, np.split(values, 3), strict=True):
                tensors[f"{stack}.attention.attention.{letters}.{leaf}"] = part
        else:
            tensors[f"{stack}.{WRITTEN_LAYER[inner]}.{leaf}"] = values
    prefix = {"ViTModel": "", BEIT: "beit."}.get(architecture, "vit.")
    if architecture == BEIT:
        biases = {name for name in tensors if name.endswith("attention.key.bias")}
        zeros = np.zeros_like(state["cls_token"][0, 0])
        for name in [name for name in tensors if re.search(r"attention\.(query|value)\.weight$", name)]:
            tensors.setdefault(name.replace(".weight", ".bias"), zeros)
        tensors = {name: values for name, values in tensors.items() if name not in biases}
    return {re.sub(r"^vit\.", prefix, name): values for name, values in tensors.items()}


def read_settings(config: dict[str, Any], source: str) -> dict[str, Any]:
    """The settings of `model.*` that a config.json states, or transformers' values for those that it leaves out.

    Raises:
      UserError: for a kind of model, or a value, that has no counterpart.
    """
    kind = config.get("model_type")
    if kind not in ("vit_mae", "vit", "beit"):
        raise UserError(f"{source} is of model_type {kind!r}; masked autoencoders (vit_mae) and plain ViTs (vit) load")
    known = SETTINGS | (AUTOENCODER_SETTINGS if kind == "vit_mae" else {})
    settings = {ours: config.get(theirs, usual) for ours, (theirs, usual) in known.items()}
    settings["activation"] = ACTIVATIONS.get(settings["activation"], settings["activation"])
    for name in ("image_size", "patch_size"):
        if isinstance(settings[name], list):
            settings[name] = tuple(settings[name])
    if isinstance(settings["patch_size"], tuple):
        height, width = settings["patch_size"]
        if height != width:
            raise UserError(f"{source}: patch_size {height} x {width}: patches must be square")
        settings["patch_size"] = height
    if kind == "beit":  # always has these biases
        settings["qkv_bias"] = True
    return settings


def unused_settings(config: dict[str, Any]) -> list[str]:
    """Notes on settings of a config.json that make no difference here, but would elsewhere."""
    names = [name for name in ("hidden_dropout_prob", "attention_probs_dropout_prob") if config.get(name)]
    return [f"{name}={config[name]!r} is not used: there is no dropout here" for name in names]


def make_config(model: MAEConfig, architecture: str, class_names: list[str] | None, num_classes: int | None) -> dict:
    """The config.json of a model that transformers' `architecture` (ViTMAEForPreTraining, ViTModel, ...) loads."""
    autoencoder = architecture.startswith("ViTMAE")
    known = SETTINGS | (AUTOENCODER_SETTINGS if autoencoder else {})
    config = {theirs: getattr(model, ours) for ours, (theirs, _) in known.items()}
    config["intermediate_size"] = model.blocks.mlp_width
    if autoencoder:
        config["decoder_intermediate_size"] = model.decoder_blocks.mlp_width
    height, width = model.image_size
    config["image_size"] = height if height == width else [height, width]
    config["hidden_act"] = {"gelu_tanh": "gelu_pytorch_tanh"}.get(model.activation, model.activation)
    if num_classes is not None:
        names = class_names if class_names and len(class_names) == num_classes else None
        labels = names or [f"LABEL_{n}" for n in range(num_classes)]
        config["id2label"] = {str(n): name for n, name in enumerate(labels)}
        config["label2id"] = {name: n for n, name in enumerate(labels)}
    if architecture == BEIT:
        config |= {
            "use_mean_pooling": True, "use_absolute_position_embeddings": True, "use_relative_position_bias": False,
            "use_shared_relative_position_bias": False, "use_mask_token": False, "layer_scale_init_value": 0.0,
            "drop_path_rate": 0.0,
        }  # fmt: skip
    return config | {
        "architectures": [architecture],
        "model_type": "vit_mae" if autoencoder else "beit" if architecture == BEIT else "vit",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "dtype": "float32",
    }


def class_names(config: dict[str, Any]) -> list[str] | None:
    """Names of the classes in a config.json; None if there are none but transformers' LABEL_0, LABEL_1, ..."""
    labels = {int(number): name for number, name in (config.get("id2label") or {}).items()}
    names = [labels[number] for number in sorted(labels)]
    return None if all(re.fullmatch(r"LABEL_\d+", name) for name in names) else names
