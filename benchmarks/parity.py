"""How far our numbers are from transformers' for the same weights and masks: `python -m benchmarks.parity`.

Models with random weights everywhere (position tables, biases and norms too) are saved by transformers, loaded by
`mae_jax.load`, and run on the same images with the same noise, in float32 on the CPU. Printed is the largest difference
of any value, divided by the largest value of transformers'.
"""

import argparse
import tempfile
import warnings
from pathlib import Path

import jax
import numpy as np
import torch
from transformers import (
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
    logging,
)

import mae_jax
from mae_jax.interop.formats import export
from mae_jax.interop.weights import read_weights

ODD = dict(
    hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=250, hidden_act="relu",
    image_size=25, patch_size=5, num_channels=1, qkv_bias=False, attn_implementation="eager",
)  # fmt: skip
ODD_DECODER = dict(
    decoder_hidden_size=32, decoder_num_hidden_layers=2, decoder_num_attention_heads=2, decoder_intermediate_size=70
)
MODELS = {
    "grey, ReLU, no qkv bias, MLP 250, patch 5": ODD | ODD_DECODER | dict(mask_ratio=0.6, norm_pix_loss=True),
    "5 channels, tanh GELU, epsilon 1e-2": ODD | ODD_DECODER
    | dict(num_channels=5, hidden_act="gelu_new", layer_norm_eps=1e-2, qkv_bias=True, mask_ratio=0.5),
    "ViT-B/16": dict(attn_implementation="eager"),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--skip_base", action="store_true", help="leave ViT-B/16 out")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for name, settings in MODELS.items():
        if not (args.skip_base and name == "ViT-B/16"):
            print(name)
            for what, difference in {**compare_autoencoder(settings), **compare_others(settings)}.items():
                print(f"  {what:<58}{difference:.1e}")


def compare_autoencoder(settings: dict) -> dict[str, float]:
    """Loss, predictions, hidden states, attention maps; the encoder at another size."""
    model = randomize(ViTMAEForPreTraining(ViTMAEConfig(**settings)))
    ours = reloaded(model)
    config = model.config
    images, noise = batch(config, (config.image_size, config.image_size))
    with torch.no_grad():
        theirs = model(to_torch(images), noise=torch.tensor(noise), output_hidden_states=True, output_attentions=True)
        rows, columns = config.image_size // config.patch_size + 2, config.image_size // config.patch_size - 1
        wide, wide_noise = batch(config, (rows * config.patch_size, columns * config.patch_size))
        resized = model.vit(to_torch(wide), noise=torch.tensor(wide_noise), interpolate_pos_encoding=True)
    found = ours(images, noise=noise, output_hidden_states=True, output_attentions=True)
    return {
        "loss": relative(found.loss, theirs.loss),
        "predictions": relative(found.prediction, theirs.logits),
        "hidden states, the worst layer": max(map(relative, found.hidden_states, theirs.hidden_states)),
        "attention maps, the worst layer": max(map(relative, found.attentions, theirs.attentions)),
        "encoder at another size, interpolate_pos_encoding=True": relative(
            ours.encode(wide, noise=wide_noise), resized.last_hidden_state
        ),
    }


def compare_others(settings: dict) -> dict[str, float]:
    """Files of ours, as transformers computes with them, and classifiers of theirs."""
    shared = {
        k: v for k, v in settings.items() if not k.startswith("decoder") and k not in ("mask_ratio", "norm_pix_loss")
    }
    differences = {}
    encoder = randomize(ViTModel(ViTConfig(**shared)))
    images, _ = batch(encoder.config, (encoder.config.image_size,) * 2)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        encoder.save_pretrained(folder)
        export(read_weights(folder), Path(folder) / "exported", "huggingface")
        exported = ViTModel.from_pretrained(Path(folder) / "exported", attn_implementation="eager")
        ours = mae_jax.load(folder).encode(images)
        differences["exported ViTModel: features"] = relative(ours, exported(to_torch(images)).last_hidden_state)
    classifier = randomize(ViTForImageClassification(ViTConfig(**shared, num_labels=7)))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        classifier.save_pretrained(folder)
        logits = mae_jax.load(folder)(images)
        differences["ViTForImageClassification: logits"] = relative(logits, classifier(to_torch(images)).logits)
    return differences


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim == 2 else 0.2
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator) + ("layernorm" in name))
    return model.eval()


def reloaded(model: torch.nn.Module) -> mae_jax.MaskedAutoencoder:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return mae_jax.load(folder)


def batch(config, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    patches = (size[0] // config.patch_size) * (size[1] // config.patch_size)
    images = rng.standard_normal((2, *size, config.num_channels), np.float32)
    return images, rng.random((2, patches), np.float32)


def to_torch(images: np.ndarray) -> torch.Tensor:
    return torch.tensor(images.transpose(0, 3, 1, 2))


def relative(ours: jax.Array, theirs: torch.Tensor) -> float:
    ours, theirs = np.asarray(ours, np.float64), theirs.numpy().astype(np.float64)
    assert ours.shape == theirs.shape
    return float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))


if __name__ == "__main__":
    main()
