"""PyTorch's files since 1.6: zip archives, checked for damage before anything of them is used."""

import pickletools
import zipfile
from typing import Any

CHUNK = 2**20  # bytes that are read at a time


def find_damage(archive: zipfile.ZipFile, torch: Any) -> str | None:
    """What is damaged, in a few words; None if nothing is.

    Each record has a CRC-32, unless the writer has turned them off (torch.serialization.set_crc32_options): then all
    are 0, and only names and sizes are checked.
    """
    entries = {entry.filename: entry for entry in archive.infolist()}
    if len(entries) < len(archive.infolist()):
        return "two of its records have the same name"
    has_checksums = any(entry.CRC for entry in entries.values())
    for name, entry in entries.items():
        entry.CRC = entry.CRC if has_checksums else None  # None: nothing to compare with
        try:
            with archive.open(entry) as record:
                while record.read(CHUNK):
                    pass
        except (zipfile.BadZipFile, EOFError) as error:
            return f"record {name}: {error}"
    [pickled] = (name for name in entries if name.endswith("/data.pkl"))
    for key, size in _expected_sizes(archive.read(entries[pickled]), torch).items():
        name = f"{pickled.removesuffix('data.pkl')}data/{key}"
        if name not in entries:
            return f"record {name} is missing"
        if entries[name].file_size < size:  # PyTorch would go on reading in what comes after it
            return f"record {name} has {entries[name].file_size:,} bytes, not {size:,}"
    return None


def _expected_sizes(pickled: bytes, torch: Any) -> dict[str, int]:
    """How many bytes a pickle reads of each storage's record, by the storage's key. The pickle is parsed, never run.

    PyTorch's pickler writes a storage as the tuple ("storage", its type, its key, its device, its length).
    """
    sizes, memo, values = {}, {}, []
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in ("GLOBAL", "BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"):
            values.append(argument)
        elif opcode.name in ("BINPUT", "LONG_BINPUT") and values:
            memo[argument] = values[-1]
        elif opcode.name in ("BINGET", "LONG_BINGET"):
            values.append(memo.get(argument))
        elif opcode.name == "BINPERSID":
            kind, key, _, length = values[-4:]
            name = kind.rpartition(" ")[2]
            width = 1 if name == "UntypedStorage" else getattr(torch, name).dtype.itemsize
            sizes[key] = max(sizes.get(key, 0), length * width)
    return sizes
