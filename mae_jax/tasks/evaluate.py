"""The task evaluate: an autoencoder's loss and pictures, or a classifier's scores."""

from pathlib import Path

from ml_collections import ConfigDict

from mae_jax.data.sources import Labelled, count_images
from mae_jax.evaluation.classification import Accuracy
from mae_jax.evaluation.evaluator import EvaluationSuite
from mae_jax.evaluation.scores import MAIN, TOLD, Report, tell
from mae_jax.models.classifier import is_classifier
from mae_jax.runtime.console import say
from mae_jax.runtime.errors import UserError, escaped
from mae_jax.runtime.signals import StopSignal
from mae_jax.settings.checks import check_read
from mae_jax.tasks.measuring import (
    check_has_decoder,
    find_sources,
    match_to_classifier,
    open_checkpoint,
    open_data,
    write_measurement,
)
from mae_jax.workdir.reporting import provenance
from mae_jax.workdir.writing import save_picture, write_csv, write_json

SHOWN_ROWS = 20


def run(config: ConfigDict, workdir: Path, stop: StopSignal) -> None:
    """Measures `init_from` on each evaluation image; writes result.json."""
    weights, config = open_checkpoint(config, workdir)
    train, evaluation = find_sources(weights, config, to_train=bool(config.evaluate.evaluators))
    classifies, source = is_classifier(weights.config), f"init_from={config.init_from}"
    names = config.evaluate.evaluators or (("accuracy",) if classifies else ("loss", "reconstructions"))
    if unfit := {"loss", "reconstructions"} & set(names) if classifies else {"accuracy"} & set(names):
        kind = "a classifier" if classifies else "an autoencoder"
        raise UserError(f"{source} is {kind}: leave {', '.join(sorted(unfit))} out of evaluate.evaluators")
    if classifies:
        check_read(config, "evaluate a classifier")
        evaluation, class_names = match_to_classifier(evaluation, weights, config)
        evaluation = Labelled(evaluation, config.data)
    elif {"loss", "reconstructions"} & set(names):
        check_has_decoder(weights, config.init_from)
    data, state = open_data(weights, config, train, evaluation)
    suite = EvaluationSuite(config, data, names)
    write_json(workdir / "config.json", config.to_dict() | provenance())
    numbers, drawn = suite.run(state)
    result = {"step": state.step} | {f"eval/{name}": value for name, value in numbers.items()}
    result["images"] = len(data.evaluation)
    for name, picture in drawn.items():
        say(f"see {save_picture(workdir / name / f'{state.step}.png', picture)}")
    for name, value in numbers.items():
        if name not in TOLD:  # those are printed below
            say(f"{name} {value:.4f}")
    images, main = count_images(None, data.evaluation), MAIN[data.evaluation.label_kind]
    for evaluator in suite.evaluators:
        if isinstance(evaluator, Accuracy) and main in numbers:  # not if the loss is not finite
            title = [f"{state.name}: {tell({main: numbers[main]})} on", images]
            report = evaluator.predictions.report(class_names, title)
            result |= report.details
            write_report(workdir, report)
            say(f"{tell(numbers)} on {images}", f"see {workdir}/{report.drawn} and {workdir}/{report.file}")
    if "loss" in numbers and main not in numbers:
        what = "loss" if classifies else f"loss of {data.hidden_patches.counted} patches"
        say(f"{what}, mean over {images}: {numbers['loss']:.4f}")
    write_measurement(workdir, config, result)


def write_report(workdir: Path, report: Report) -> None:
    """Writes a report's table and picture, and prints the rows with the lowest scores."""
    rows = report.rows
    write_csv(workdir / report.file, rows)
    save_picture(workdir / report.drawn, report.picture)
    headings = {key: heading for key, (heading, _, _) in report.columns.items()}
    say("  ".join(f"{heading:{place}}" for heading, place, _ in report.columns.values()))
    for row in sorted(rows, key=lambda row: (row[report.order] is None, row[report.order]))[:SHOWN_ROWS]:
        cells = ((row[key], place, form) for key, (_, place, form) in report.columns.items())
        texts = (("-" if value is None else format(value, form), place) for value, place, form in cells)
        say("  ".join(f"{escaped(text):{place}}" for text, place in texts))
    if len(rows) > SHOWN_ROWS:
        say(f"(the {SHOWN_ROWS} of {len(rows):,} with the lowest {headings[report.order]}; {report.file} has all)")
