"""Picture files: their formats, finding them below a folder, and reading one."""

import contextlib
import errno
import os
import stat
import time
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from mae_jax.data.cache import entry_of, read_entry, write_entry
from mae_jax.runtime.errors import UserError, reason, with_patience

Image.init()  # registers all formats
with contextlib.suppress(ImportError):  # optional: phones write HEIF
    from pillow_heif import register_heif_opener

    register_heif_opener()

# Not all that Pillow knows: some formats start other programs (EPS).
FORMATS = tuple(
    name for name in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "DIB", "PPM", "AVIF", "HEIF") if name in Image.OPEN
)
ARRAYS = (".npy", ".npz")  # such files may also hold labels or masks of the pictures beside them
# MPO holds several JPEGs in one file, and opens as JPEG.
EXTENSIONS = tuple(
    sorted({".dcm", *ARRAYS, *(extension for extension, name in Image.EXTENSION.items() if name in (*FORMATS, "MPO"))})
)

MAX_BYTES = 2**30  # of a file: 6 per pixel of the largest picture that Pillow decodes
# Skipped like names with a leading dot: made by disks, file servers and archives.
HIDDEN = ("lost+found", "@eaDir", "__MACOSX", "$RECYCLE.BIN", "System Volume Information")
SHOWN = 5  # most names in a line
LONG = 10_000  # pictures from which a listing is kept in the cache
TICK, COARSE_TICK = 10**8, 2 * 10**9  # ns: more than the clocks of file systems need to go on; of FAT's, for example


class Listing(NamedTuple):
    files: list[str]  # pictures, sorted, relative to the folder
    empty: list[str]  # direct sub-folders without a picture, sorted
    unread: Counter[str]  # other files by type: extension, or pipe, socket, device
    notes: tuple[str, ...] = ()  # lines for users


def list_pictures(folder: Path, skip: Collection[str] = (), extensions: tuple[str, ...] = EXTENSIONS) -> Listing:
    """Lists the pictures at any depth below `folder`, except in its sub-folders named in `skip`. Links are followed.

    A long listing is kept in the cache, for as long as no folder in it is changed. Raises UserError for unreadable
    folders and broken links, whose pictures would be missing silently.
    """
    entry = entry_of("listing", folder, *sorted(skip), "", *(extensions if extensions != EXTENSIONS else ()))
    known = [*extensions, *HIDDEN]
    kept = read_entry(entry)
    if kept and kept["known"] == known and all(_time_of(path) == changed for path, changed in kept["folders"].items()):
        files, day = kept["files"].split("\0"), time.strftime("%Y-%m-%d %H:%M", time.localtime(kept["time"]))
        note = f"{len(files):,} pictures as listed on {day}, since no folder in {folder} has changed ({entry})"
        return Listing(files, kept["empty"], Counter(kept["unread"]), (note,))
    folders: dict[str, int | None] = {}
    found = _list_anew(folder, skip, extensions, folders)
    if len(found.files) >= LONG and None not in folders.values():
        content = {"files": "\0".join(found.files), "empty": found.empty, "unread": dict(found.unread)}
        write_entry(entry, content | {"known": known, "folders": folders, "time": time.time()})
    return found


def _time_of(folder: str) -> int | None:
    """When a folder's entries last changed, ns; None if they could change again without another time."""
    try:
        changed = os.stat(folder).st_mtime_ns
    except OSError:
        return None
    return changed if time.time_ns() - changed > (COARSE_TICK if changed % 10**6 == 0 else TICK) else None


def _list_anew(
    folder: Path, skip: Collection[str], extensions: tuple[str, ...], folders: dict[str, int | None]
) -> Listing:
    """`list_pictures` without the cache; notes each folder's time in `folders`."""
    files, unread, top = [], Counter(), []
    waiting = [(str(folder), "", frozenset())]  # path, path relative to `folder`, real paths of its parents
    while waiting:
        path, prefix, parents = waiting.pop()
        here = os.path.realpath(path)
        folders[path] = _time_of(path)
        for name, kind in _scan(path) if here not in parents else ():  # a link may lead to a parent
            if kind == "file" and is_picture_name(name, extensions):
                files.append(prefix + name)
            elif kind == "file":
                unread[os.path.splitext(name)[1].lower() or "without extension"] += 1
            elif kind != "folder":
                unread[kind] += 1
            elif prefix or name not in skip:
                waiting.append((os.path.join(path, name), prefix + name + os.sep, parents | {here}))
                top += [] if prefix else [name]
    return Listing(sorted(files), sorted({*top} - {*folders_of(files)}), unread)


