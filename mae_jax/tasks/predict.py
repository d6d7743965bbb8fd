"""The task predict: what a classifier says of each picture."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from mae_jax.data.image_folder import PictureFiles
from mae_jax.data.sources import Source, is_labelled
from mae_jax.evaluation.classification import Accuracy, Predictions, judge, predictions_of
from mae_jax.evaluation.each_picture import EachPicture
from mae_jax.evaluation.evaluator import EvaluationData, Trained
from mae_jax.evaluation.overview import draw_pictures
from mae_jax.evaluation.predicting import ClassRows, MultiRows, NumberRows
from mae_jax.evaluation.scores import tell
from mae_jax.interop.workdirs import Weights
from mae_jax.models.classifier import is_classifier
from mae_jax.runtime.console import say
from mae_jax.runtime.errors import UserError, escaped
from mae_jax.runtime.processes import is_main
from mae_jax.runtime.signals import StopSignal
from mae_jax.tasks.measuring import find_sources, match_to_classifier, open_checkpoint, open_data, write_measurement
from mae_jax.workdir.reporting import provenance
from mae_jax.workdir.writing import save_picture, write_json, writing_table

TABLE, SHEET = "predictions.csv", "predictions.png"
SHOWN_BAD = 3
RowsOf = ClassRows | MultiRows | NumberRows
WriteRow = Callable[[Sequence], None]


def run(config: ConfigDict, workdir: Path, stop: StopSignal) -> None:
    """Writes predictions.csv, predictions.png and result.json for `data.path`, or for the checkpoint's own pictures."""
    weights, config, source, names = open_pictures(config, workdir)
    kind, std = weights.config.get("label_kind", "class"), weights.config.get("number_std") or ()
    data, state = open_data(weights, config, None, source)
    source = data.evaluation
    write_json(workdir / "config.json", config.to_dict() | provenance())
    rows_of = make_rows(kind, names, std, config.predict.top, is_labelled(source))
    pictures = EachPicture(make_outputs(config, data, state, kind), data, source)
    with writing_table(workdir / TABLE, ["file", *rows_of.columns, "error"]) as write_row:
        found = collect(pictures, rows_of, kind, write_row, source)
        for index, why in sorted(pictures.bad.items()):
            write_row([escaped(source.file_of(index)), *[""] * len(rows_of.columns), escaped(why)])
    scores = found.scores(kind, std)
    say(f"{len(found.index):,} of {len(source):,} pictures, of which {found.labelled:,} have a label")
    say(*([tell(scores)] if scores else []))
    for index, why in sorted(pictures.bad.items())[:SHOWN_BAD]:
        say(f"bad: {escaped(source.file_of(index))}: {escaped(why)}")
    files = [TABLE]
    if len(found.index) and config.predict.pictures:
        order = "the largest errors first" if kind == "number" else "wrong ones first, then the least sure"
        brackets = "; in brackets: the label" if found.labelled else ""
        save_sheet(workdir / SHEET, config, source, found, [f"{state.name}: {order}{brackets}", tell(scores)])
        files.append(SHEET)
    result = {"step": state.step, "images": len(found.index), "bad": len(pictures.bad), "labelled": found.labelled}
    result |= {f"eval/{name}": value for name, value in scores.items()}
    write_measurement(workdir, config, result | {"class_names": [escaped(name) for name in names]})
    say(f"see {', '.join(f'{workdir}/{file}' for file in files)}")


def open_pictures(config: ConfigDict, workdir: Path) -> tuple[Weights, ConfigDict, Source, list[str]]:
    """The classifier, its settings, the pictures and the names of its classes.

    Without `data.name`, `data.path` is one picture or a folder, whatever the checkpoint's own data are.
    """
    path = config.data.path if config.data.name is None else None
    if path:
        config.data.path = None
    weights, config = open_checkpoint(config, workdir, needs_data=not path)
    if not is_classifier(weights.config):
        raise UserError(
            f"init_from={config.init_from} is an autoencoder, which knows no classes: fine-tune it by "
            "configs/finetune.py, or give a classifier"
        )
    if path:
        config.data.name, config.data.path = None, path  # for result.json
        names = list(weights.config.get("class_names") or ())
        known = names if weights.config.get("label_kind", "class") == "class" else ()
        source = PictureFiles(path, known, extensions=config.data.extensions)
    else:
        _, source = find_sources(weights, config, to_train=False)
    return weights, config, *match_to_classifier(source, weights, config)


def make_rows(kind: str, names: list[str], std: Sequence[float], top: int, labelled: bool) -> RowsOf:
    if kind == "class":
        return ClassRows(names, top, labelled)
    return MultiRows(names, labelled) if kind == "multi" else NumberRows(names, std, labelled)


def make_outputs(config: ConfigDict, data: EvaluationData, state: Trained, kind: str) -> Callable[[dict], tuple]:
    """Device batch -> outputs [B, K], labels, and of classes the other parts of `Predictions`."""
    outputs_of = functools.partial(Accuracy(config, data).outputs_of, state.variables())

    def function(batch: dict) -> tuple:
        outputs = outputs_of(batch)
        return outputs, *(judge(outputs, batch["label"]) if kind == "class" else (batch["label"],))

    return function


class Found(NamedTuple):
    """What is kept of the usable pictures, in order."""

    index: np.ndarray  # [n] in the source
    doubt: np.ndarray  # [n], see `Rows`
    words: list[str]  # captions
    judged: list[np.ndarray]  # of those with labels: the parts of `Predictions`; of other kinds labels and outputs

    @property
    def labelled(self) -> int:
        return len(self.judged[0]) if self.judged else 0

    def scores(self, kind: str, std: Sequence[float]) -> dict[str, float]:
        """As of the task evaluate; empty without labels."""
        if not self.labelled:
            return {}
        if kind == "class":
            return Predictions(*self.judged).scores()
        labels, outputs = self.judged
        return predictions_of(kind, outputs, labels, std).scores()


def collect(pictures: EachPicture, rows_of: RowsOf, kind: str, write_row: WriteRow, source: Source) -> Found:
    """Writes a row for each usable picture, while they are read."""
    index, doubt, words, judged = [], [], [], []
    for indices, (outputs, labels, *judgement) in pictures:
        if kind != "class" and labels.shape != outputs.shape:  # there are none
            labels = np.full(outputs.shape, np.nan, np.float32)
        rows = rows_of(outputs, labels)
        for place, cells in zip(indices.tolist(), rows.cells, strict=True):
            write_row([escaped(source.file_of(place)), *cells, ""])
        index.append(indices)
        doubt.append(rows.doubt)
        words += rows.words
        known = labels >= 0 if kind == "class" else ~np.isnan(labels).any(axis=1)
        judged.append([part[known] for part in (labels, *(judgement or [outputs]))])
    joined = [np.concatenate(parts) for parts in zip(*judged, strict=True)] if is_labelled(source) else []
    return Found(np.concatenate(index), np.concatenate(doubt), words, joined)


def save_sheet(path: Path, config: ConfigDict, source: Source, found: Found, caption: list[str]) -> None:
    """The pictures that a person should look at first."""
    if is_main():
        first = np.argsort(-found.doubt, kind="stable")[: config.predict.pictures]
        words = [found.words[place] for place in first]
        save_picture(path, draw_pictures(config, source, found.index[first], words, caption))
