"""The model card (README.md) of a Hugging Face export: what the model is, how it was trained, its scores, its use."""

from pathlib import Path
from typing import Any

from mae_jax.interop.huggingface import architecture_of
from mae_jax.interop.workdirs import Weights
from mae_jax.models.classifier import is_classifier
from mae_jax.models.config import MAEConfig
from mae_jax.models.parameters import count_parameters
from mae_jax.runtime.errors import escaped
from mae_jax.workdir.writing import read_object

CARD = "README.md"
SHOWN_CLASSES = 20
# Rows of the table: a setting, and what to call it. Those that a file of another program lacks are left out.
TRAINING = {
    "data.name": "data", "data.path": "folder or file", "data.train_split": "split", "data.batch_size": "batch size",
    "train.epochs": "epochs", "train.steps": "steps", "optimizer.name": "optimizer",
    "optimizer.base_learning_rate": "learning rate at batch 256", "optimizer.weight_decay": "weight decay",
    "optimizer.layer_decay": "layer decay", "train.ema_decay": "average of the weights", "seed": "seed",
    "init_from": "started from",
}  # fmt: skip
PATHS = ("data.path", "init_from")  # only their last part is told
KINDS = {"class": "one of several classes", "multi": "any of several labels", "number": "numbers"}


def find_scores(checkpoint: Path, step: int) -> dict[str, Any]:
    """The numbers and the protocol in the result.json beside a workdir's checkpoint; empty if it is another step's."""
    result = read_object(checkpoint.parent.parent / "result.json") or {}
    if checkpoint.parent.name != "checkpoints" or result.get("step") != step:
        return {}
    return {name: value for name, value in result.items() if isinstance(value, float) or name == "protocol"}


def make_card(weights: Weights, trained: Weights, scores: dict[str, Any], notes: tuple[str, ...]) -> str:
    """The card's Markdown.

    Args:
      weights: what is exported.
      trained: the model that it is taken from, with its run's config.
      scores: of `find_scores`; they are `trained`'s.
      notes: what changed in the export.
    """
    architecture, classifies = architecture_of(weights), is_classifier(weights.config)
    kind = "image-classification" if classifies else "image-feature-extraction"
    tags = "".join(f"- {tag}\n" for tag in ("masked-autoencoder", "vision-transformer", "mae_jax"))
    parts = [f"---\nlibrary_name: transformers\npipeline_tag: {kind}\ntags:\n{tags}---", *_model(weights, architecture)]
    parts += ["## Training", _table(_settings(trained))]
    if scores:
        what = "" if weights.params.keys() == trained.params.keys() else " of the whole model"
        numbers = {name: f"{value:.4g}" for name, value in scores.items() if name != "protocol"}
        parts += [f"## Results{what}", _table(numbers)] + ([_text(scores["protocol"])] if "protocol" in scores else [])
    parts += ["## Use", _use(architecture, classifies)]
    parts += ["## Notes", "\n".join(f"- {_text(note)}" for note in notes)] if notes else []
    return "\n\n".join(parts) + "\n"


def _model(weights: Weights, architecture: str) -> list[str]:
    model, config = MAEConfig(**weights.config["model"]), weights.config
    (height, width), channels = model.image_size, {1: "grey", 3: "RGB"}.get(model.channels)
    made = "Trained with" if "train" in config else f"A file {weights.origin}, converted by"
    what = {"ViTMAEForPreTraining": "Masked autoencoder", "ViTModel": "Encoder of a masked autoencoder"}
    lines = [
        f"# {what.get(architecture, 'Image classifier')}",
        f"A Vision Transformer of {model.depth} blocks x {model.width} with {model.num_heads} heads, for pictures of "
        f"{height} x {width} pixels ({channels or f'{model.channels} channels'}) in patches of {model.patch_size} x "
        f"{model.patch_size}; {count_parameters(weights.params):,} parameters. {made} mae_jax, an implementation of "
        "masked autoencoders ([He et al. 2021](https://arxiv.org/abs/2111.06377)) in JAX.",
    ]
    if is_classifier(config):
        names = list(config.get("class_names") or ())
        told = ", ".join(map(_text, names[:SHOWN_CLASSES]))
        more = f" and {len(names) - SHOWN_CLASSES:,} more (config.json)" if len(names) > SHOWN_CLASSES else ""
        outputs = f"{config['classifier']['num_classes']:,} outputs: {KINDS[config.get('label_kind', 'class')]}"
        lines.append(f"{outputs}{f' ({told}{more})' if names else ''}.")
    return lines


def _settings(trained: Weights) -> dict[str, Any]:
    rows = {}
    for key, title in TRAINING.items():
        group, _, name = key.rpartition(".")
        value = (trained.config.get(group) or {}).get(name) if group else trained.config.get(name)
        if value is not None:
            rows[title] = Path(value).name if key in PATHS else value
    if "steps" in rows:  # they replace epochs
        rows.pop("epochs", None)
    return {"task": trained.config["task"], "updates": f"{trained.step:,}" if trained.step else "unknown"} | rows


def _use(architecture: str, classifies: bool) -> str:
    call, answer = "model(**inputs)", "outputs.last_hidden_state  # [1, 1 + L, D], class token first"
    if classifies:
        answer = "outputs.logits  # model.config.id2label names them"
    elif architecture == "ViTMAEForPreTraining":
        answer = "outputs.logits, outputs.mask  # predicted patches, and 1 where they were hidden"
    return f"""```python
from PIL import Image
from transformers import AutoImageProcessor, {architecture}

processor = AutoImageProcessor.from_pretrained("FOLDER")  # this folder, or its name on the hub
model = {architecture}.from_pretrained("FOLDER")
inputs = processor(Image.open("PICTURE"), return_tensors="pt")
outputs = {call}
{answer}
```

In JAX: `model = mae_jax.load("FOLDER")`, then `model.encode(model.processor("PICTURE"))`."""


def _table(rows: dict[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {_text(name)} | {_text(value)} |" for name, value in rows.items())])


def _text(value: Any) -> str:
    """A value as plain text in one line of Markdown."""
    return "".join(f"\\{x}" if x in "\\|`*_<>[]#" else x for x in escaped(str(value)))
