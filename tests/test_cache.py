"""The folder of tokens is whole or not there, and damage in it is found, whatever happens."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from shutil import which

import pytest

from config import DataConfig, InputError
from utils import cache, data
from utils.data import Corpus, prepare

ROOT = Path(__file__).parent.parent
PLAIN = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.getuid() == 0 else []
"""Root under this, whom no mode keeps from writing else."""
FORKED = """
import json, os, random, signal, sys, time
from pathlib import Path
from config import DataConfig, InputError
from utils.data import prepare

def start(num_stories=200):
    return prepare(DataConfig("builtin", num_stories=num_stories, cache=Path("cache")), 400)

def forked(act):
    if pid := os.fork():
        return pid
    try:
        act()
    finally:
        os._exit(0)

os.chdir(sys.argv[1])
"""
KILL = """
began = time.monotonic()
os.waitpid(forked(lambda: start(300)), 0)
whole, halves = time.monotonic() - began, 0
random.seed(0)
for moment in range(12):
    pid = forked(lambda: start(200 + moment))
    if moment % 2:  # as soon as something half written is seen
        late = time.monotonic() + 9 * whole
        while not [*Path("cache").glob("*.part")] and time.monotonic() < late:
            pass
    else:
        time.sleep(whole * random.uniform(0.05, 0.95))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    halves += len(list(Path("cache").glob("*.part")))
print(json.dumps([halves, start(199).fingerprint]))
"""
READ_ONLY = """
start()
for path in (*Path("cache").rglob("*"), Path("cache")):
    path.chmod(0o555)
print(len(start().train))
try:
    start(100)
except InputError as error:
    print(error)
"""


@pytest.fixture
def get(tmp_path):
    """A small corpus whose tokens are kept under tmp_path, and what was said of it."""

    def get(num_stories=60) -> Corpus:
        config = DataConfig("builtin", num_stories=num_stories, cache=tmp_path / "cache")
        return prepare(config, 300, get.said.append)

    get.said = []
    return get


def run(script: str, folder: Path, under: Sequence[str] = ()) -> list[str]:
    done = subprocess.run(
        [*under, sys.executable, "-c", FORKED + script, str(folder)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def is_whole(folder: Path) -> bool:
    return not cache.damage(folder, json.loads((folder / cache.MANIFEST).read_text())["identity"])


FILES = ["train.bin", "valid.bin", "meta.json", "tokenizer.json", cache.MANIFEST]


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_found_and_said_and_mended(get, tmp_path, name):
    before = get().fingerprint
    (file,) = (tmp_path / "cache").glob(f"*/{name}")
    content = file.read_bytes()
    for at in (0, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert get().fingerprint == before and file.read_bytes() == content
        (said,) = get.said
        assert str(file.parent) in said and "damaged" in said
        assert name in said or name == cache.MANIFEST
        get.said.clear()
    get()
    assert not get.said


def test_a_lost_a_shortened_and_another_folders_file_are_found(get, tmp_path):
    before = get().fingerprint
    (file,) = (tmp_path / "cache").glob("*/train.bin")
    content = file.read_bytes()
    for harm in (
        lambda: file.unlink(),
        lambda: file.write_bytes(content[:-2]),
        lambda: file.write_bytes(file.with_name("valid.bin").read_bytes()),
        lambda: (file.with_name(cache.MANIFEST).unlink(), file.write_bytes(b"")),
    ):
        harm()
        assert get().fingerprint == before
        assert len(get.said) == 1
        get.said.clear()


def test_a_folder_under_anothers_name_is_found(get, tmp_path):
    wanted = get(60).fingerprint
    (folder,) = (tmp_path / "cache").iterdir()
    get(40)
    (other,) = set((tmp_path / "cache").iterdir()) - {folder}
    folder.rename(tmp_path / "away")
    other.rename(folder)
    assert get(60).fingerprint == wanted and len(get.said) == 1


def test_a_file_in_the_folders_place_gives_way(get, tmp_path):
    get()
    (folder,) = (tmp_path / "cache").iterdir()
    folder.rename(tmp_path / "away")
    folder.write_text("")
    get()
    assert folder.is_dir() and len(get.said) == 1


class Stop(BaseException):
    """As a signal's handler may raise it, between any two lines."""


def test_wherever_it_is_stopped_nothing_half_is_left_and_the_next_start_is_good(tmp_path):
    (tmp_path / "a.txt").write_text("a short story")
    config = DataConfig(str(tmp_path / "a.txt"), tokenizer="learned", cache=tmp_path / "cache")
    ours = {module.__file__ for module in (cache, data)}
    stopped = 0
    for moment in count():
        left = moment

        def trace(frame, event, arg):
            nonlocal left
            if frame.f_code.co_filename not in ours:
                return None
            left -= event == "line"
            if left < 0:
                sys.settrace(None)
                raise Stop
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            prepare(config, 260)
        except Stop:
            stopped += 1
        else:
            break
        finally:
            sys.settrace(before)
        for path in (tmp_path / "cache").glob("*"):
            if path.suffix != cache.PART:
                assert is_whole(path)
                cache.remove(path)
    assert stopped > 50
    (folder,) = (tmp_path / "cache").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)


def test_twelve_kills_leave_nothing_behind_for_the_next_start(tmp_path):
    (line,) = run(KILL, tmp_path)
    halves, fingerprint = json.loads(line)
    assert halves, "a kill came in the middle"
    for folder in (tmp_path / "cache").iterdir():
        assert is_whole(folder)
    config = DataConfig("builtin", num_stories=199, cache=tmp_path / "again")
    assert prepare(config, 400).fingerprint == fingerprint


def test_a_full_disk_is_one_line_and_leaves_nothing(get, tmp_path):
    before = get(100).fingerprint
    kept = set((tmp_path / "cache").iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 100, 5_000, 50_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(InputError, match=r"data.cache = .*--data.cache FOLDER") as raised:
                get(400)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "\n" not in str(raised.value)
        assert set((tmp_path / "cache").iterdir()) == kept
    assert get(100).fingerprint == before


@pytest.mark.skipif(bool(PLAIN) and which(PLAIN[0]) is None, reason="root, and no setpriv")
def test_a_read_only_cache_is_read_and_refused_in_one_line_where_it_must_be_written(tmp_path):
    length, error = run(READ_ONLY, tmp_path, PLAIN)
    assert int(length) > 1000
    assert "data.cache = cache" in error and "Permission denied" in error
