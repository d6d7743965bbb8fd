import argparse
import json
import os
import pathlib
import pickle
import resource
import sys
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mae_jax.interop.tensors import DTYPES, NOT_READ, TORCH_MAGIC, read_tensors, write_safetensors, write_torch
from mae_jax.runtime.errors import UserError

FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

FLOATS = np.array([[-0.0, np.nan, np.inf], [1e-7, 3.0, -1.5]])
ARRAYS = {name: np.array([[0, 1, 1], [1, 0, 1]]).astype(dtype) for name, dtype in DTYPES.items()}
ARRAYS |= {name: FLOATS.astype(DTYPES[name]) for name in ("float64", "float32", "float16", "bfloat16")}
ARRAYS |= {"scalar": np.array(3.0, np.float32), "empty": np.zeros((0, 3), np.float32), "line": np.ones(1, np.float32)}
ARRAYS |= {"transposed": ARRAYS["float32"].T, "backwards": ARRAYS["bfloat16"][::-1, ::2]}
ONE = {"w": np.ones(1, np.float32)}


def read_all(path):
    return {name: tensor.read() for name, tensor in read_tensors(path).tensors.items()}


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


@pytest.fixture(params=[write_safetensors, write_torch])
def write(request):
    if request.param is write_torch:
        pytest.importorskip("torch")
    return request.param


def test_arrays_of_every_type_come_back_bit_for_bit(tmp_path, write):
    write(tmp_path / "file", ARRAYS | {"big-endian": ARRAYS["float32"].astype(">f4")})
    check_same(read_all(tmp_path / "file"), ARRAYS | {"big-endian": ARRAYS["float32"]})
    for name, tensor in read_tensors(tmp_path / "file").tensors.items():
        assert tensor.shape == tensor.read().shape and tensor.dtype == tensor.read().dtype.name, name


def test_others_read_what_we_write_as_safetensors(tmp_path):
    write_safetensors(tmp_path / "a", ARRAYS, {"made": "here"})
    check_same(safetensors.numpy.load_file(tmp_path / "a"), ARRAYS)
    assert read_tensors(tmp_path / "a").others == {"format": "pt", "made": "here"}


def test_others_read_what_we_write_for_pytorch(tmp_path, torch):
    array = ARRAYS["bfloat16"].copy()
    array.flags.writeable = False
    write_torch(tmp_path / "a", {"model": {"w": array}, "epoch": 3, "best": np.float64(0.5)})
    found = torch.load(tmp_path / "a", weights_only=True)
    assert found["model"]["w"].dtype == torch.bfloat16
    np.testing.assert_array_equal(found["model"]["w"].float().numpy(), array.astype(np.float32))
    assert (found["epoch"], found["best"], type(found["best"])) == (3, 0.5, float)


def test_values_are_not_copied_out_of_the_file(tmp_path, write):
    write(tmp_path / "file", {"w": np.ones((3, 5), np.float32)})
    tensor = read_tensors(tmp_path / "file").tensors["w"]
    kept = tensor.read()
    assert np.shares_memory(kept, tensor.read()) and not kept.flags.owndata
    write(tmp_path / "file", {"w": np.zeros((3, 5), np.float32)})  # takes the place of the file, does not change it
    assert kept.all() and not read_all(tmp_path / "file")["w"].any()


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
    assert "damaged or not whole" in refusal(tmp_path / "a.safetensors")


def test_a_type_that_is_not_read_is_named(tmp_path):
    (tmp_path / "a").write_bytes(make_safetensors({"norm\n": entry([2], 0, 2, "F8_E4M3")}, bytes(2)))
    assert "'norm\\n' is of type F8_E4M3" in refusal(tmp_path / "a")


@pytest.mark.parametrize("legacy", [True, False])
def test_a_file_cut_off_anywhere_is_refused(tmp_path, write, legacy):
    arrays = {"v": ARRAYS["bfloat16"], "w": ARRAYS["float32"]}
    write(tmp_path / "whole", arrays)
    if legacy and write is write_torch:
        torch = pytest.importorskip("torch")
        state = torch.load(tmp_path / "whole", weights_only=True)
        torch.save(state, tmp_path / "whole", _use_new_zipfile_serialization=False)
    check_same(read_all(tmp_path / "whole"), arrays)
    content = (tmp_path / "whole").read_bytes()
    for length in range(len(content)):
        (tmp_path / "cut").write_bytes(content[:length])
        refusal(tmp_path / "cut")


@FUZZ
@given(place=st.integers(0, 400), change=st.integers(1, 255))
def test_any_changed_byte_gives_tensors_or_a_clear_refusal(tmp_path, write, place, change):
    write(tmp_path / "file", {"v": ARRAYS["bfloat16"], "w": ARRAYS["float32"]})
    content = bytearray((tmp_path / "file").read_bytes())
    content[place % len(content)] ^= change
    (tmp_path / "file").write_bytes(content)
    try:
        assert all(array.nbytes <= len(content) for array in read_all(tmp_path / "file").values())
    except UserError as error:
        assert "\n" not in str(error)


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
        assert read_all(tmp_path)["w"] == number and read_tensors(tmp_path).path == tmp_path
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
        assert read_tensors(path).others == {"format": "pt", "not in the index": ["x"]}


