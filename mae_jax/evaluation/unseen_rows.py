"""Of tables, parquet and tars: which pictures are measured, whether a model has learned from them, and whether a run's
training pictures are still the same."""

import os
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mae_jax.data.rows import RowSource
from mae_jax.data.sources import Source, make_source
from mae_jax.runtime.errors import UserError
from mae_jax.settings.fields import defaults

SPLITTING = ("train_split", "eval_split", "eval_fraction", "stratify")
# Settings that decide which rows are held out, besides the path.
DECIDING = (*SPLITTING, "split_column", "group_column", "label_column", "label_kind", "label_separator")


def check_unchanged(workdir: Path, trained: dict[str, Any], train: Source) -> None:
    """UserError if the training pictures of a resumed run are not those it began with, in the same order.

    Otherwise it could be evaluated on pictures that it has learned from. Not checked: folders, which may grow.
    """
    if trained.get("train_pictures") not in (None, train.digest()):
        raise UserError(
            f"--workdir={workdir}: the {len(train):,} training pictures {train.place} are not the "
            f"{trained['num_train_examples']:,} that the run began with, in their order: put the data and their "
            "settings back, or start in another --workdir (with --config.init_from to keep the weights)"
        )


def choose_rows(data: dict[str, Any], trained: dict[str, Any], given: set[str]) -> tuple[dict[str, Any], str]:
    """`choose_pictures` for rows: all of other data than the checkpoint's that have no splits, and what it held out."""
    own, usual = trained["data"], defaults().data.to_dict() | {"eval_fraction": 1.0}
    alike = own["name"] == data["name"]
    here = alike and (os.path.exists(own["path"]) or "://" in own["path"])
    moved = data | {name: own[name] for name in DECIDING} if alike else {}
    is_own = (
        _same_place(own["path"], data["path"]) if here else alike and _digest(moved) == trained.get("train_pictures")
    )
    kept = own if is_own else usual
    chosen = {name: data[name] if name in given else kept[name] for name in SPLITTING}
    if not alike:
        return chosen, ""
    if not is_own and not here:
        return chosen, f"the data it was trained on, {own['path']}, are not here: make sure data.path has none of them"
    learned = _open(moved if is_own else data | own, "train")
    if learned is None or learned.digest() != trained.get("train_pictures"):
        return chosen, f"{own['path']} has changed since the training: make sure no picture measured was trained on"
    if is_own and all((data | chosen)[name] == own[name] for name in DECIDING):
        return chosen, ""  # held out by construction
    measured = make_source(ConfigDict(data | chosen), "eval", (1, 1), 1).places()
    count = len({*measured} & {*learned.places()})
    return chosen, f"{count:,} of the {len(measured):,} pictures measured were used for training" if count else ""


def _open(data: dict[str, Any], split: str) -> RowSource | None:
    try:
        return make_source(ConfigDict(data), split, (1, 1), 1)
    except UserError:
        return None


def _digest(data: dict[str, Any]) -> str:
    source = _open(data, "train")
    return source.digest() if source else ""


def _same_place(one: str, other: str | None) -> bool:
    return one == other or other is not None and os.path.realpath(one) == os.path.realpath(other)
