"""Evaluation of any checkpoint on a whole split: an autoencoder's loss and pictures, a classifier's accuracy."""

import csv
import io
from pathlib import Path

import ml_collections

from mae_jax.data.augment import normalize
from mae_jax.data.datasets import make_source
from mae_jax.data.device_batches import evaluation_batches
from mae_jax.data.sources import Source, count_images, describe_sources
from mae_jax.data.subset import Labelled, RandomSubset, match_classes
from mae_jax.evaluation.classification import (
    class_table,
    confusion_matrix,
    draw_confusion_matrix,
    predict,
    summarize_predictions,
)
from mae_jax.interop.weights import make_bind_of
from mae_jax.interop.workdirs import Weights
from mae_jax.models.config import MAEConfig
from mae_jax.runtime.console import say
from mae_jax.runtime.errors import UserError, escaped
from mae_jax.runtime.mesh import check_heads, make_mesh, parameter_shardings, put
from mae_jax.runtime.sharding import on_rows
from mae_jax.runtime.signals import StopSignal
from mae_jax.tasks.measuring import open_checkpoint, write_measurement
from mae_jax.tasks.reconstruct import reconstruct
from mae_jax.workdir.reporting import provenance
from mae_jax.workdir.writing import save_picture, write_atomically, write_json

SHOWN_CLASSES = 20  # rows of the class table that are printed


def run(config: ml_collections.ConfigDict, workdir: Path, stop: StopSignal) -> None:
    """Measures `config.init_from` on the evaluation split, every image once; writes result.json.

    Raises:
      UserError: without a checkpoint, or for data that do not fit it.
    """
    weights, config = open_checkpoint(config, workdir)
    measure = evaluate_classifier if weights.config["task"] == "classify" else evaluate_autoencoder
    measure(weights, config, workdir)


def evaluate_autoencoder(weights: Weights, config: ml_collections.ConfigDict, workdir: Path) -> None:
    """The masked loss, and pictures."""
    model = MAEConfig(**config.model)
    source = make_source(config.data, "eval", model.image_size, model.channels)
    say(*describe_sources(config.data.name, None, source))
    reconstruct(weights, config, workdir, source)


def evaluate_classifier(weights: Weights, config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Loss, top-1 and top-5; classes.csv; confusion_matrix.png."""
    model, data, mesh = MAEConfig(**config.model), config.data, make_mesh(config.mesh)
    check_heads(mesh, model, decoder=False)
    source = make_source(data, "eval", model.image_size, model.channels)
    source, names = match_to_classifier(source, weights, config)
    source, num_classes = Labelled(source, data), config.classifier.num_classes
    source = RandomSubset(source, config.evaluate.max_examples or len(source))
    say(*describe_sources(data.name, None, source))
    write_json(workdir / "config.json", config.to_dict() | provenance())

    bind, variables = make_bind_of(weights), put(weights.params, parameter_shardings(mesh, weights.params))
    logits = on_rows(lambda variables, images: bind(variables)(normalize(images, data.mean, data.std)), mesh)
    batches = evaluation_batches(source, data, config.evaluate.batch_size, model.image_size, model.channels, mesh)
    found = predict(lambda batch: logits(variables, batch["image"]), batches)

    scores, confusions = summarize_predictions(found), confusion_matrix(found, num_classes)
    rows = class_table(confusions, names)
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(workdir / "classes.csv", text.getvalue())
    counted = count_images(None, source)
    title = [f"{config.init_from}, {weights.origin}: top-1 {scores['top1']:.2%} of", counted]
    save_picture(workdir / "confusion_matrix.png", draw_confusion_matrix(confusions, names, title))
    result = {"step": weights.step} | {f"eval/{name}": value for name, value in scores.items()}
    write_measurement(workdir, config, result | {"images": len(source), "correct": int((found.rank < 1).sum())})
    say(*describe_classes(rows).split("\n"))
    say(f"top-1 {scores['top1']:.2%}, top-5 {scores['top5']:.2%}, loss {scores['loss']:.4f} on {counted}")
    say(f"see {workdir}/confusion_matrix.png and {workdir}/classes.csv")


def match_to_classifier(
    source: Source, weights: Weights, config: ml_collections.ConfigDict
) -> tuple[Source, list[str]]:
    """The source with the classifier's labels, and a name for each of the classifier's classes.

    Classes are matched by their names. The classes of a file of others may go by other names (words, not folders);
    then their order counts.

    Raises:
      UserError: if the pictures' classes are not the classifier's.
    """
    num_classes, known, found = config.classifier.num_classes, weights.config.get("class_names"), source.class_names
    foreign = weights.config["data"]["name"] is None
    if known and found and not (foreign and set(known).isdisjoint(found)):
        source = match_classes(source, list(known), str(config.init_from))
    elif source.num_classes > num_classes or (foreign and known and found and source.num_classes < num_classes):
        raise UserError(
            f"{config.init_from} tells {num_classes} classes apart, but data.name={config.data.name} has "
            f"{source.num_classes}; choose data with the same classes"
        )
    elif foreign and found:
        if known:
            say(f"note: its classes ({known[0]}, ...) and the data's ({found[0]}, ...) are taken in the same order")
        elif source.num_classes < num_classes:
            say(f"note: its classes have no names: the data's are taken for the first {source.num_classes}")
        known = None
    names = [escaped(name) for name in known or found or ()]
    return source, names + [f"class {label}" for label in range(len(names), num_classes)]


def describe_classes(rows: list[dict]) -> str:
    """The class table as text; of many classes those with the lowest recall."""
    shown = rows
    if len(rows) > SHOWN_CLASSES:
        shown = sorted(rows, key=lambda row: 1.0 if row["recall"] is None else row["recall"])[:SHOWN_CLASSES]
    lines = [f"{'class':<24}{'images':>8}{'recall':>9}{'precision':>11}  often taken for"]
    for row in shown:
        recall, precision = ("-" if row[n] is None else f"{row[n]:.1%}" for n in ("recall", "precision"))
        name, other = escaped(row["class"])[:23], escaped(row["often_taken_for"] or "")
        lines.append(f"{name:<24}{row['images']:>8,}{recall:>9}{precision:>11}  {other}")
    if len(shown) < len(rows):
        lines.append(f"(the {len(shown)} of {len(rows):,} classes with the lowest recall; classes.csv has all)")
    return "\n".join(lines)
