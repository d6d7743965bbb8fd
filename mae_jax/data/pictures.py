"""A few pictures to look at, without classes or splits."""

from pathlib import Path

import numpy as np

from mae_jax.data.files import read_picture_file
from mae_jax.data.formats import EXTENSIONS
from mae_jax.data.listing import check_exists, describe_unread, is_picture_name, list_pictures
from mae_jax.runtime.errors import UserError


class PictureFiles:
    """One picture file, or all below a folder in the order of their names, as an unlabelled source.

    Raises:
      UserError: if there is no such file or folder, or no picture in it.
    """

    num_classes = 0
    class_names = None
    in_memory, picture_size = False, None

    def __init__(self, path: str | Path):
        check_exists(str(path))
        path, unread = Path(path), ""
        if path.is_dir():
            found = list_pictures(path)
            self._files, unread = [path / file for file in found.files], describe_unread(found.unread)
        else:
            self._files = [path] if path.is_file() and is_picture_name(path.name) else []
        if not self._files:
            holds = f"holds no picture{f' ({unread})' if unread else ''}" if path.is_dir() else "is no picture"
            raise UserError(f"data.path={path} {holds}; files of pictures end in {' '.join(EXTENSIONS)}")
        self.place, self.notes = f"in {path}", [unread] if unread else []

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict:
        return {"image": read_picture_file(self._files[index]), "label": -1}

    def labels(self) -> np.ndarray:
        return np.full(len(self), -1, np.int64)

    def name_of(self, index: int) -> str:
        return str(self._files[index])
