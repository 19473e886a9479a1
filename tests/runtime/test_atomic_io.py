"""Files and folders take their place whole or not at all, and a flipped bit is noticed."""

import os
import random

import pytest
import torch
from torch.serialization import get_crc32_options
from torch.testing import assert_close

from config import InputError
from tests.helpers.damage import flip_bit, snapshot_folder
from utils.runtime.atomic_io import (
    atomic_file,
    atomic_folder,
    is_newer,
    load_tensors,
    remove_partial_files,
    save_tensors,
    written_bytes,
)

resource = pytest.importorskip("resource")

CONTENT = {
    "schema": 2,
    "nested": {"name": "ö", "values": [1, 2.5, None, True]},
    "weights": {
        "float32": torch.arange(7.0),
        "bfloat16": torch.ones(2, 3, dtype=torch.bfloat16),
        "int64": torch.tensor(2**40),
        "empty": torch.zeros(0),
    },
}


class BreakOffError(Exception):
    """What a test raises amid a write."""


@pytest.mark.parametrize("zip_sums", [True, False])
def test_what_was_saved_is_loaded_bit_for_bit(zip_sums, tmp_path):
    path, before = tmp_path / "a.pt", get_crc32_options()
    save_tensors(path, CONTENT, zip_sums)
    assert get_crc32_options() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]
    loaded = load_tensors(path)
    assert loaded.keys() == CONTENT.keys() and loaded["nested"] == CONTENT["nested"]
    assert_close(loaded["weights"], CONTENT["weights"], rtol=0, atol=0)


@pytest.mark.parametrize("zip_sums", [True, False])
def test_no_single_bit_goes_unnoticed(zip_sums, tmp_path):
    path, chance = tmp_path / "a.pt", random.Random(0)
    save_tensors(path, CONTENT, zip_sums)
    whole = path.read_bytes()
    for _ in range(300):
        path.write_bytes(flip_bit(whole, chance.randrange(len(whole))))
        with pytest.raises(InputError, match=r"a\.pt is damaged or no checkpoint"):
            load_tensors(path)


@pytest.mark.parametrize("room", [0, 500, 3000])
def test_a_disk_that_is_full_leaves_the_file_as_it_was_and_says_what_the_system_said(
    room, tmp_path
):
    path = tmp_path / "a.pt"
    save_tensors(path, {"value": 1})
    before = snapshot_folder(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_tensors(path, {"weight": torch.ones(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert snapshot_folder(tmp_path) == before


def test_a_file_that_is_broken_off_leaves_the_one_that_was_there(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    before = snapshot_folder(tmp_path)
    with pytest.raises(BreakOffError), atomic_file(path) as file:
        file.write(b"new")
        raise BreakOffError
    assert snapshot_folder(tmp_path) == before
    with atomic_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_broken_off_leaves_the_one_that_was_there(tmp_path):
    folder = tmp_path / "a"
    for text in ("old", "new"):
        with atomic_folder(folder) as part:
            (part / text).write_text(text)
    assert [path.name for path in folder.iterdir()] == ["new"]
    before = snapshot_folder(tmp_path)
    with pytest.raises(BreakOffError), atomic_folder(folder) as part:
        (part / "other").write_text("other")
        raise BreakOffError
    assert snapshot_folder(tmp_path) == before


def test_a_link_to_a_folder_goes_on_pointing_at_it(tmp_path):
    folder, link = tmp_path / "a", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    with atomic_folder(link) as part:
        (part / "new").write_text("new")
    assert link.is_symlink() and (folder / "new").read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"a", "link"}


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    (tmp_path / ".a.pt.17.part").write_text("half")
    for name in ("a.part", ".b.txt", "c.pt"):
        (tmp_path / name).write_text("whole")
    (tmp_path / ".d.part").mkdir()
    remove_partial_files(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a.part", ".b.txt", "c.pt", ".d.part"}
    for name in (".e.17.part", ".e.17.old.part", ".else.17.part"):
        (tmp_path / name).mkdir()
    with atomic_folder(tmp_path / "e"):
        pass
    names = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert names == {".d.part", "e", ".else.17.part"}


def test_a_file_is_newer_than_one_that_was_not_changed_after_it(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    assert not is_newer(new, old)
    for path, nanoseconds in ((old, 10), (new, 11)):
        path.touch()
        os.utime(path, ns=(nanoseconds, nanoseconds))
    assert is_newer(new, old) and is_newer(new, new) and not is_newer(old, new)


def test_how_much_of_a_file_is_written_is_known_while_it_is_written_and_later(tmp_path):
    path = tmp_path / "a.pt"
    (tmp_path / ".a.pt.17.part").write_text("what another process writes")
    assert written_bytes(path) == 0
    for size in (300, 20):  # the second time in place of the first
        with atomic_file(path) as file:
            for part in range(1, 3):
                file.write(bytes(size))
                file.flush()
                assert written_bytes(path) == part * size
        assert written_bytes(path) == 2 * size
