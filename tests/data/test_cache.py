"""The cache of listings: a long listing is made once, and anew when anything may have changed."""

import os
import shutil
import time

import pytest

from mae_jax.data import files
from mae_jax.data.cache import cache_folder, entry_of, read_entry, write_entry
from mae_jax.data.files import list_pictures

NAMES = ("ant/1.png", "ant/deep/2.png", "bee/3.png", "cat/notes.txt")


@pytest.fixture(autouse=True)
def short_listings_are_kept(own_cache, monkeypatch):
    monkeypatch.setattr(files, "LONG", 3)
    return own_cache


@pytest.fixture
def folder(tmp_path, write_pictures):
    """A folder that has not changed for an hour."""
    write_pictures(tmp_path / "pictures", *NAMES)
    (tmp_path / "pictures" / "dog").mkdir()
    age(tmp_path / "pictures")
    return tmp_path / "pictures"


def age(folder, seconds=3600.25):
    for place, *_ in os.walk(folder):
        changed = os.stat(place).st_mtime - seconds
        os.utime(place, (changed, changed))


def is_anew(folder, *arguments) -> bool:
    return not list_pictures(folder, *arguments).notes


def test_a_long_listing_is_made_once_and_a_note_tells_its_day(folder, monkeypatch):
    first = list_pictures(folder)
    monkeypatch.setattr(os, "scandir", None)
    second = list_pictures(folder)
    assert second[:3] == first[:3] == (["ant/1.png", "ant/deep/2.png", "bee/3.png"], ["cat", "dog"], {".txt": 1})
    assert not first.notes and second.notes[0].startswith("3 pictures as listed on 20")


@pytest.mark.parametrize("change", [
    lambda folder: (folder / "ant" / "deep" / "4.png").touch(),
    lambda folder: (folder / "bee" / "3.png").unlink(),
    lambda folder: (folder / "bee" / "3.png").rename(folder / "bee" / "4.png"),
    lambda folder: (folder / "elk").mkdir(),
    lambda folder: shutil.rmtree(folder / "dog"),
])  # fmt: skip
def test_any_change_in_any_folder_is_seen(folder, change):
    list_pictures(folder)
    change(folder)
    found = list_pictures(folder)
    assert not found.notes
    there = {
        os.path.relpath(os.path.join(place, name), folder) for place, _, names in os.walk(folder) for name in names
    }
    assert set(found.files) == {name for name in there if name.endswith(".png")}


def test_a_folder_that_changed_a_moment_ago_is_not_trusted(folder):
    (folder / "bee" / "4.png").touch()
    assert is_anew(folder) and is_anew(folder)
    age(folder, 10)
    assert is_anew(folder) and not is_anew(folder)


def test_times_in_whole_seconds_are_trusted_later(folder):
    for seconds, trusted in ((0, False), (5, True)):
        os.utime(folder, (int(time.time()) - seconds,) * 2)
        list_pictures(folder)
        assert is_anew(folder) != trusted


def test_short_listings_other_extensions_and_other_folders_that_are_skipped_are_listings_of_their_own(folder):
    assert is_anew(folder) and is_anew(folder, ("bee",)) and is_anew(folder, (), (".png",))
    assert is_anew(folder, ("bee",))  # too short to be kept
    assert not is_anew(folder) and not is_anew(folder, (), (".png",))


def test_a_cache_that_cannot_be_written_or_is_damaged_is_no_error(folder, tmp_path, monkeypatch):
    list_pictures(folder)
    (entry,) = cache_folder().glob("listing-*")
    entry.write_bytes(entry.read_bytes()[:-5])
    assert is_anew(folder) and not is_anew(folder)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert is_anew(folder) and is_anew(folder)


def test_values_that_cannot_be_written_are_not_kept(tmp_path):
    entry = entry_of("kind", tmp_path)
    for value in (2**70, "\ud800"):
        write_entry(entry, value)
        assert read_entry(entry) is None and not list(entry.parent.glob("*"))
    write_entry(entry, {1: "caf\udce9"})
    assert read_entry(entry) == {1: "caf\udce9"}


def test_what_another_version_kept_is_not_used(monkeypatch):
    write_entry(entry_of("kind", "/there"), {"files": []})
    assert read_entry(entry_of("kind", "/there")) == {"files": []}
    monkeypatch.setattr("mae_jax.data.cache.VERSION", 99)
    assert read_entry(entry_of("kind", "/there")) is None


def test_without_a_home_nothing_is_kept_and_nothing_fails(folder, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert [is_anew(folder) for _ in range(2)] == [True, True] and not os.path.exists("~")