def folder_of(file: str) -> str:
    """The first folder of a relative path: its picture's class."""
    return file.split(os.sep, 1)[0]


def folders_of(files: list[str]) -> list[str]:
    """The distinct first folders of relative paths, sorted; plain file names have none."""
    return sorted({folder_of(file) for file in files if os.sep in file})


def sub_folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted, without hidden ones."""
    return sorted(name for name, kind in _scan(folder) if kind == "folder")


def holds_pictures(folder: Path) -> bool:
    return any(kind == "file" and is_picture_name(name) for name, kind in _scan(folder))


def is_picture_name(name: str, extensions: tuple[str, ...] = EXTENSIONS) -> bool:
    return name.lower().endswith(extensions)


def check_extensions(extensions: Sequence[str] | None) -> tuple[str, ...]:
    """The endings of the files to read, as `data.extensions` says; UserError for others than EXTENSIONS."""
    if extensions is None:
        return EXTENSIONS
    chosen = (extensions,) if isinstance(extensions, str) else tuple(extensions)
    if not chosen or not all(isinstance(name, str) and name.lower() in EXTENSIONS for name in chosen):
        raise UserError(f"data.extensions={extensions!r} must be some of {' '.join(EXTENSIONS)}, such as ('.tif',)")
    return tuple(name.lower() for name in chosen)


def check_one_kind(folder: Path, files: list[str]) -> None:
    """Raises UserError for pictures next to NumPy arrays, which may be their masks."""
    picture, array = (
        next((file for file in files if file.lower().endswith(ARRAYS) == is_array), None) for is_array in (False, True)
    )
    if picture and array:
        raise UserError(
            f"{folder} holds both pictures ({picture}) and arrays ({array}): which are meant? Set for example "
            f"""--config.data.extensions="('{os.path.splitext(array)[1].lower()}',)\""""
        )


def describe_unread(*listings: Listing) -> list[str]:
    """A line about files that are not pictures; none if there are none."""
    unread = sum((listing.unread for listing in listings), Counter())
    ranked = sorted(unread.items(), key=lambda item: (-item[1], item[0]))
    kinds = first_few([f"{kind} {count:,}" for kind, count in ranked])
    line = f"{unread.total():,} files of types that are not read: {kinds}"
    line += "; pip install pillow-heif reads .heic" if {".heic", ".heif", ".hif"} & unread.keys() else ""
    return [line] if unread else []


def first_few(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def find_folder(path: str | None) -> Path:
    """The folder `data.path`; raises UserError if it is unset or no folder."""
    if not path:
        raise UserError("data.path is not set: an image folder needs it, e.g. --config.data.path=/data/pictures")
    check_exists(path)
    if not os.path.isdir(path):
        raise UserError(f"data.path={path} is a file, not a folder; name a folder, and unpack archives first")
    return Path(path)


def check_exists(path: str, setting: str = "data.path") -> None:
    """Raises UserError, with the cause, if the file or folder of a setting is missing or unreadable."""
    try:
        os.stat(path)
    except OSError as error:
        target = f", a link to {os.readlink(path)}," if os.path.islink(path) else ""
        remedy = f"set {setting} to the folder of your pictures (patterns are not expanded)"
        raise UserError(f"{setting}={path}{target} cannot be read: {reason(error)}; {remedy}") from error


def read_picture_file(path: str | Path) -> bytes:
    """A file's content; raises OSError if it is unreadable, no regular file, or larger than MAX_BYTES."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # a FIFO would wait for a writer
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    if status.st_size > MAX_BYTES:
        raise OSError(errno.EINVAL, f"it has {status.st_size:,} bytes, more than {MAX_BYTES:,}", str(path))
    with open(path, "rb") as file:
        return file.read()


def _scan(folder: str | Path) -> list[tuple[str, str]]:
    """Names in a folder, without hidden ones, and their kinds: file, folder, pipe, socket or device."""

    def read():
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".") and entry.name not in HIDDEN]

    try:
        entries = with_patience(read)
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {reason(error)}; fix that, or move the folder elsewhere") from error
    return [(entry.name, _kind(entry)) for entry in entries]


def _kind(entry: os.DirEntry) -> str:
    try:
        if entry.is_file():  # these two need a system call only for links
            return "file"
        if entry.is_dir():
            return "folder"
        kinds = {stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
        return kinds.get(stat.S_IFMT(entry.stat().st_mode), "device")
    except OSError as error:
        target = f", a link to {os.readlink(entry.path)}," if entry.is_symlink() else ""
        raise UserError(f"{entry.path}{target} cannot be read: {reason(error)}; fix or remove it") from error
