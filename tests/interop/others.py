"""Models of other programs with random weights, and their files, made without the library under test.

Every parameter is random, the tables of positions too: no term hides behind a zero, and no table is a formula's.
"""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

import mae_jax
from mae_jax.interop.workdirs import Weights
from mae_jax.models.classifier import ClassifierConfig, init_classifier
from mae_jax.models.mae import MAEConfig
from mae_jax.models.parameters import join
from mae_jax.runtime.errors import UserError
from tests.reference import random_like, random_params

# Settings of an encoder and of an autoencoder, as transformers names them: of heads that every file without a
# config.json is taken to have, and norms as facebookresearch's.
ENCODER = dict(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=12, intermediate_size=40,
    image_size=20, patch_size=5, num_channels=3, layer_norm_eps=1e-6,
)  # fmt: skip
AUTOENCODER = ENCODER | dict(
    decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=16, decoder_intermediate_size=30,
    norm_pix_loss=True, mask_ratio=0.6,
)  # fmt: skip
BEIT = dict(use_absolute_position_embeddings=True, layer_scale_init_value=0.0, drop_path_rate=0.0)


def create(architecture: str, seed: int = 0, **settings):
    """A model of transformers: "ViTMAEForPreTraining", "ViTModel", "BeitForImageClassification", ..."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model_class = getattr(transformers, architecture)
    with torch.device("meta"):  # no time for initial values that are replaced anyway
        model = model_class(model_class.config_class(**settings, attn_implementation="eager"))
    model.to_empty(device="cpu")
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = (rng.random(parameter.shape, np.float32) - 0.5) * np.float32(12**0.5)  # of variance 1
            if name.endswith("weight") and values.ndim > 1:
                values /= np.sqrt(values[0].size)
            else:
                values = 0.2 * values + np.float32("norm" in name and name.endswith("weight"))
            parameter.copy_(torch.tensor(values))
    return model.eval()


def state_of(model) -> dict[str, np.ndarray]:
    """Its tensors, by the names that they have in memory."""
    return {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}


def pictures(model_or_config, batch: int = 2, size: tuple[int, int] | None = None, seed: int = 0) -> np.ndarray:
    """Normalised images [B, H, W, C] that fit a model."""
    config = getattr(model_or_config, "config", model_or_config)
    side = config.image_size
    size = size or ((side, side) if isinstance(side, int) else tuple(side))
    return np.random.default_rng(seed).standard_normal((batch, *size, config.num_channels)).astype(np.float32)


def run(model, images, **inputs):
    """What a model of transformers returns for images [B, H, W, C], or for what else it takes as a torch tensor."""
    import torch

    if isinstance(images, np.ndarray):
        images = torch.tensor(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    inputs = {name: torch.tensor(x) if isinstance(x, np.ndarray) else x for name, x in inputs.items()}
    with torch.no_grad():
        return model(images, **inputs)


def in_order(num_patches: int, batch: int) -> np.ndarray:
    """Noise [B, L] that leaves the patches as they stand; with mask_ratio=0 transformers then hides nothing."""
    return np.tile(np.arange(num_patches, dtype=np.float32), (batch, 1))


# --------------------------------------------------------------------------------------------------------- spellings


def respelled(state: dict[str, np.ndarray], wrapper: str = "vit.") -> dict[str, np.ndarray]:
    """Names of transformers 4, and of the hub's files, for tensors by the names of transformers 5 in memory."""
    rules = (
        (r"^(vit\.|beit\.)?layers\.", r"\1encoder.layer."),
        (r"\.attention\.q_proj\.", ".attention.attention.query."),
        (r"\.attention\.k_proj\.", ".attention.attention.key."),
        (r"\.attention\.v_proj\.", ".attention.attention.value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
        (r"^vit\.", wrapper),
    )
    return _renamed(state, rules)


def to_facebook(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Names and layouts of facebookresearch/mae for tensors by the names of transformers 5 in memory."""
    rules = (
        (r"^(vit|beit)\.", ""),
        (r"^decoder\.decoder_layers\.", "decoder_blocks."),
        (r"^layers\.", "blocks."),
        (r"^embeddings\.cls_token", "cls_token"),
        (r"^embeddings\.position_embeddings", "pos_embed"),
        (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
        (r"^decoder\.", ""),
        (r"\.attention\.o_proj\.", ".attn.proj."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"^pooler\.layernorm\.", "fc_norm."),
        (r"^layernorm\.", "norm."),
        (r"^classifier\.", "head."),
    )
    state = _renamed(state, rules)
    for name in [name for name in state if ".q_proj." in name]:
        parts = [state.pop(name.replace(".q_proj.", f".{letter}_proj."), None) for letter in "qkv"]
        parts = [np.zeros_like(parts[0]) if part is None else part for part in parts]  # the keys' bias that BEiT lacks
        state[name.replace(".attention.q_proj.", ".attn.qkv.")] = np.concatenate(parts)
    return state


def _renamed(state: dict[str, np.ndarray], rules) -> dict[str, np.ndarray]:
    found = {}
    for name, value in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        found[name] = value
    assert len(found) == len(state)
    return found


def facebook_state(width=24, depth=2, mlp=40, patch=5, channels=3, patches=16, decoder=(16, 1, 30), classes=0, seed=0):
    """Random tensors by the names and shapes of facebookresearch/mae, which timm shares; made without PyTorch.

    Args:
      decoder: its width, depth and hidden width of its MLPs; or None.
      classes: of a head; 0: none.
    """

    def block(name, d, hidden):
        return {
            f"{name}.norm1.weight": (d,), f"{name}.norm1.bias": (d,),
            f"{name}.attn.qkv.weight": (3 * d, d), f"{name}.attn.qkv.bias": (3 * d,),
            f"{name}.attn.proj.weight": (d, d), f"{name}.attn.proj.bias": (d,),
            f"{name}.norm2.weight": (d,), f"{name}.norm2.bias": (d,),
            f"{name}.mlp.fc1.weight": (hidden, d), f"{name}.mlp.fc1.bias": (hidden,),
            f"{name}.mlp.fc2.weight": (d, hidden), f"{name}.mlp.fc2.bias": (d,),
        }  # fmt: skip

    shapes = {
        "cls_token": (1, 1, width), "pos_embed": (1, 1 + patches, width),
        "patch_embed.proj.weight": (width, channels, patch, patch), "patch_embed.proj.bias": (width,),
        "norm.weight": (width,), "norm.bias": (width,),
    }  # fmt: skip
    for n in range(depth):
        shapes |= block(f"blocks.{n}", width, mlp)
    if decoder:
        d, decoder_depth, decoder_mlp = decoder
        values = patch * patch * channels
        shapes |= {
            "mask_token": (1, 1, d), "decoder_pos_embed": (1, 1 + patches, d),
            "decoder_embed.weight": (d, width), "decoder_embed.bias": (d,),
            "decoder_norm.weight": (d,), "decoder_norm.bias": (d,),
            "decoder_pred.weight": (values, d), "decoder_pred.bias": (values,),
        }  # fmt: skip
        for n in range(decoder_depth):
            shapes |= block(f"decoder_blocks.{n}", d, decoder_mlp)
    if classes:
        shapes |= {"head.weight": (classes, width), "head.bias": (classes,)}
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


# -------------------------------------------------------------------------------------------------------------- files


def save_safetensors(path: Path, state: dict[str, np.ndarray], config: dict | None = None) -> Path:
    """A safetensors file, with this config.json beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {
        name: np.ascontiguousarray(value).reshape(value.shape) for name, value in state.items()
    }  # it makes () (1,)
    safetensors.numpy.save_file(arrays, path, {"format": "pt"})
    if config is not None:
        (path.parent / "config.json").write_text(json.dumps(config))
    return path


def save_torch(path: Path, content: dict) -> Path:
    """What torch.save writes; arrays become tensors."""
    torch = pytest.importorskip("torch")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(jax.tree.map(lambda x: torch.tensor(x) if isinstance(x, np.ndarray) else x, content), path)
    return path


# ------------------------------------------------------------------------------------------------------ models of ours

OURS = dict(
    image_size=(20, 20), patch_size=5, channels=3, width=24, depth=2, num_heads=12, mlp_ratio=4.0, mlp_width=40,
    decoder_width=16, decoder_depth=1, decoder_num_heads=16, decoder_mlp_width=30,
    mask_ratio=0.6, normalize_targets=True, norm_epsilon=1e-6, positions="sincos",
)  # fmt: skip
DATA = {"name": "digits", "mean": (0.3, 0.4, 0.5), "std": (0.2, 0.25, 0.3), "eval_crop": 0.9}


def our_weights(seed: int = 0, step: int = 7, **model) -> Weights:
    """An autoencoder as a workdir of ours holds it."""
    settings = OURS | model
    config = {"task": "pretrain", "seed": 0, "model": settings, "data": DATA}
    return Weights(config, random_params(MAEConfig(**settings), seed), step, f"step {step} (pretrain)")


def our_classifier(pool: str, batch_norm: bool = False, classes: int = 7, seed: int = 0, **model) -> Weights:
    """A classifier as a workdir of ours holds it."""
    settings = OURS | model
    classifier = ClassifierConfig(MAEConfig(**settings), classes, pool, batch_norm=batch_norm)
    params, statistics = jax.eval_shape(lambda: init_classifier(classifier, jax.random.key(0)))
    statistics = jax.tree.map(abs, random_like(statistics, seed + 1))
    config = {
        "task": "classify", "seed": 0, "model": settings, "data": DATA,
        "classifier": {
            "num_classes": classes, "pool": pool, "trained_blocks": None, "batch_norm": batch_norm, "head_std": 2e-5,
            "drop_path": 0.0, "label_smoothing": 0.1,
        },
        "class_names": [f"kind {n}" for n in range(classes)],
    }  # fmt: skip
    return Weights(config, join(random_like(params, seed), statistics), 9, "step 9 (classify)")


def check_same_params(found: dict, expected: dict) -> None:
    """Fails unless two nested dicts of parameters are the same to the last bit."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert (a.shape, np.asarray(a).dtype) == (b.shape, np.float32), jax.tree_util.keystr(path)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)


HEADS = dict(num_heads=12)  # of a width that is no usual one
ASKED = HEADS | dict(decoder_num_heads=16, normalize_targets=True)


def refusal(path, **settings) -> str:
    """The one line with which `mae_jax.load` refuses."""
    with pytest.raises(UserError) as error:
        mae_jax.load(path, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def hugging_face(**changes):
    """(tensors, config.json) of a small ViTMAEForPreTraining in the spelling of transformers 4."""
    state = {}
    names = {
        "cls_token": "vit.embeddings.cls_token", "pos_embed": "vit.embeddings.position_embeddings",
        "patch_embed.proj": "vit.embeddings.patch_embeddings.projection", "norm": "vit.layernorm",
        "norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
    }  # fmt: skip
    for name, values in facebook_state().items():
        module, _, leaf = name.rpartition(".")
        stack, _, inner = module.partition(".")
        if stack in ("blocks", "decoder_blocks"):
            number, _, inner = inner.partition(".")
            prefix = f"{'vit.encoder.layer' if stack == 'blocks' else 'decoder.decoder_layers'}.{number}."
            if inner == "attn.qkv":
                for letters, part in zip(("query", "key", "value"), np.split(values, 3), strict=True):
                    state[f"{prefix}attention.attention.{letters}.{leaf}"] = part
            else:
                state[f"{prefix}{names[inner]}.{leaf}"] = values
        elif name in names:
            state[names[name]] = values
        else:
            state[f"{names[module]}.{leaf}" if module in names else f"decoder.{name}"] = values
    config = dict(
        model_type="vit_mae", hidden_size=24, num_hidden_layers=2, num_attention_heads=12, intermediate_size=40,
        image_size=20, patch_size=5, num_channels=3, layer_norm_eps=1e-6, decoder_hidden_size=16,
        decoder_num_hidden_layers=1, decoder_num_attention_heads=16, decoder_intermediate_size=30, norm_pix_loss=True,
        mask_ratio=0.6,
    )  # fmt: skip
    return state, config | changes
