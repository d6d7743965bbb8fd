"""Picture files: their formats, finding them below a folder, and reading one."""

import contextlib
import errno
import os
import stat
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from mae_jax.runtime.errors import UserError, reason, with_patience

Image.init()  # registers all formats
with contextlib.suppress(ImportError):  # optional: phones write HEIF
    from pillow_heif import register_heif_opener

    register_heif_opener()

# Not all that Pillow knows: some formats start other programs (EPS).
FORMATS = tuple(
    name for name in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "DIB", "PPM", "AVIF", "HEIF") if name in Image.OPEN
)
_NAMES = {*FORMATS, "MPO"}  # MPO holds several JPEGs in one file, and opens as JPEG
EXTENSIONS = tuple(sorted(extension for extension, name in Image.EXTENSION.items() if name in _NAMES))
_HEIF = {".heic", ".heif", ".hif"}

MAX_BYTES = 2**30  # of a file: 6 per pixel of the largest picture that Pillow decodes
# Skipped like names with a leading dot: made by disks, file servers and archives.
HIDDEN = ("lost+found", "@eaDir", "__MACOSX", "$RECYCLE.BIN", "System Volume Information")
SHOWN = 5  # most names in a line


class Listing(NamedTuple):
    files: list[str]  # pictures, sorted, relative to the folder
    empty: list[str]  # direct sub-folders without a picture, sorted
    unread: Counter[str]  # other files by type: extension, or pipe, socket, device


def list_pictures(folder: Path, skip: Collection[str] = ()) -> Listing:
    """Lists the pictures at any depth below `folder`, except in its sub-folders named in `skip`.

    Links are followed; hidden names, and all but regular files, are left out. Raises UserError for unreadable folders
    and broken links, whose pictures would be missing silently.
    """
    files, unread, top = [], Counter(), []
    waiting = [(str(folder), "", frozenset())]  # path, path relative to `folder`, real paths of its parents
    while waiting:
        path, prefix, parents = waiting.pop()
        here = os.path.realpath(path)
        if here in parents:  # a link to a parent
            continue
        for entry in _visible(path):
            kind = _kind(entry)
            if kind == "folder":
                if prefix or entry.name not in skip:
                    waiting.append((entry.path, prefix + entry.name + os.sep, parents | {here}))
                    if not prefix:
                        top.append(entry.name)
            elif kind == "file" and is_picture_name(entry.name):
                files.append(prefix + entry.name)
            else:
                unread[_extension(entry.name) if kind == "file" else kind] += 1
    files.sort()
    full = set(folders_of(files))
    return Listing(files, sorted(name for name in top if name not in full), unread)


def folder_of(file: str) -> str:
    """The first folder of a relative path: its picture's class."""
    return file.split(os.sep, 1)[0]


def folders_of(files: list[str]) -> list[str]:
    """The distinct first folders of relative paths, sorted; plain file names have none."""
    return sorted({folder_of(file) for file in files if os.sep in file})


def sub_folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted, without hidden ones."""
    return sorted(entry.name for entry in _visible(folder) if _kind(entry) == "folder")


def holds_pictures(folder: Path) -> bool:
    """Whether there are pictures directly in the folder."""
    return any(_kind(entry) == "file" and is_picture_name(entry.name) for entry in _visible(folder))


def is_picture_name(name: str) -> bool:
    """Whether a file name has the extension of a picture, in any case."""
    return name.lower().endswith(EXTENSIONS)


def describe_unread(unread: Counter[str]) -> str:
    """One line about files that are not pictures; empty if there are none."""
    if not unread:
        return ""
    total, ranked = sum(unread.values()), sorted(unread.items(), key=lambda item: (-item[1], item[0]))
    what = "files of types that are" if total > 1 else "file of a type that is"
    line = f"{total:,} {what} not read: {first_few([f'{kind} {count:,}' for kind, count in ranked])}"
    return line + ("; pip install pillow-heif reads .heic" if _HEIF & unread.keys() else "")


def first_few(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def find_folder(path: str | None) -> Path:
    """The folder `data.path`; raises UserError if it is unset or no folder."""
    if not path:
        raise UserError("data.path is not set: an image folder needs it, e.g. --config.data.path=/data/pictures")
    check_exists(path)
    if not os.path.isdir(path):
        raise UserError(
            f"data.path={path} is a file, not a folder; set data.path to the folder of your pictures, "
            "after unpacking it if it is an archive"
        )
    return Path(path)


def check_exists(path: str) -> None:
    """Raises UserError, with the cause, if the file or folder `data.path` is missing or unreadable."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        what = ": there is no such folder; set data.path to the folder of your pictures"
        if os.path.islink(path):
            what = f" is a link to {os.readlink(path)}, which does not exist"
        elif any(character in path for character in "*?["):
            what = ": patterns are not expanded; set data.path to the folder that holds the pictures"
        raise UserError(f"data.path={path}{what}") from error
    except OSError as error:
        raise UserError(f"data.path={path} cannot be read: {reason(error)}") from error


def read_picture_file(path: str | Path) -> bytes:
    """A file's content; raises OSError if it is unreadable, no regular file, or larger than MAX_BYTES."""
    with open(path, "rb", opener=_open_without_waiting) as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        if status.st_size > MAX_BYTES:
            raise OSError(errno.EINVAL, f"it has {status.st_size:,} bytes, more than {MAX_BYTES:,}", str(path))
        return stream.read(status.st_size)


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a FIFO would wait for a writer


def _visible(folder: str | Path) -> list[os.DirEntry]:
    def scan():
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".") and entry.name not in HIDDEN]

    try:
        return with_patience(scan)
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {reason(error)}; fix that, or move the folder elsewhere") from error


def _kind(entry: os.DirEntry) -> str:
    """file, folder, pipe, socket or device."""
    if entry.is_file(follow_symlinks=False):  # these two need no further system call
        return "file"
    if entry.is_dir(follow_symlinks=False):
        return "folder"
    try:
        mode = entry.stat().st_mode
    except FileNotFoundError as error:
        target = os.readlink(entry.path) if entry.is_symlink() else "nothing"
        raise UserError(f"{entry.path} is a link to {target}, which does not exist: fix or remove the link") from error
    except OSError as error:
        raise UserError(f"{entry.path} cannot be read: {reason(error)}; fix or remove it") from error
    tests = {"file": stat.S_ISREG, "folder": stat.S_ISDIR, "pipe": stat.S_ISFIFO, "socket": stat.S_ISSOCK}
    return next((kind for kind, is_kind in tests.items() if is_kind(mode)), "device")


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "without extension"
