import argparse
import io
import json
import os
import pathlib
import pickle
import resource
import sys
import zipfile

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mae_jax.interop.tensors import DTYPES, TORCH_MAGIC, plain, read_tensors, write_safetensors, write_torch
from mae_jax.runtime.errors import NotSaved, UserError

FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

FLOATS = np.array([[-0.0, np.nan, np.inf], [1e-7, 3.0, -1.5]])
TYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in DTYPES.values()}
ARRAYS = {name: np.array([[0, 1, 1], [1, 0, 1]]).astype(dtype) for name, dtype in TYPES.items()}
ARRAYS |= {name: FLOATS.astype(TYPES[name]) for name in ("float64", "float32", "float16", "bfloat16")}
ARRAYS |= {"scalar": np.array(3.0, np.float32), "empty": np.zeros((0, 3), np.float32), "line": np.ones(1, np.float32)}
TWO = {"v": np.arange(6, dtype=np.float32), "w": np.float32(FLOATS)}
ONE = {"w": np.ones(1, np.float32)}


def read_all(path):
    return {name: tensor.read() for name, tensor in read_tensors(path)[0].items()}


def refusal(path):
    with pytest.raises(UserError) as error:
        read_all(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def check_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


def make_safetensors(header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + data


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def write_index(folder, weight_map, kind="model.safetensors"):
    (folder / f"{kind}.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(params=["safetensors", "torch"])
def save(request):
    """Writes arrays of any type by the other programs themselves."""
    if request.param == "safetensors":
        return lambda path, arrays: safetensors.numpy.save_file(arrays, path)
    torch = pytest.importorskip("torch")

    def to_torch(array):
        bits = array.view(np.int16) if array.dtype == ml_dtypes.bfloat16 else array
        return torch.tensor(bits).view(getattr(torch, array.dtype.name))

    return lambda path, arrays: torch.save({name: to_torch(array) for name, array in arrays.items()}, path)


@pytest.fixture(params=["safetensors", "torch"])
def write(request):
    """Writes float32 arrays as we do."""
    if request.param == "safetensors":
        return write_safetensors
    pytest.importorskip("torch")
    return lambda path, arrays: write_torch(path, arrays, {})


def test_arrays_of_every_type_come_in_bit_for_bit(tmp_path, save):
    save(tmp_path / "file", ARRAYS)
    check_same(read_all(tmp_path / "file"), ARRAYS)
    for name, tensor in read_tensors(tmp_path / "file")[0].items():
        assert tensor.shape == tensor.read().shape and tensor.name == name


def test_others_read_what_we_write_as_safetensors(tmp_path):
    write_safetensors(tmp_path / "a", TWO | {"transposed": TWO["w"].T})
    check_same(safetensors.numpy.load_file(tmp_path / "a"), TWO | {"transposed": TWO["w"].T})


def test_others_read_what_we_write_for_pytorch(tmp_path, torch):
    array = TWO["w"].copy()
    array.flags.writeable = False
    write_torch(tmp_path / "a", {"w": array.T}, {"epoch": 3})
    found = torch.load(tmp_path / "a", weights_only=True)
    np.testing.assert_array_equal(found["model"]["w"].numpy(), array.T)
    assert found["epoch"] == 3


def test_an_open_file_that_another_one_replaces_gives_what_it_held(tmp_path, write):
    write(tmp_path / "file", {"w": np.ones((3, 5), np.float32)})
    tensor = read_tensors(tmp_path / "file")[0]["w"]
    write(tmp_path / "file", {"w": np.zeros((3, 5), np.float32)})
    assert tensor.read().all() and not read_all(tmp_path / "file")["w"].any()


def test_tensors_at_odd_addresses_are_read(tmp_path):
    values = np.arange(3, dtype=np.float32)
    header = {"a": entry([1], 0, 1, "U8"), "b": entry([3], 1, 13), "end": entry([0], 13, 13)}
    (tmp_path / "a").write_bytes(make_safetensors(header, b"\1" + values.tobytes()))
    np.testing.assert_array_equal(read_all(tmp_path / "a")["b"], values)
    np.testing.assert_array_equal(jnp.asarray(read_all(tmp_path / "a")["b"]) + 1, values + 1)


LIES = [([2], 0, 8, 7), ([2], 0, 8, 9), ([3], 0, 8, 8), ([2], 900, 908, 8), ([2], 8, 0, 8), ([-1], 0, 4, 4)]
LIES = [make_safetensors({"w": entry(shape, start, end)}, bytes(size)) for shape, start, end, size in LIES]
LIES += [make_safetensors({"v": entry([2], 0, 8), "w": entry([2], 4, 12)}, bytes(12))]
LIES += [make_safetensors({"w\n": entry([2**62, 4], 0, 0)}), make_safetensors({"w": entry([2], 0, 8, "F33")}, bytes(8))]
LIES += [make_safetensors(header) for header in (b"{no JSON", b'{"w":' * 9000, b'{"w": 3}', b"{\xff}")]
LIES += [size.to_bytes(8, "little") + b"{}" for size in (1000, 2**63)]


@pytest.mark.parametrize("content", LIES)
def test_a_safetensors_file_that_lies_about_itself_is_refused(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    assert "damaged or incomplete" in refusal(tmp_path / "a.safetensors")


def test_a_type_that_is_not_read_is_named(tmp_path):
    (tmp_path / "a").write_bytes(make_safetensors({"norm\n": entry([2], 0, 2, "F8_E4M3")}, bytes(2)))
    assert "'norm\\n' is of type F8_E4M3" in refusal(tmp_path / "a")


@pytest.mark.parametrize("legacy", [True, False])
def test_a_file_cut_off_anywhere_is_refused(tmp_path, write, legacy):
    write(tmp_path / "whole", TWO)
    if legacy:
        torch = pytest.importorskip("torch")
        content = {name: torch.tensor(array) for name, array in TWO.items()}
        torch.save(content, tmp_path / "whole", _use_new_zipfile_serialization=False)
    check_same(read_all(tmp_path / "whole"), TWO)
    content = (tmp_path / "whole").read_bytes()
    for length in {*range(0, len(content), 7), *range(64), len(content) - 1}:
        (tmp_path / "cut").write_bytes(content[:length])
        refusal(tmp_path / "cut")


@FUZZ
@given(place=st.integers(0, 400), change=st.integers(1, 255))
def test_any_changed_byte_gives_tensors_or_a_clear_refusal(tmp_path, write, place, change):
    write(tmp_path / "file", TWO)
    content = bytearray((tmp_path / "file").read_bytes())
    content[place % len(content)] ^= change
    (tmp_path / "file").write_bytes(content)
    try:
        assert all(array.nbytes <= len(content) for array in read_all(tmp_path / "file").values())
    except UserError as error:
        assert "\n" not in str(error)


# ------------------------------------------------------------------------------------------------ archives of PyTorch


def repacked(content, change):
    """A zip archive with its records changed, (name, bytes) -> bytes or None, and their checksums made anew."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w") as new:
        for name in old.namelist():
            if (data := change(name, old.read(name))) is not None:
                new.writestr(name, data)
    return stream.getvalue()


def test_one_changed_bit_anywhere_in_a_pytorch_file_is_found_or_harmless(tmp_path, torch):
    write_torch(tmp_path / "file", TWO, {})
    whole, tried, refused = (tmp_path / "file").read_bytes(), 0, 0
    rng = np.random.default_rng(0)
    for place in range(0, len(whole), 7):
        content = bytearray(whole)
        content[place] ^= 1 << int(rng.integers(8))
        (tmp_path / "file").write_bytes(content)
        tried += 1
        try:
            found = read_all(tmp_path / "file")
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
        else:  # in the padding between records, in the dates
            check_same(found, TWO)
    assert refused > tried / 2


@pytest.mark.parametrize(
    "change",
    [
        lambda name, data: data[:-4] if name.endswith("data/1") else data,
        lambda name, data: None if name.endswith("data/1") else data,
    ],
    ids=["fewer bytes than its tensor", "missing"],
)
def test_a_record_that_does_not_fit_its_tensor_is_refused(tmp_path, torch, change):
    write_torch(tmp_path / "a.pth", TWO, {})
    (tmp_path / "a.pth").write_bytes(repacked((tmp_path / "a.pth").read_bytes(), change))
    assert "is damaged" in refusal(tmp_path / "a.pth")


def test_an_archive_with_two_records_of_one_name_is_refused(tmp_path, torch):
    write_torch(tmp_path / "a.pth", TWO, {})
    with zipfile.ZipFile(tmp_path / "a.pth", "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(next(name for name in archive.namelist() if name.endswith("/data/0")), bytes(36))
    assert "two of its records have the same name" in refusal(tmp_path / "a.pth")


def test_a_record_with_another_checksum_is_named(tmp_path, torch):
    write_torch(tmp_path / "a.pth", {"w": np.full(9, 1.5, np.float32)}, {})
    content = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(content.replace(np.float32(1.5).tobytes(), np.float32(3.4e38).tobytes(), 1))
    assert "is damaged (record archive/data/0 has another checksum)" in refusal(tmp_path / "a.pth")


def test_an_archive_that_was_saved_without_checksums_is_read(tmp_path, torch):
    torch.serialization.set_crc32_options(False)
    try:
        write_torch(tmp_path / "a.pth", TWO, {})
    finally:
        torch.serialization.set_crc32_options(True)
    check_same(read_all(tmp_path / "a.pth"), TWO)


# ------------------------------------------------------------------------------------------------- files that are none


@FUZZ
@given(begin=st.sampled_from([b"", b"PK\3\4", b"\x80\x02" + TORCH_MAGIC, b"\2" + bytes(7) + b"{"]), rest=st.binary())
def test_garbage_is_refused(tmp_path, torch, begin, rest):
    (tmp_path / "garbage").write_bytes(begin + rest)
    refusal(tmp_path / "garbage")


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html>", b"version https://git-lfs.git", pickle.dumps({"w": 1})])
def test_what_is_no_file_of_tensors_says_how_it_begins(tmp_path, content):
    (tmp_path / "a.pth").write_bytes(content)
    message = refusal(tmp_path / "a.pth")
    assert str(tmp_path / "a.pth") in message and "neither a safetensors nor a PyTorch file" in message
    assert (repr(content[:20])[:-1] if content else "empty") in message


def test_a_path_that_cannot_be_read_is_named(tmp_path):
    assert "does not exist" in refusal(tmp_path / "none")
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refusal(tmp_path / "pipe")
    assert "no file of tensors" in refusal(tmp_path)


def test_a_folder_gives_the_file_that_transformers_would_take(tmp_path):
    for number, name in enumerate(["x.bin", "pytorch_model.bin", "model.safetensors"]):
        if number:
            write_safetensors(tmp_path / f"shard {number}", {"w": ONE["w"] * -number})
            write_index(tmp_path, {"w": f"shard {number}"}, name)
            assert read_all(tmp_path)["w"] == -number
        write_safetensors(tmp_path / name, {"w": ONE["w"] * number})
        assert read_all(tmp_path)["w"] == number
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("blobs/none")
    assert "model.safetensors does not exist" in refusal(tmp_path)


def test_of_several_files_in_a_folder_one_must_be_named(tmp_path):
    for name in ("b.pth", "a.safetensors"):
        write_safetensors(tmp_path / name, ONE)
    assert "['a.safetensors', 'b.pth']" in refusal(tmp_path)
    check_same(read_all(tmp_path / "b.pth"), ONE)  # what a file is shows in its content


def test_shards_are_one_set_of_tensors(tmp_path):
    (tmp_path / "blobs").mkdir()
    for number in range(3):
        write_safetensors(tmp_path / "blobs" / str(number), {f"w{number}": ONE["w"] * number, "x": ONE["w"]})
        (tmp_path / f"{number}.safetensors").symlink_to(f"blobs/{number}")  # as in the cache of Hugging Face
    write_index(tmp_path, {f"w{number}": f"{number}.safetensors" for number in (2, 0, 1)})
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        check_same(read_all(path), {f"w{number}": ONE["w"] * number for number in range(3)})


@pytest.mark.parametrize("name", ["../w", "/", "..", "", "a/../../w", "..\\w", "C:w", "C:\\w", "\0", "a\nb", "sub/w"])
def test_an_index_cannot_point_out_of_its_folder(tmp_path, name):
    (tmp_path / "model").mkdir()
    write_safetensors(tmp_path / "w", ONE)
    write_index(tmp_path / "model", {"w": str(tmp_path / "w") if name == "/" else name})
    assert ("not one of its own folder" if name else "not a regular file") in refusal(tmp_path / "model")


MAPS = ["3", '{"w": 3}', '{"w": ["x"]}', "[]", "null"]


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 10**5, "[]", "3", "{}", "\xff", *(f'{{"weight_map": {m}}}' for m in MAPS)]
)
def test_an_index_without_names_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="latin-1")
    assert any(words in refusal(tmp_path) for words in ("is not readable JSON", "has no weight_map"))


def test_an_index_and_its_shards_must_agree(tmp_path):
    write_index(tmp_path, {"w": "1.safetensors"})
    assert "1.safetensors does not exist" in refusal(tmp_path)
    write_safetensors(tmp_path / "1.safetensors", {"v": ONE["w"]})
    assert "1.safetensors lacks the tensor 'w', which" in refusal(tmp_path)


class Trap:
    """Pickled, asks whoever reads it to make a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_carries_code_is_refused_and_the_code_not_run(tmp_path, torch, monkeypatch, zipped):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    content = {"model": {"w": torch.ones(1)}, "args": Trap(tmp_path / "marker")}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    message = refusal(tmp_path / "a.pth")
    assert '(it asks to run "posix.mkdir"): it may be harmful and is not opened' in message
    assert "weights_only" not in message and not (tmp_path / "marker").exists()


def test_a_checkpoint_of_training_gives_the_model_and_what_is_plain(tmp_path, torch):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    path = pathlib.PurePosixPath("/runs/%j")
    args = argparse.Namespace(lr=1e-3, betas=(0.9, 0.95), output_dir=pathlib.Path(path), device=torch.device("cuda"))
    content = {"model": model.state_dict() | {"version": 2}, "optimizer": optimizer.state_dict(), "epoch": 7}
    content |= {"args": args, "best": np.float64(0.5), "ema": model.state_dict(), "random": np.random.get_state()}
    torch.save(content, tmp_path / "checkpoint.pth")
    tensors, others = read_tensors(tmp_path / "checkpoint.pth")
    weight, bias = (parameter.detach().numpy() for parameter in (model.weight, model.bias))
    check_same({name: tensor.read() for name, tensor in tensors.items()}, {"weight": weight, "bias": bias})
    found = plain(others["args"])
    assert (found["lr"], found["betas"]) == (1e-3, [0.9, 0.95]) and others["epoch"] == 7


def test_what_stands_beside_tensors_is_taken_if_it_is_plain_and_small():
    endless = {}
    endless["again"] = endless
    large = [[0] * 1000] * 10_000
    for nothing in (3, [1], None, endless, {"huge": large}, {1: {(): 2}}):
        assert plain(nothing) == {}
    assert plain({"a": (1, None, "x"), "odd": 1j}) == {"a": [1, None, "x"], "odd": "complex"}


@pytest.mark.parametrize("place", [None, "model", "state_dict", "model_state_dict", "module", "model_ema"])
def test_the_state_dict_is_found_where_people_put_it(tmp_path, torch, place):
    state = {"w": torch.ones(1)}
    torch.save({place: state, "epoch": 1, "teacher": state} if place else state, tmp_path / "a")
    check_same(read_all(tmp_path / "a"), ONE)
    assert ("epoch" in read_tensors(tmp_path / "a")[1]) == bool(place)
    for nothing in ({"weights": state}, {"epoch": 1}, {}, [state["w"]], state["w"], 3):
        torch.save(nothing, tmp_path / "b")
        assert "no state dict" in refusal(tmp_path / "b")


def test_tensors_that_are_views_or_parameters_come_out_right(tmp_path, torch):
    base = torch.arange(24.0).reshape(4, 6)
    views = {"transposed": base.T, "part": base[1::2, 2:4], "repeated": base[:1].expand(3, 6), "scalar": base[2, 3]}
    views |= {"parameter": torch.nn.Parameter(base), "negated": torch.full((2,), 1j).conj().imag, "half": base.half().T}
    torch.save(views, tmp_path / "a.safetensors")  # what a file is shows in its content
    expected = {name: view.detach().resolve_neg().numpy() for name, view in views.items()}
    check_same(read_all(tmp_path / "a.safetensors"), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["qint8", "sparse_coo", "sparse_csr", "complex64", "meta", "float8_e4m3fn"])
def test_a_tensor_that_is_not_plain_is_named(tmp_path, torch, kind):
    eye = torch.eye(2)
    odd = {"qint8": lambda: torch.quantize_per_tensor(eye, 0.1, 0, torch.qint8), "meta": lambda: eye.to("meta")}
    odd |= {"sparse_coo": eye.to_sparse, "sparse_csr": eye.to_sparse_csr}
    tensor = odd[kind]() if kind in odd else eye.to(getattr(torch, kind))
    torch.save({"w": eye, "head.\nweight": tensor}, tmp_path / "a")
    message = refusal(tmp_path / "a")
    assert "tensor 'head.\\nweight' is of type" in message and kind in message


def test_a_zip_file_packed_by_another_program_is_read_and_others_are_refused(tmp_path, torch):
    write_torch(tmp_path / "a.pth", TWO, {})
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    np.savez(tmp_path / "numpy.npz", **ONE)
    for name, extra in (("packed", {}), ("program", {"archive/constants.pkl": b""})):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            for entry, data in (content | extra).items():
                archive.writestr(entry, data)
    check_same(read_all(tmp_path / "packed"), TWO)
    assert "TorchScript" in refusal(tmp_path / "program") and "torch.save" in refusal(tmp_path / "numpy.npz")


def test_pytorch_is_needed_for_its_files(tmp_path, monkeypatch):
    (tmp_path / "a.pth").write_bytes(b"PK\3\4")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "needs PyTorch: pip install torch, or give a .safetensors file" in refusal(tmp_path / "a.pth")
    with pytest.raises(UserError, match="needs PyTorch: pip install torch, or write a .safetensors file"):
        write_torch(tmp_path / "b.pth", ONE, {})


def test_a_pytorch_that_does_not_read_safely_is_not_used(tmp_path, torch, monkeypatch):
    torch.save({"w": torch.ones(1)}, tmp_path / "a.pth")
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.9.1+cu128"))
    assert "needs PyTorch 2.10 or newer, not 2.9.1" in refusal(tmp_path / "a.pth")


def test_a_file_is_written_whole_or_not_at_all(tmp_path, write):
    write(tmp_path / "a", ONE)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limit[1]))  # as if the disk were full
    try:
        with pytest.raises(NotSaved, match="a cannot be written .*File too large") as error:
            write(tmp_path / "a", {"w": np.ones(10_000, np.float32)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "\n" not in str(error.value)
    with pytest.raises(NotSaved, match="cannot be written .*No such file"):
        write(tmp_path / "none" / "a", ONE)
    check_same(read_all(tmp_path / "a"), ONE)
    assert os.listdir(tmp_path) == ["a"]


def test_files_have_the_permissions_that_the_user_asked_for(tmp_path, write):
    for mask, mode in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            write(tmp_path / "a", ONE)
        finally:
            os.umask(before)
        assert (tmp_path / "a").stat().st_mode & 0o777 == mode
