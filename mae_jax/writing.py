"""Files that are whole whenever they exist."""

import os
from pathlib import Path

from mae_jax.processes import only_main


@only_main
def write_atomically(path: Path, text: str) -> None:
    """Writes a file, whole or not at all. Of several processes only the first does.

    Raises:
      OSError: if it cannot be written; what was there is still there, and nothing else.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