@pytest.mark.parametrize("name", ["../w", "/", "..", "", "a/../../w", "..\\w", "C:w", "C:\\w", "\0", "a\nb", "sub/w"])
def test_an_index_cannot_point_out_of_its_folder(tmp_path, name):
    (tmp_path / "model").mkdir()
    write_safetensors(tmp_path / "w", ONE)
    write_index(tmp_path / "model", {"w": str(tmp_path / "w") if name == "/" else name})
    assert ("not one of its own folder" if name else "does not exist") in refusal(tmp_path / "model")


MAPS = ["3", '{"w": 3}', '{"w": ["x"]}', "[]", "null"]


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 10**5, "[]", "3", "{}", "\xff", *(f'{{"weight_map": {m}}}' for m in MAPS)]
)
def test_an_index_without_names_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="latin-1")
    assert "no index of shards" in refusal(tmp_path)


def test_an_index_and_its_shards_must_agree(tmp_path):
    write_index(tmp_path, {"w": "1.safetensors"})
    assert "1.safetensors does not exist" in refusal(tmp_path)
    write_safetensors(tmp_path / "1.safetensors", {"v": ONE["w"]})
    assert "holds the tensor 'w', but it does not" in refusal(tmp_path)


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
    endless = []
    endless.append(endless)
    content = {"model": model.state_dict() | {"version": 2}, "optimizer": optimizer.state_dict(), "epoch": 7}
    content |= {"scaler": {"scale": 65536.0}, "args": args, "best": np.float64(0.5), "model_ema": model.state_dict()}
    content |= {"endless": endless, "huge": [[0] * 1000] * 1000, "random": np.random.get_state()}
    torch.save(content, tmp_path / "checkpoint.pth")
    file = read_tensors(tmp_path / "checkpoint.pth")
    weight, bias = (parameter.detach().numpy() for parameter in (model.weight, model.bias))
    check_same({name: tensor.read() for name, tensor in file.tensors.items()}, {"weight": weight, "bias": bias})
    plain = {"lr": 1e-3, "betas": [0.9, 0.95], "output_dir": "/runs/%j", "device": "cuda"}
    random = file.others.pop("random")
    assert random[0] == "MT19937" and random[1] == NOT_READ
    skipped = dict.fromkeys(("optimizer", "scaler", "best", "model_ema", "endless", "huge"), NOT_READ)
    assert file.others == {"version": 2, "epoch": 7, "args": plain} | skipped


@pytest.mark.parametrize("place", [None, "model", "state_dict", "model_state_dict", "module", "model_ema"])
def test_the_state_dict_is_found_where_people_put_it(tmp_path, torch, place):
    state = {"w": torch.ones(1)}
    torch.save({place: state, "epoch": 1, "teacher": state} if place else state, tmp_path / "a")
    check_same(read_all(tmp_path / "a"), ONE)
    assert read_tensors(tmp_path / "a").others == ({"epoch": 1, "teacher": NOT_READ} if place else {})
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
    write_torch(tmp_path / "a.pth", ARRAYS)
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    np.savez(tmp_path / "numpy.npz", **ONE)
    for name, extra in (("packed", {}), ("program", {"archive/constants.pkl": b""})):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            for entry, data in (content | extra).items():
                archive.writestr(entry, data)
    check_same(read_all(tmp_path / "packed"), ARRAYS)
    assert "TorchScript" in refusal(tmp_path / "program") and "torch.save" in refusal(tmp_path / "numpy.npz")


def test_pytorch_is_needed_for_its_files(tmp_path, monkeypatch):
    (tmp_path / "a.pth").write_bytes(b"PK\3\4")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "needs PyTorch: pip install torch, or give a .safetensors file" in refusal(tmp_path / "a.pth")
    with pytest.raises(UserError, match="needs PyTorch: pip install torch, or write a .safetensors file"):
        write_torch(tmp_path / "b.pth", ONE)


def test_a_pytorch_that_does_not_read_safely_is_not_used(tmp_path, torch, monkeypatch):
    torch.save({"w": torch.ones(1)}, tmp_path / "a.pth")
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.9.1+cu128"))
    assert "needs PyTorch 2.10 or newer, not 2.9.1" in refusal(tmp_path / "a.pth")


def test_a_file_is_written_whole_or_not_at_all(tmp_path, write):
    write(tmp_path / "a", ONE)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limit[1]))  # as if the disk were full
    try:
        with pytest.raises(UserError, match="a cannot be written .*File too large") as error:
            write(tmp_path / "a", {"w": np.ones(10_000, np.float32)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="'w' is of type complex64"):
        write(tmp_path / "a", {"w": np.ones(2, np.complex64)})
    with pytest.raises(UserError, match="cannot be written .*No such file"):
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
