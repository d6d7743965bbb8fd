"""Files of tensors, safetensors and PyTorch: read without trusting them, written whole. No word of models here."""

import argparse
import contextlib
import json
import mmap
import os
import re
import secrets
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple
from warnings import catch_warnings

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mae_jax.interop.archives import find_damage
from mae_jax.interop.plain import NOT_READ, make_plain, read_json
from mae_jax.runtime.errors import UserError, first_line

# The names that PyTorch and NumPy share, and those in the header of a safetensors file.
NAMES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in NAMES}
HEADER_NAMES = dict(zip(("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"), NAMES, strict=True))
ACCEPTED = "give a safetensors file, a PyTorch file (.pth, .pt, .bin), or a folder with one"
AGAIN = "download it again"
UNKNOWN_TYPE = "{}: tensor {!r} is of type {}; convert it to one of " + ", ".join(DTYPES)
TORCH_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # what a file before PyTorch 1.6 begins with, after its protocol
# Where a PyTorch file's state dict may be: the first that holds tensors is taken, else the top level itself.
STATE_DICTS = ("model", "state_dict", "model_state_dict", "module", "net", "model_ema", "state_dict_ema", "ema")
# What checkpoints of training hold beside tensors, as one of facebookresearch/mae: a Namespace of arguments, which only
# holds attributes, and in it, if submitit ran it, paths: pure ones touch no file, and may be of another system. NumPy's
# scalars and arrays are replaced by nothings: numpy.dtype believes whatever memory layout a pickle gives it.
_Skipped = type("_Skipped", (), dict.fromkeys(("__init__", "__setstate__"), lambda *_: None))
PLAIN_GLOBALS = [(argparse.Namespace, "argparse.Namespace"), (_Skipped, "numpy.dtype"), (_Skipped, "numpy.ndarray")]
for _numpy, _pathlib in (("core", "pathlib"), ("_core", "pathlib._local")):  # since NumPy 2, Python 3.13
    PLAIN_GLOBALS += [(_Skipped, f"numpy.{_numpy}.multiarray.{name}") for name in ("scalar", "_reconstruct")]
    PLAIN_GLOBALS += [(PurePosixPath, f"{_pathlib}.PosixPath"), (PureWindowsPath, f"{_pathlib}.WindowsPath")]


class Tensor(NamedTuple):
    """A tensor of a file that has not been read yet."""

    shape: tuple[int, ...]
    dtype: str  # one of DTYPES, e.g. "float32" or "bfloat16"
    read: Callable[[], np.ndarray]  # its values: a view of the mapped file where possible, not to be written to
    name: str  # in the file


class TensorFile(NamedTuple):
    """What a file, or a folder of files, with tensors holds."""

    path: Path  # as given: a file, or a folder
    tensors: dict[str, Tensor]  # by the names in the file(s)
    others: dict[str, Any]  # plain content beside them: metadata of safetensors; epoch, args, ... of a PyTorch file


def read_tensors(path: str | Path) -> TensorFile:
    """Opens a safetensors or PyTorch file, or a folder with one or with the shards of one, running no code from it.

    What a file is shows in its content, not in its name. While its tensors are in use, it may be replaced by another,
    as `write_safetensors` does, but not be written to.

    Returns:
      Its tensors and, in `others`, what is beside them, or NOT_READ in place of what is not plain (an optimizer's
      state, say). Tensors in shards that the index does not name are only listed in `others["not in the index"]`.

    Raises:
      UserError: if there is no such file, which of several is meant is not clear, it is damaged, or it may be harmful.
    """
    path = Path(path)
    try:
        file = _find_weights(path) if path.is_dir() else path
        read = _read_shards if file.name.endswith(".index.json") else _read_file
        return TensorFile(path, *read(file))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); check the path and its permissions") from error


def _find_weights(folder: Path) -> Path:
    names = [name + end for name in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")]
    # The first of transformers' names, be it a broken link: to fall back to another file would be a surprise.
    found = [folder / name for name in names if os.path.lexists(folder / name)][:1]
    found = found or sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".pth", ".pt", ".bin"))
    if len(found) == 1:
        return found[0]
    kind = f"several files of tensors, {[file.name for file in found][:10]}" if found else "no file of tensors"
    raise UserError(f"{folder} holds {kind}; give the path of one, or a folder with model.safetensors")


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"{path} {'is not a regular file' if path.exists() else 'does not exist'}; {ACCEPTED}")
    with path.open("rb") as file:
        begin = file.read(64)
    zipped = begin.startswith(b"PK\x03\x04")
    if zipped or (begin.startswith(b"\x80") and begin[2:].startswith(TORCH_MAGIC)):
        return _read_torch(path, zipped)
    if begin[8:9] == b"{":
        return _read_safetensors(path)
    found = f"it begins with {begin[:30]!r}" if begin else "it is empty"  # enough to know Git LFS's pointers by
    raise UserError(f"{path} is neither a safetensors nor a PyTorch file ({found}); {ACCEPTED}")


