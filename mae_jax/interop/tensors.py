"""Reads safetensors and PyTorch files without trusting them, and writes them whole. It knows nothing of models."""

import argparse
import contextlib
import importlib
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mae_jax.runtime.errors import NotSaved, UserError, first_line, reason
from mae_jax.workdir.writing import parse_object, read_object, replacing

# Types that can be read: safetensors' names -> those that PyTorch and NumPy share.
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
ACCEPTED = "give a safetensors file, a PyTorch file (.pth, .pt, .bin), or a folder with one"
AGAIN = "download it again"
UNKNOWN_TYPE = "{}: tensor {!r} is of type {}; convert it to one of " + ", ".join(DTYPES.values())
LARGEST_JSON = 2**24  # bytes; the config.json of a classifier of 20,000 classes has 2^20
TORCH_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the start of a file before PyTorch 1.6, after its protocol
# Where a PyTorch file's state dict may be: the first one that holds tensors, else the top level.
STATE_DICTS = ("model", "state_dict", "model_state_dict", "module", "net", "model_ema", "state_dict_ema", "ema")
# Training checkpoints also hold a Namespace of arguments, with paths if submitit ran them. Pure paths touch no file and
# may be another system's. NumPy's values are skipped: numpy.dtype trusts a pickle.
_Skipped = type("_Skipped", (), dict.fromkeys(("__init__", "__setstate__"), lambda *_: None))
PLAIN_GLOBALS = [(argparse.Namespace, "argparse.Namespace"), (_Skipped, "numpy.dtype"), (_Skipped, "numpy.ndarray")]
for _numpy, _pathlib in (("core", "pathlib"), ("_core", "pathlib._local")):  # since NumPy 2, Python 3.13
    PLAIN_GLOBALS += [(_Skipped, f"numpy.{_numpy}.multiarray.{name}") for name in ("scalar", "_reconstruct")]
    PLAIN_GLOBALS += [(PurePosixPath, f"{_pathlib}.PosixPath"), (PureWindowsPath, f"{_pathlib}.WindowsPath")]


