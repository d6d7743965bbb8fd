"""Parting the pictures of a folder into those for training and those for evaluation."""

import hashlib
from collections import defaultdict
from pathlib import Path

from mae_jax.data.listing import folder_of
from mae_jax.runtime.errors import UserError


def hold_out(files: list[str], fraction: float, folder: Path, by_class: bool) -> tuple[list[str], list[str]]:
    """Parts the pictures of `folder` into training and evaluation: of each class if `by_class`, else of all together.

    Each class of two or more pictures is on both sides; the picture of a class that has only one is for training (where
    all have only one, they count as one class: pre-training needs no labels). A hash of each name decides, not
    data.seed: the parts are the same on every host and in every run, so that a later run never evaluates on what an
    earlier one learned from, and they hardly change when pictures are added.

    Args:
      files: paths relative to `folder`; the first folder of each is its class.
      fraction: share that is for evaluation, in (0, 1]; 1: all.

    Raises:
      UserError: if there are too few pictures for two sides.
    """
    if fraction == 1:
        return [], files
    if len(files) < 2:
        raise UserError(f"{folder} holds {len(files)} picture: at least 2 are needed, one to train and one to evaluate")
    classes: dict[str, list[str]] = defaultdict(list)
    for file in files:
        classes[folder_of(file) if by_class else ""].append(file)
    if len(classes) == len(files):
        classes = {"": files}
    held_out: set[str] = set()
    for members in classes.values():
        count = min(len(members) - 1, max(1, round(fraction * len(members))))
        held_out.update(sorted(members, key=_rank)[:count])
    return [file for file in files if file not in held_out], [file for file in files if file in held_out]


def _rank(file: str) -> bytes:
    return hashlib.blake2b(file.encode("utf-8", "surrogateescape")).digest()
