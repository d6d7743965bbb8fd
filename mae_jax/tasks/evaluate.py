"""Evaluates a checkpoint on a whole split: an autoencoder's loss and pictures, or a classifier's accuracy."""

import csv
import io
from pathlib import Path

from ml_collections import ConfigDict

from mae_jax.data.sources import Source, count_images
from mae_jax.data.subset import Labelled, match_classes
from mae_jax.evaluation.classification import (
    Accuracy,
    Predictions,
    class_table,
    confusion_matrix,
    draw_confusion_matrix,
)
from mae_jax.interop.workdirs import Weights
from mae_jax.models.classifier import is_classifier
from mae_jax.runtime.console import say
from mae_jax.runtime.errors import UserError, escaped
from mae_jax.runtime.signals import StopSignal
from mae_jax.settings.checks import check_read
from mae_jax.tasks.frozen import find_sources
from mae_jax.tasks.measuring import open_checkpoint, open_data, run_evaluators, write_measurement
from mae_jax.tasks.reconstruct import reconstruct
from mae_jax.workdir.writing import save_picture, write_atomically

SHOWN_CLASSES = 20


def run(config: ConfigDict, workdir: Path, stop: StopSignal) -> None:
    """Measures `config.init_from` on the evaluation split, each image once, and writes result.json."""
    weights, config = open_checkpoint(config, workdir)
    names = config.evaluate.evaluators
    train, evaluation = find_sources(weights, config, to_train=bool(names))
    if not is_classifier(weights.config):
        reconstruct(weights, config, workdir, train, evaluation)
        return
    check_read(config, "evaluate a classifier")
    evaluation, class_names = match_to_classifier(evaluation, weights, config)
    data, state = open_data(weights, config, train, Labelled(evaluation, config.data))
    suite, result = run_evaluators(names or ("accuracy",), data, state, workdir)
    for evaluator in suite.evaluators:
        if isinstance(evaluator, Accuracy):
            images = count_images(None, data.evaluation)
            result["correct"] = int((evaluator.predictions.rank < 1).sum())
            title = [f"{state.name}: top-1 {result['eval/top1']:.2%} of", images]
            write_classes(workdir, evaluator.predictions, class_names, title)
            say("top-1 {eval/top1:.2%}, top-5 {eval/top5:.2%}, loss {eval/loss:.4f} on ".format_map(result) + images)
            say(f"see {workdir}/confusion_matrix.png and {workdir}/classes.csv")
    write_measurement(workdir, config, result)


def write_classes(workdir: Path, found: Predictions, class_names: list[str], title: list[str]) -> None:
    """Writes classes.csv and confusion_matrix.png, and prints the table."""
    confusions = confusion_matrix(found, len(class_names))
    rows = class_table(confusions, class_names)
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(workdir / "classes.csv", text.getvalue())
    save_picture(workdir / "confusion_matrix.png", draw_confusion_matrix(confusions, class_names, title))
    say(*describe_classes(rows))


def match_to_classifier(source: Source, weights: Weights, config: ConfigDict) -> tuple[Source, list[str]]:
    """The source with the classifier's labels, and a name for each class of the classifier.

    Classes are matched by name, or by order if the weights come from another program, whose names may be words rather
    than folders. UserError if the classes do not match.
    """
    num_classes, known, found = config.classifier.num_classes, weights.config.get("class_names"), source.class_names
    foreign = weights.config["data"]["name"] is None
    if known and found and not (foreign and set(known).isdisjoint(found)):
        source = match_classes(source, list(known), str(config.init_from))
    elif source.num_classes > num_classes or (foreign and known and found and source.num_classes < num_classes):
        raise UserError(
            f"{config.init_from} has {num_classes} classes, but data.name={config.data.name} has "
            f"{source.num_classes}; choose data with the same classes"
        )
    elif foreign and found:
        if known:
            say(f"note: its classes ({known[0]}, ...) and the data's ({found[0]}, ...) are matched by their order")
        elif source.num_classes < num_classes:
            say(f"note: its classes have no names: the data's are taken for the first {source.num_classes}")
        known = None
    names = [escaped(name) for name in known or found or ()]
    return source, names + [f"class {label}" for label in range(len(names), num_classes)]


def describe_classes(rows: list[dict]) -> list[str]:
    """The class table as lines of text: at most SHOWN_CLASSES, those with the lowest recall."""
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