class Tensor(NamedTuple):
    """A tensor of a file; `read` gives its values in the file's precision."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    def values(self) -> np.ndarray:
        """The values in float32. Raises UserError if they are not finite."""
        with np.errstate(over="ignore"):
            values = self.read().astype(np.float32, copy=False)
        if not np.isfinite((values.min(initial=0), values.max(initial=0))).all():
            raise UserError(f"tensor {self.name} holds NaN or infinity (in float32); take another file")
        return values


Content = tuple[dict[str, Tensor], dict[str, Any]]


def read_tensors(path: Path) -> Content:
    """The tensors by name, and what else a PyTorch file holds (epoch, args, ...; see `plain`), running no code from it.

    Of a safetensors or PyTorch file, which its content tells, or of a folder with one or with its shards. Raises
    UserError if there is no file or several, or if one is damaged or may be harmful.
    """
    try:
        file = _find_weights(path) if path.is_dir() else path
        return _read_shards(file) if file.name.endswith(".index.json") else _read_file(file)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); check the path and its permissions") from error


def _find_weights(folder: Path) -> Path:
    names = [name + end for name in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")]
    # The first of transformers' names, even if a broken link: silently taking another file would be a surprise.
    found = [folder / name for name in names if os.path.lexists(folder / name)][:1]
    found = found or sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".pth", ".pt", ".bin"))
    if len(found) == 1:
        return found[0]
    kind = f"several files of tensors, {[file.name for file in found][:10]}" if found else "no file of tensors"
    raise UserError(f"{folder} holds {kind}; give the path of one, or a folder with model.safetensors")


def _read_file(path: Path) -> Content:
    if not path.is_file():
        raise UserError(f"{path} {'is not a regular file' if path.exists() else 'does not exist'}; {ACCEPTED}")
    with path.open("rb") as file:
        begin = file.read(64)
    zipped = begin.startswith(b"PK\x03\x04")
    if zipped or (begin.startswith(b"\x80") and begin[2:].startswith(TORCH_MAGIC)):
        return _read_torch(path, zipped)
    if begin[8:9] == b"{":
        return _read_safetensors(path)
    found = f"it begins with {begin[:30]!r}" if begin else "it is empty"  # a Git LFS pointer shows
    raise UserError(f"{path} is neither a safetensors nor a PyTorch file ({found}); {ACCEPTED}")


def _read_shards(index: Path) -> Content:
    places = read_json(index).get("weight_map")
    if not (isinstance(places, dict) and all(isinstance(place, str) for place in places.values())):
        raise UserError(f"{index} has no weight_map from names of tensors to names of files; {AGAIN}")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        bare = name == PurePosixPath(name).name == PureWindowsPath(name).name != ".." and name.isprintable()
        if not bare:  # or an index could name any file on this machine
            raise UserError(f"{index} names the file {name!r}, not one of its own folder; do not trust it, {AGAIN}")
        found, _ = _read_file(index.parent / name)
        tensors |= {tensor: value for tensor, value in found.items() if places.get(tensor) == name}
    if missing := [tensor for tensor in places if tensor not in tensors]:
        raise UserError(f"{places[missing[0]]} lacks the tensor {missing[0]!r}, which {index} promises; {AGAIN}")
    return tensors, {}


def _read_safetensors(path: Path) -> Content:
    tensors = {}
    try:
        file = safe_open(str(path), "np")  # refuses a header with inconsistent lengths, shapes and offsets
        for name in file.keys():  # noqa: SIM118 (it is no dict)
            header = file.get_slice(name)
            if header.get_dtype() not in DTYPES:
                raise UserError(UNKNOWN_TYPE.format(path, name, header.get_dtype()))
            tensors[name] = Tensor(name, tuple(header.get_shape()), partial(file.get_tensor, name))
    except SafetensorError as error:
        raise _damaged(path, error) from error
    return tensors, {}


def _read_torch(path: Path, zipped: bool) -> Content:
    torch = _import_torch(f"reading {path}", "give a .safetensors file")
    # Even with weights_only, earlier releases can be made to run code: CVE-2025-32434 (2.6), CVE-2026-24747 (2.10).
    if torch.__version__ < (2, 10):
        raise UserError(f"reading {path} safely needs PyTorch 2.10 or newer, not {torch.__version__}; upgrade torch")
    try:
        if zipped:  # checksums, which PyTorch ignores
            _check_archive(path)
        with path.open("rb") as file, torch.serialization.safe_globals(PLAIN_GLOBALS):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # a damaged archive or pickle can raise nearly anything
        raise _damaged(path, error) from error

    def holds_tensors(value: Any) -> bool:
        return isinstance(value, dict) and any(isinstance(part, torch.Tensor) for part in value.values())

    top = dict(content) if isinstance(content, dict) else {}
    place = next((name for name in STATE_DICTS if holds_tensors(top.get(name))), None)
    state = top.pop(place) if place else top
    if not holds_tensors(state):
        found = list(top)[:10] or type(content).__name__
        raise UserError(f"{path} holds no state dict, but {found}; save the weights as {{'model': model.state_dict()}}")
    tensors = {str(name): value for name, value in state.items() if isinstance(value, torch.Tensor)}
    return {name: _make_tensor(torch, path, name, value) for name, value in tensors.items()}, top


def _check_archive(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        names = {entry.filename.partition("/")[2] for entry in entries}
        if "data.pkl" not in names or "constants.pkl" in names:
            raise UserError(f"{path} holds no state dict that torch.save wrote (TorchScript?); {ACCEPTED}")
        # All checksums are 0 if the writer turned them off (torch.serialization.set_crc32_options).
        record = archive.testzip() if any(entry.CRC for entry in entries) else None
        if record or len(names) < len(entries):
            fault = f"record {record} has another checksum" if record else "two of its records have the same name"
            raise UserError(f"{path} is damaged ({fault}); {AGAIN}")


def _make_tensor(torch: Any, path: Path, name: str, value: Any) -> Tensor:
    dtype = str(value.dtype).removeprefix("torch.")
    if value.layout != torch.strided or value.device.type != "cpu" or dtype not in DTYPES.values():
        raise UserError(UNKNOWN_TYPE.format(path, name, f"{dtype} ({value.layout}, {value.device})"))
    value = value.detach().resolve_neg()
    if dtype == "bfloat16":  # NumPy has it only from ml_dtypes
        return Tensor(name, tuple(value.shape), lambda: value.view(torch.int16).numpy().view(ml_dtypes.bfloat16))
    return Tensor(name, tuple(value.shape), value.numpy)


def _import_torch(doing: str, otherwise: str) -> Any:
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise UserError(f"{doing} needs PyTorch: pip install torch, or {otherwise}") from error


def _damaged(path: Path, error: Exception) -> UserError:
    if asked := re.search("GLOBAL (.+?) (was not an allowed|whose module)", str(error), re.DOTALL):
        return UserError(
            f"{path} holds more than tensors and plain values (it asks to run {json.dumps(asked[1])}): it may be "
            "harmful and is not opened; take a .safetensors file, or have someone you trust save only its state dict "
            "again"
        )
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__  # without its advice
    return UserError(f"{path} is damaged or incomplete ({first_line(Exception(text))}); {AGAIN}")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError if it holds anything else."""
    found = read_object(path) if path.is_file() and path.stat().st_size <= LARGEST_JSON else None
    if found is None:
        raise UserError(f"{path} is not readable JSON (an object of at most {LARGEST_JSON:,} bytes); {AGAIN}")
    return found


def plain(value: Any) -> dict[str, Any]:
    """One of a file's other entries as JSON could hold it; empty if it is no object, or a huge or endless one."""

    def simplify(part: Any) -> Any:
        return vars(part) if isinstance(part, argparse.Namespace) else type(part).__name__

    text = ""
    with contextlib.suppress(TypeError, ValueError, RecursionError):
        for piece in json.JSONEncoder(default=simplify).iterencode(value):
            text += piece
            if len(text) > 2**20:  # a small pickle can hold an endless structure
                break
    return parse_object(text) or {}  # what was broken off is no JSON


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes a safetensors file, whole or not at all; NotSaved if that fails."""
    with _writing(path) as temporary:
        dense = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        save_file(dense, temporary, {"format": "pt"})  # transformers requires this


def write_torch(path: Path, tensors: dict[str, np.ndarray], others: dict[str, Any]) -> None:
    """Writes a PyTorch file {"model": tensors, **others}, whole or not at all. Raises NotSaved if that fails."""
    torch = _import_torch(f"writing {path}", "write a .safetensors file")
    with _writing(path) as temporary, temporary.open("wb") as file:
        torch.save({"model": {name: torch.tensor(array) for name, array in tensors.items()}, **others}, file)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[Path]:
    try:
        with replacing(path) as temporary:
            yield temporary
    except (OSError, RuntimeError, SafetensorError) as error:
        cause = error.__context__ if isinstance(error.__context__, OSError) else error  # torch raises a RuntimeError
        raise NotSaved(f"{path} cannot be written ({reason(cause)}); check its folder and the free space") from error
