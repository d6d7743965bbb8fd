"""SHA256SUMS in a checkpoint's folder, which shows whether its files are intact.

`sha256sum --check SHA256SUMS` can read it. The last line, a comment, is the digest of the lines before it.
"""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mae_jax.runtime.errors import reason
from mae_jax.runtime.retry import with_patience
from mae_jax.workdir.writing import write_atomically

NAME = "SHA256SUMS"
THREADS = 4  # hashing releases the GIL


def write_checksums(folder: Path) -> None:
    """Writes the digests of all files in a complete folder, in process 0."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(NAME)]
    with ThreadPoolExecutor(THREADS) as pool:
        pairs = zip(pool.map(_digest, files), files, strict=True)
        lines = "".join(f"{digest}  {file.relative_to(folder).as_posix()}\n" for digest, file in pairs)
    write_atomically(folder / NAME, f"{lines}# {hashlib.sha256(lines.encode()).hexdigest()}\n")


def find_damage(folder: Path, parts: Iterable[str] | None = None) -> str | None:
    """What is wrong with a folder's files; None: nothing, or it has no checksums. `parts`: sub-folders, None: all."""
    try:
        lines, _, seal = with_patience((folder / NAME).read_bytes).rpartition(b"# ")
        if seal != hashlib.sha256(lines).hexdigest().encode() + b"\n":
            return f"{NAME} has other bytes than were written"
        pairs = [line.split("  ", 1) for line in lines.decode().splitlines()]
        pairs = [(digest, name) for digest, name in pairs if parts is None or name.split("/", 1)[0] in parts]
    except FileNotFoundError:
        return None  # the run was killed before it wrote them, or the checkpoint is of an earlier version
    except OSError as error:
        return f"{NAME} cannot be read: {reason(error)}"

    def check(pair: tuple[str, str]) -> str | None:
        digest, name = pair
        try:
            same = with_patience(lambda: _digest(folder / name)) == digest
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {reason(error)}"
        return None if same else f"{name} has other bytes than were written"

    with ThreadPoolExecutor(THREADS) as pool:
        return next(filter(None, pool.map(check, pairs)), None)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