def _read_shards(index: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        places = read_json(index)["weight_map"]
        if not (isinstance(places, dict) and all(isinstance(place, str) for place in places.values())):
            raise ValueError("weight_map does not map names of tensors to names of files")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{index} is no index of shards with a weight_map ({first_line(error)}); {AGAIN}") from error
    shards = {}
    for name in sorted(set(places.values())):
        bare = name == PurePosixPath(name).name == PureWindowsPath(name).name != ".." and name.isprintable()
        if not bare:  # or an index could have any file of this machine read
            raise UserError(f"{index} names the file {name!r}, not one of its own folder; do not trust it, {AGAIN}")
        if not (index.parent / name).is_file():
            raise UserError(f"{index.parent / name} does not exist, but {index.name} needs it; download it as well")
        shards[name] = _read_file(index.parent / name)
    for tensor, place in places.items():
        if tensor not in shards[place][0]:
            raise UserError(f"{index} says that {place} holds the tensor {tensor!r}, but it does not; {AGAIN}")
    others = {name: value for _, beside in shards.values() for name, value in beside.items()}
    unnamed = sorted({tensor for tensors, _ in shards.values() for tensor in tensors} - places.keys())
    others |= {"not in the index": unnamed} if unnamed else {}
    return {tensor: shards[place][0][tensor] for tensor, place in places.items()}, others


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(str(path), "np"):  # refuses a header whose lengths, shapes and offsets do not fit one another
            pass
    except SafetensorError as error:
        raise _damaged(path, error) from error
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    begin = 8 + int.from_bytes(mapped[:8], "little")
    header = json.loads(mapped[8:begin])
    others, tensors = header.pop("__metadata__", None) or {}, {}
    for name, entry in header.items():
        dtype, shape = HEADER_NAMES.get(entry["dtype"]), tuple(entry["shape"])
        if dtype is None:
            raise UserError(UNKNOWN_TYPE.format(path, name, entry["dtype"]))
        read = partial(np.ndarray, shape, DTYPES[dtype], mapped, begin + entry["data_offsets"][0])
        tensors[name] = Tensor(shape, dtype, read, name)
    return tensors, others


def _read_torch(path: Path, zipped: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    torch = _import_torch(f"reading {path}", "give a .safetensors file")
    # Older releases could be made to run code even so: CVE-2025-32434 (before 2.6), CVE-2026-24747 (before 2.10).
    if torch.__version__ < (2, 10):
        raise UserError(f"reading {path} safely needs PyTorch 2.10 or newer, not {torch.__version__}; upgrade torch")
    try:
        with path.open("rb") as file, torch.serialization.safe_globals(PLAIN_GLOBALS), catch_warnings(action="ignore"):
            # torch goes by the name .safetensors.
            can_map = zipped and _check_zip(torch, path) and path.suffix != ".safetensors"
            content = torch.load(path if can_map else file, map_location="cpu", weights_only=True, mmap=can_map)
        return _read_content(torch, path, content)
    except UserError:
        raise
    except Exception as error:  # a damaged archive or pickle can raise nearly anything
        raise _damaged(path, error) from error


def _check_zip(torch: Any, path: Path) -> bool:
    """Whether a zip file's content can be mapped: all of it is stored as it is. Raises if it is damaged, or no such."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        names = {entry.filename.partition("/")[2] for entry in entries}
        if "data.pkl" not in names or "constants.pkl" in names:
            kind = "a zip archive, but no state dict that torch.save wrote (TorchScript?)"
            raise UserError(f"{path} is {kind}; {ACCEPTED}")
        if damage := find_damage(archive, torch):
            raise UserError(f"{path} is damaged ({damage}); {AGAIN}")
    return all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)


def _read_content(torch: Any, path: Path, content: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    top = dict(content) if isinstance(content, dict) else {}
    place = next((name for name in STATE_DICTS if _holds_tensors(torch, top.get(name))), None)
    state = top.pop(place) if place else top
    if not _holds_tensors(torch, state):
        found = f"the entries {list(top)[:10]}" if top else f"a {type(content).__name__}"
        raise UserError(f"{path} holds no state dict, but {found}; save the weights as {{'model': model.state_dict()}}")
    found = {str(name): value for name, value in state.items() if isinstance(value, torch.Tensor)}
    beside = {str(name): value for name, value in (state | top).items() if str(name) not in found}
    tensors = {name: _make_tensor(torch, path, name, value) for name, value in found.items()}
    return tensors, {
        name: NOT_READ if _holds_tensors(torch, value) else make_plain(torch, name, value)
        for name, value in beside.items()
    }


def _make_tensor(torch: Any, path: Path, name: str, value: Any) -> Tensor:
    value = torch.Tensor.detach(value)
    dtype = str(value.dtype).removeprefix("torch.")
    if value.layout != torch.strided or value.is_nested or value.device.type != "cpu" or dtype not in DTYPES:
        raise UserError(UNKNOWN_TYPE.format(path, name, f"{dtype} ({value.layout}, {value.device})"))
    bits = value.view(torch.int16) if dtype == "bfloat16" else value.resolve_neg()  # PyTorch's NumPy has no bfloat16
    return Tensor(tuple(value.shape), dtype, lambda: bits.numpy().view(DTYPES[dtype]), name)


def _holds_tensors(torch: Any, value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(part, torch.Tensor) for part in value.values())


def write_safetensors(path: str | Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file, whole or not at all. Its metadata has format=pt, which transformers asks for.

    Raises:
      UserError: if it cannot be written, or an array is not of one of DTYPES.
    """
    tensors = {name: _make_dense(path, name, array) for name, array in tensors.items()}
    with _replacing(Path(path)) as temporary:
        save_file(tensors, temporary, {"format": "pt"} | (metadata or {}))


def write_torch(path: str | Path, content: dict[str, Any]) -> None:
    """Writes a PyTorch file, whole or not at all; the NumPy arrays in `content`, at any depth in dicts, as tensors.

    Raises:
      UserError: if it cannot be written, PyTorch is missing, or an array is not of one of DTYPES.
    """
    torch = _import_torch(f"writing {path}", "write a .safetensors file")

    def convert(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: convert(str(key), part) for key, part in value.items()}
        if not isinstance(value, np.ndarray):  # a NumPy scalar is refused by torch.load(weights_only=True)
            return value.item() if isinstance(value, np.generic) else value
        array = _make_dense(path, name, value)
        bits = array.view(np.int16) if array.dtype == ml_dtypes.bfloat16 else array
        return torch.from_numpy(bits).view(getattr(torch, array.dtype.name))

    with _replacing(Path(path)) as temporary, temporary.open("wb") as file, catch_warnings(action="ignore"):
        torch.save(convert("", content), file)  # it warns of read-only arrays, that one could write to


def _make_dense(path: str | Path, name: str, array: np.ndarray) -> np.ndarray:
    array = np.asarray(array, order="C")
    if array.dtype.name not in DTYPES:
        raise UserError(UNKNOWN_TYPE.format(path, name, array.dtype.name))
    return array.astype(DTYPES[array.dtype.name], copy=False)  # in the byte order of the machine


def _import_torch(doing: str, otherwise: str) -> Any:
    try:
        import torch

        return torch
    except ImportError as error:
        raise UserError(f"{doing} needs PyTorch: pip install torch, or {otherwise}") from error


def _damaged(path: Path, error: Exception) -> UserError:
    asked = re.search("GLOBAL (.+?) (was not an allowed|whose module)", str(error), re.DOTALL)
    if asked:
        message = f"{path} holds more than tensors and plain values (it asks to run {json.dumps(asked[1])}): it may be"
        remedy = "take a .safetensors file, or have someone you trust save only its state dict again"
        return UserError(f"{message} harmful and is not opened; {remedy}")
    reason = str(error).rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__  # without its advice
    return UserError(f"{path} is damaged or not whole ({first_line(Exception(reason))}); {AGAIN}")


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """An empty file beside `path` to write to; it takes its place, safely on the disk, if nothing goes wrong."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.touch(exist_ok=False)
        permissions = temporary.stat().st_mode & 0o777
        yield temporary
        temporary.chmod(permissions)  # safetensors replaces it by one that only its owner may read
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch hides the OSError behind a RuntimeError
        reason = first_line(error.__context__ if isinstance(error.__context__, OSError) else error)
        raise UserError(f"{path} cannot be written ({reason}); is there space, and its folder?") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
