"""The task reconstruct: pictures of reconstructions, and the error of each picture."""

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from mae_jax.data.image_folder import PictureFiles
from mae_jax.data.sources import Source, count_images
from mae_jax.evaluation.autoencoder import ReconstructionSheet
from mae_jax.evaluation.evaluator import EvaluationData, EvaluationSuite
from mae_jax.evaluation.overview import draw_pictures
from mae_jax.evaluation.picture_errors import PictureErrors, find_outliers, measure_errors, outlier_auroc
from mae_jax.interop.workdirs import Weights
from mae_jax.models.classifier import is_classifier
from mae_jax.runtime.console import say
from mae_jax.runtime.errors import UserError, escaped
from mae_jax.runtime.processes import is_main
from mae_jax.runtime.signals import StopSignal
from mae_jax.tasks.measuring import check_has_decoder, find_sources, open_checkpoint, open_data, write_measurement
from mae_jax.workdir.reporting import provenance
from mae_jax.workdir.writing import save_picture, write_json, writing_table

TABLE, SHEET = "errors.csv", "errors.png"
SHOWN = 40  # pictures of SHEET
TOLD = 3  # files that are printed


def run(config: ConfigDict, workdir: Path, stop: StopSignal) -> None:
    """Reconstructs all in `data.path`, or the evaluation pictures; writes errors.csv, pictures and result.json."""
    weights, config, source = open_pictures(config, workdir)
    check_has_decoder(weights, config.init_from)
    data, state = open_data(weights, config, None, source)
    outlier = find_outliers(data.evaluation, config.reconstruct.outliers) if config.reconstruct.outliers else None
    if outlier is not None and config.data.name is None:  # files in no folder of these names are the others
        outlier = np.maximum(outlier, 0)
    suite = EvaluationSuite(config, data, config.evaluate.evaluators or ("reconstructions",))
    write_json(workdir / "config.json", config.to_dict() | provenance())
    found = measure_errors(config, data, state)
    result = {"step": state.step, "images": len(found.index), "bad": len(found.bad)}
    if len(found.index):
        for evaluator in suite.evaluators:
            if isinstance(evaluator, ReconstructionSheet):
                evaluator.usable = found.index
        numbers, drawn = suite.run(state)
        result |= {
            f"eval/{name}": value for name, value in ({"loss": float(found.errors[:, 0].mean())} | numbers).items()
        }
        for name, picture in drawn.items():
            say(f"see {save_picture(workdir / name / f'{state.step}.png', picture)}")
        images = count_images(None, data.evaluation)
        say(f"loss of {data.hidden_patches.counted} patches, mean over {images}: {result['eval/loss']:.4f}")
    files = write_errors(workdir, config, data, found, outlier)
    if outlier is not None:
        of_usable = outlier[found.index]
        auroc = outlier_auroc(found.errors.mean(axis=1), of_usable)
        count = int((of_usable == 1).sum())
        result |= {"outliers": count, "auroc": auroc}
        told = "-" if auroc is None else f"{auroc:.4f}"
        say(f"AUROC of the error, {count:,} outliers among {len(of_usable):,} pictures: {told}")
    write_measurement(workdir, config, result)
    say(f"see {', '.join(f'{workdir}/{file}' for file in files)}")


def open_pictures(config: ConfigDict, workdir: Path) -> tuple[Weights, ConfigDict, Source]:
    """The autoencoder, its settings and the pictures: without another `data.name`, all in `data.path`."""
    pictures = None
    if config.data.name in (None, "image_folder"):
        pictures, config.data.path = config.data.path, None
    weights, config = open_checkpoint(config, workdir, needs_data=not pictures)
    if is_classifier(weights.config):
        raise UserError(f"init_from={config.init_from} is a classifier, which has no decoder: nothing to reconstruct")
    if not pictures:
        return weights, config, find_sources(weights, config, to_train=False)[1]
    config.data.name, config.data.path = None, pictures  # for result.json
    return weights, config, PictureFiles(pictures, config.reconstruct.outliers, extensions=config.data.extensions)


def write_errors(
    workdir: Path, config: ConfigDict, data: EvaluationData, found: PictureErrors, outlier: np.ndarray | None
) -> list[str]:
    """Writes a row for each picture, the largest error first, and a sheet of the first ones; returns the files."""
    source, means = data.evaluation, found.errors.mean(axis=1)
    order = np.argsort(-means, kind="stable")
    header = ["file", "error", "std_over_masks", *(["outlier"] if outlier is not None else []), "reason"]
    with writing_table(workdir / TABLE, header) as write_row:
        for place in order:
            index = int(found.index[place])
            told = [] if outlier is None else [("no", "yes", "")[outlier[index]]]
            numbers = (f"{number:.6g}" for number in (means[place], found.errors[place].std()))
            write_row([escaped(source.file_of(index)), *numbers, *told, ""])
        for index, why in sorted(found.bad.items()):
            write_row([escaped(source.file_of(index)), *[""] * (len(header) - 2), escaped(why)])
    for index, why in sorted(found.bad.items())[:TOLD]:
        say(f"bad: {escaped(source.file_of(index))}: {escaped(why)}")
    if not len(order):
        return [TABLE]
    largest = (f"{escaped(source.file_of(int(found.index[place])))} ({means[place]:.4f})" for place in order[:TOLD])
    masks = found.errors.shape[1]
    how = f"mean over {masks} masks" if masks > 1 else "with one mask"
    say(f"largest errors, {how}: {', '.join(largest)}; the median is {np.median(means):.4f}")
    if is_main():
        first = order[:SHOWN]
        words = [f"{means[place]:.4f}" for place in first]
        caption = [f"{config.init_from}: the largest errors of reconstruction, {how}"]
        save_picture(workdir / SHEET, draw_pictures(config, source, found.index[first], words, caption))
    return [TABLE, SHEET]
