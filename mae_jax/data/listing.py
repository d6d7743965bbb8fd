"""Finding the pictures in a folder, and telling of what is not read."""

import os
import stat
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from mae_jax.data.formats import EXTENSIONS
from mae_jax.runtime.errors import UserError, reason
from mae_jax.runtime.retry import with_patience

# Beside names with a leading dot: what disks, file servers and archives put among people's pictures.
HIDDEN = ("lost+found", "@eaDir", "__MACOSX", "$RECYCLE.BIN", "System Volume Information")
SHOWN = 5  # names in a line at most
_HEIF = {".heic", ".heif", ".hif"}


class Listing(NamedTuple):
    """What lies below a folder."""

    files: list[str]  # pictures, sorted, relative to the folder
    empty: list[str]  # sub-folders of the folder itself without a picture in them, sorted
    unread: Counter[str]  # other files, by type: their extension, or pipe, socket, device


def list_pictures(folder: Path, skip: Collection[str] = ()) -> Listing:
    """Lists the pictures at any depth below `folder`, apart from its own sub-folders named in `skip`.

    Links are followed. Only regular files are pictures. Hidden files and folders are left out.

    Raises:
      UserError: for a folder that cannot be read, and for a link that leads nowhere: their pictures would be missing
        without a word.
    """
    files, unread, top = [], Counter(), []
    waiting = [(str(folder), "", frozenset())]  # path, the same relative to `folder`, real folders that it lies in
    while waiting:
        path, prefix, above = waiting.pop()
        # Folders are often links to data elsewhere; a link to a folder above would go round for ever.
        here = os.path.realpath(path)
        if here in above:
            continue
        for entry in _visible(path):
            kind = _kind(entry)
            if kind == "folder":
                if prefix or entry.name not in skip:
                    waiting.append((entry.path, prefix + entry.name + os.sep, above | {here}))
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
    """The first folders of those relative paths that have one, sorted."""
    return sorted({folder_of(file) for file in files if os.sep in file})


def sub_folders(folder: Path) -> list[str]:
    """The names of the folders in a folder, sorted, without hidden ones."""
    return sorted(entry.name for entry in _visible(folder) if _kind(entry) == "folder")


def holds_pictures(folder: Path) -> bool:
    """Whether pictures lie in the folder itself."""
    return any(_kind(entry) == "file" and is_picture_name(entry.name) for entry in _visible(folder))


def is_picture_name(name: str) -> bool:
    """Whether a file's name has an extension of a picture, in any case."""
    return name.lower().endswith(EXTENSIONS)


def describe_unread(unread: Counter[str]) -> str:
    """One line on the files that are not read; empty if there are none."""
    if not unread:
        return ""
    total, ranked = sum(unread.values()), sorted(unread.items(), key=lambda item: (-item[1], item[0]))
    what = "files of types that are" if total > 1 else "file of a type that is"
    line = f"{total:,} {what} not read: {first_few([f'{kind} {count:,}' for kind, count in ranked])}"
    return line + ("; pip install pillow-heif reads .heic" if _HEIF & unread.keys() else "")


def first_few(names: list[str]) -> str:
    """The first names of a list, for a line."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def find_folder(path: str | None) -> Path:
    """The folder that data.path names.

    Raises:
      UserError: if it names none, or what is no folder.
    """
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
    """Raises UserError, with the cause, unless data.path names something that is there and may be looked at."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        if os.path.islink(path):
            raise UserError(f"data.path={path} is a link to {os.readlink(path)}, which does not exist") from error
        if any(character in path for character in "*?["):
            raise UserError(
                f"data.path={path}: patterns are not expanded; set data.path to the folder that holds the pictures"
            ) from error
        raise UserError(
            f"data.path={path}: there is no such folder; set data.path to the folder of your pictures"
        ) from error
    except OSError as error:
        raise UserError(f"data.path={path} cannot be read: {reason(error)}") from error


def _visible(folder: str | Path) -> list[os.DirEntry]:
    def scan():
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".") and entry.name not in HIDDEN]

    try:
        return with_patience(scan)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be read: {reason(error)}; mend that, or move the folder out of the data"
        ) from error


def _kind(entry: os.DirEntry) -> str:
    """file, folder, pipe, socket or device."""
    if entry.is_file(follow_symlinks=False):  # these two are known from the scan
        return "file"
    if entry.is_dir(follow_symlinks=False):
        return "folder"
    try:
        mode = entry.stat().st_mode
    except FileNotFoundError as error:
        target = os.readlink(entry.path) if entry.is_symlink() else "nothing"
        raise UserError(f"{entry.path} is a link to {target}, which does not exist: mend or remove the link") from error
    except OSError as error:
        raise UserError(f"{entry.path} cannot be read: {reason(error)}; mend or remove it") from error
    tests = {"file": stat.S_ISREG, "folder": stat.S_ISDIR, "pipe": stat.S_ISFIFO, "socket": stat.S_ISSOCK}
    return next((kind for kind, is_kind in tests.items() if is_kind(mode)), "device")


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "without extension"
