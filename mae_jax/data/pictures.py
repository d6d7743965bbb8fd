"""A few pictures to look at, without classes or splits."""

from pathlib import Path

import numpy as np

from mae_jax.data.image_folder import EXTENSIONS
from mae_jax.errors import UserError


class PictureFiles:
    """One picture file, or all below a folder in the order of their names, as an unlabelled source.

    Raises:
      UserError: if there is no such file or folder, or no picture in it.
    """

    num_classes = 0
    class_names = None
    in_memory, picture_size = False, None

    def __init__(self, path: str | Path):
        path = Path(path)
        if not path.exists():
            raise UserError(f"data.path={path} does not exist; give a picture or a folder of pictures")
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        self._files = [file for file in files if file.suffix.lower() in EXTENSIONS and not file.name.startswith(".")]
        if not self._files:
            raise UserError(f"data.path={path} holds no picture ({', '.join(e[1:] for e in EXTENSIONS)})")

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict:
        return {"image": self._files[index].read_bytes(), "label": -1}

    def labels(self) -> np.ndarray:
        return np.full(len(self), -1, np.int64)

    def name_of(self, index: int) -> str:
        return str(self._files[index])
