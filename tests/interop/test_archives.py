"""Damage to PyTorch's zip archives: found before a tensor is used."""

import io
import zipfile

import numpy as np
import pytest

from mae_jax.interop.tensors import write_torch
from mae_jax.runtime.errors import UserError
from tests.interop.test_tensors import ARRAYS, check_same, read_all, refusal

torch = pytest.importorskip("torch")


def repacked(content, change):
    """A zip archive with its records changed, (name, bytes) -> bytes or None, and their checksums made anew."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w") as new:
        for name in old.namelist():
            data = change(name, old.read(name))
            if data is not None:
                new.writestr(name, data)
    return stream.getvalue()


def test_one_changed_bit_anywhere_in_a_pytorch_file_is_found_or_harmless(tmp_path):
    arrays = {"v": ARRAYS["bfloat16"], "w": ARRAYS["float32"]}
    write_torch(tmp_path / "file", arrays)
    whole, refused = (tmp_path / "file").read_bytes(), 0
    rng = np.random.default_rng(0)
    for place in range(0, len(whole), 3):
        content = bytearray(whole)
        content[place] ^= 1 << int(rng.integers(8))
        (tmp_path / "file").write_bytes(content)
        try:
            found = read_all(tmp_path / "file")
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
        else:  # in the padding between records, in the dates
            check_same(found, arrays)
    assert refused > len(whole) / 6


def test_a_record_with_fewer_bytes_than_its_tensors_is_refused_and_named(tmp_path):
    write_torch(tmp_path / "a.pth", {"v": np.arange(9, dtype=np.float32), "w": np.arange(20, dtype=np.int64)})
    whole = (tmp_path / "a.pth").read_bytes()
    for record, size in (("data/0", 36), ("data/1", 160)):
        (tmp_path / "a.pth").write_bytes(
            repacked(whole, lambda name, data, record=record: data[:-4] if name.endswith(record) else data)
        )
        assert f"is damaged (record archive/{record} has {size - 4} bytes, not {size})" in refusal(tmp_path / "a.pth")
    (tmp_path / "a.pth").write_bytes(repacked(whole, lambda name, data: None if name.endswith("data/1") else data))
    assert "is damaged (record archive/data/1 is missing)" in refusal(tmp_path / "a.pth")


def test_an_archive_with_two_records_of_one_name_is_refused(tmp_path):
    write_torch(tmp_path / "a.pth", {"w": np.arange(9, dtype=np.float32)})
    with zipfile.ZipFile(tmp_path / "a.pth", "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("archive/data/0", b"0" * 36)
    assert "is damaged (two of its records have the same name)" in refusal(tmp_path / "a.pth")


def test_a_changed_value_is_told_by_the_archives_checksum(tmp_path):
    write_torch(tmp_path / "a.pth", {"w": np.full(9, 1.5, np.float32)})
    content = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(content.replace(np.float32(1.5).tobytes(), np.float32(3.4e38).tobytes(), 1))
    assert "is damaged (record archive/data/0: Bad CRC-32 for file 'archive/data/0')" in refusal(tmp_path / "a.pth")


def test_an_archive_that_was_saved_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        write_torch(tmp_path / "a.pth", ARRAYS)
    finally:
        torch.serialization.set_crc32_options(True)
    check_same(read_all(tmp_path / "a.pth"), ARRAYS)
