"""Evaluation of any checkpoint on a whole split: an autoencoder's loss and pictures, a classifier's accuracy."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections

from mae_jax.data.sources import Source, count_images
from mae_jax.data.subset import Labelled, match_classes
from mae_jax.evaluation.classification import Accuracy, class_table, confusion_matrix, draw_confusion_matrix
from mae_jax.evaluation.suite import EvaluationSuite
from mae_jax.interop.weights import has_decoder
from mae_jax.interop.workdirs import Weights
from mae_jax.models.classifier import is_classifier
from mae_jax.runtime.console import say
from mae_jax.runtime.errors import UserError, escaped
from mae_jax.runtime.signals import StopSignal
from mae_jax.settings.usage import check_read
from mae_jax.tasks.frozen import find_sources
from mae_jax.tasks.measuring import open_checkpoint, open_data, write_config, write_measurement
from mae_jax.workdir.writing import save_picture, write_atomically

AUTOENCODER = ("loss", "reconstructions")  # evaluators, unless `evaluate.evaluators` names some
SHOWN_CLASSES = 20  # rows of the class table that are printed


def run(config: ml_collections.ConfigDict, workdir: Path, stop: StopSignal) -> None:
    """Measures `config.init_from` on the evaluation split, every image once; writes result.json.

    Raises:
      UserError: without a checkpoint, or for data that do not fit it.
    """
    weights, config = open_checkpoint(config, workdir)
    names = config.evaluate.evaluators
    train, evaluation = find_sources(weights, config, to_train=bool(names))
    if is_classifier(weights.config):
        check_read(config, "evaluate a classifier")
        evaluate_classifier(weights, config, workdir, train, evaluation, names or ("accuracy",))
    else:
        evaluate_autoencoder(weights, config, workdir, train, evaluation, names or AUTOENCODER)


def evaluate_autoencoder(
    weights: Weights,
    config: ml_collections.ConfigDict,
    workdir: Path,
    train: Source | None,
    evaluation: Source,
    names: Sequence[str] = AUTOENCODER,
) -> None:
    """The masked loss, and pictures.

    Raises:
      UserError: for a model without the decoder that is needed, or masks that do not fit.
    """
    if not has_decoder(weights) and not set(names).isdisjoint(AUTOENCODER):
        raise UserError(
            f"init_from={config.init_from} holds only an encoder: nothing can be reconstructed; give a file with its "
            "decoder (of the released ones mae_pretrain_vit_*_full or mae_visualize_vit_*)"
        )
    suite, result = _measure(weights, config, workdir, train, evaluation, names)
    write_measurement(workdir, config, result)
    if "eval/loss" in result:
        images = count_images(None, suite.data.evaluation)
        counted = suite.data.hidden_patches.counted
        say(f"loss of {counted} patches, mean over {images}: {result['eval/loss']:.4f}")


def evaluate_classifier(
    weights: Weights,
    config: ml_collections.ConfigDict,
    workdir: Path,
    train: Source | None,
    evaluation: Source,
    names: Sequence[str],
) -> None:
    """Loss, top-1 and top-5; classes.csv; confusion_matrix.png."""
    evaluation, class_names = match_to_classifier(evaluation, weights, config)
    suite, result = _measure(weights, config, workdir, train, Labelled(evaluation, config.data), names)
    images = count_images(None, suite.data.evaluation)
    for found in (e.predictions for e in suite.evaluators if isinstance(e, Accuracy)):
        result["correct"] = int((found.rank < 1).sum())
        top1, top5, loss = (result[f"eval/{name}"] for name in ("top1", "top5", "loss"))
        confusions = confusion_matrix(found, len(class_names))
        rows = class_table(confusions, class_names)
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(workdir / "classes.csv", text.getvalue())
        title = [f"{config.init_from}, {weights.origin}: top-1 {top1:.2%} of", images]
        save_picture(workdir / "confusion_matrix.png", draw_confusion_matrix(confusions, class_names, title))
        say(*describe_classes(rows), f"top-1 {top1:.2%}, top-5 {top5:.2%}, loss {loss:.4f} on {images}")
        say(f"see {workdir}/confusion_matrix.png and {workdir}/classes.csv")
    write_measurement(workdir, config, result)


def _measure(
    weights: Weights,
    config: ml_collections.ConfigDict,
    workdir: Path,
    train: Source | None,
    evaluation: Source,
    names: Sequence[str],
) -> tuple[EvaluationSuite, dict[str, Any]]:
    """Runs evaluators; pictures go to NAME/<step>.png, and numbers are returned for result.json."""
    data, state = open_data(weights, config, train, evaluation)
    suite = EvaluationSuite(config, data, names)
    write_config(workdir, config)
    numbers, pictures = suite.run(state)
    for name, picture in pictures.items():
        say(f"see {save_picture(workdir / name / f'{weights.step}.png', picture)}")
    result = {"step": weights.step} | {f"eval/{name}": value for name, value in numbers.items()}
    for name in numbers.keys() - {"loss", "top1", "top5"}:  # which the callers print
        say(f"{name} {numbers[name]:.4f}")
    return suite, result | {"images": len(data.evaluation)}


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


def describe_classes(rows: list[dict]) -> list[str]:
    """The class table as lines; of many classes those with the lowest recall."""
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
    return lines
