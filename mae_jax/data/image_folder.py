"""A folder of pictures as a source: class folders, or a flat folder without labels."""

import hashlib
import os
from pathlib import Path

import numpy as np

from mae_jax.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
EVAL_FOLDERS = ("val", "validation", "test")  # looked for where there is no folder named data.eval_split


class ImageFolder:
    """Pictures of `path`, as encoded bytes.

    Training pictures lie in the sub-folder `train_split` of `path` if there is one, otherwise in `path` itself;
    evaluation pictures in `eval_split`, `val`, `validation` or `test`. Where there is no such folder, the share
    `eval_fraction` of the training pictures is held out for evaluation. Folders of pictures are classes, in the
    order of their names; a picture may lie at any depth below its class folder. A folder that holds the pictures
    themselves is unlabelled. Hidden files and folders are skipped.

    Raises:
      UserError: no path, no folder, no pictures, or an evaluation class that training does not have.
    """

    in_memory, picture_size = False, None

    def __init__(self, path: str | None, split: str, train_split: str, eval_split: str, eval_fraction: float):
        if not path:
            raise UserError("data.path is not set: an image folder needs it, e.g. --config.data.path=/data/pictures")
        if not os.path.isdir(path):
            raise UserError(f"data.path={path}: there is no such folder; set data.path to the folder of your pictures")
        root = Path(path)
        has_train_folder = bool(train_split) and (root / train_split).is_dir()
        train_folder = root / train_split if has_train_folder else root
        names = dict.fromkeys((eval_split, *EVAL_FOLDERS))
        eval_folder = next((root / name for name in names if name and (root / name).is_dir()), None)
        if eval_folder == train_folder:
            eval_folder = None

        if has_train_folder and eval_folder is None:
            _check_no_other_classes(root, train_split)
        skip = () if has_train_folder or eval_folder is None else (eval_folder.name,)
        files, class_names = _find_pictures(train_folder, skip)
        if eval_folder is None:
            train_files, eval_files = _hold_out(files, eval_fraction, train_folder)
            files = train_files if split == "train" else eval_files
            self._folder = train_folder
        elif split == "train":
            self._folder = train_folder
        else:
            self._folder = eval_folder
            files, eval_classes = _find_pictures(eval_folder)
            _check_classes(eval_folder, eval_classes, train_folder, class_names)
            class_names = class_names if eval_classes else None
        self._files = files
        self.class_names = class_names
        self.num_classes = len(class_names) if class_names else 0
        self._label_of = {name: label for label, name in enumerate(class_names or ())}

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict:
        file = self._files[index]
        with open(os.path.join(self._folder, file), "rb") as stream:
            return {"image": stream.read(), "label": self._label(file)}

    def _label(self, file: str) -> int:
        return self._label_of[file.split(os.sep, 1)[0]] if self._label_of else -1

    def labels(self) -> np.ndarray:
        """int64 [n]: the labels of all pictures, -1: none; from their folders' names."""
        return np.asarray([self._label(file) for file in self._files], np.int64)

    def name_of(self, index: int) -> str:
        return os.path.join(self._folder, self._files[index])


def _find_pictures(folder: Path, skip: tuple[str, ...] = ()) -> tuple[list[str], list[str] | None]:
    """Lists the pictures below `folder`, sorted, relative to it, and the class names (None: a flat folder)."""
    files, above = [], {str(folder): frozenset()}  # above: the real folders that a folder lies in
    for parent, folders, names in os.walk(folder, followlinks=True):
        # Folders are often links to data elsewhere; a link to a folder above would go round for ever.
        here = os.path.realpath(parent)
        if here in above[parent]:
            folders.clear()
            continue
        skipped = skip if parent == str(folder) else ()
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in skipped)
        above.update((os.path.join(parent, name), above[parent] | {here}) for name in folders)
        prefix = os.path.relpath(parent, folder)
        for name in names:
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                files.append(name if prefix == "." else os.path.join(prefix, name))
    files.sort()
    if not files:
        raise UserError(f"no pictures found in {folder}: expected files ending in {' '.join(EXTENSIONS)}, any case")
    classes = sorted({file.split(os.sep, 1)[0] for file in files if os.sep in file})
    loose = next((file for file in files if os.sep not in file), None)
    if classes and loose:
        raise UserError(
            f"{folder} holds both pictures ({loose}) and folders of pictures ({classes[0]}): "
            "move all pictures into class folders, or all into the folder itself"
        )
    return files, classes or None


def _check_no_other_classes(root: Path, train_split: str):
    """Refuses a folder where `train_split` looks like one class (trains, beside cars) and not like a split."""
    for folder in sorted(root.iterdir()):
        if folder.is_dir() and folder.name != train_split and not folder.name.startswith("."):
            if any(name.lower().endswith(EXTENSIONS) for _, _, names in os.walk(folder) for name in names):
                raise UserError(
                    f"{root} holds pictures in {train_split} and in {folder.name}: is {train_split} a class or a "
                    "split? Set data.train_split='' for a class; for a split, name the other one in data.eval_split"
                )


def _hold_out(files: list[str], fraction: float, folder: Path) -> tuple[list[str], list[str]]:
    """Parts `files` into training and evaluation, at least one picture each, as far as possible.

    A hash of each name decides, not data.seed: the parts are the same on every host and in every run, so that a
    later run never evaluates on what an earlier one learned from, and they hardly change when pictures are added.
    """
    if len(files) < 2:
        raise UserError(f"{folder} holds {len(files)} picture: at least 2 are needed, one to train and one to evaluate")
    count = min(len(files) - 1, max(1, round(fraction * len(files))))
    ranked = sorted(files, key=lambda file: hashlib.blake2b(file.encode("utf-8", "surrogateescape")).digest())
    held_out = set(ranked[:count])
    return [file for file in files if file not in held_out], [file for file in files if file in held_out]


def _check_classes(eval_folder: Path, eval_classes: list[str] | None, train_folder: Path, classes: list[str] | None):
    unknown = sorted(set(eval_classes or ()) - set(classes or ()))
    if unknown:
        raise UserError(
            f"{eval_folder} has the class folder {unknown[0]!r} ({len(unknown)} such) that {train_folder} lacks: "
            "give both the same class folders"
        )
