"""Files that are whole whenever they exist."""

import json
import os
from pathlib import Path
from typing import Any

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


def write_json(path: Path, value: dict[str, Any]) -> Path:
    """Writes indented JSON as `write_atomically` does; returns the path."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")
    return path
