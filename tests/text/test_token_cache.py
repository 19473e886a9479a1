"""The folder of tokens is whole or not there, and damage in it is noticed, whatever happens."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from shutil import rmtree, which

import pytest

from config import DataConfig, InputError
from utils import data
from utils.data import Corpus, prepare_corpus
from utils.text import token_cache
from utils.text.token_cache import MANIFEST, cached_folder, find_damage

ROOT = Path(__file__).parents[2]
FILES = ["train.bin", "valid.bin", "meta.json", "tokenizer.json", MANIFEST]
PLAIN = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.getuid() == 0 else []
"""Runs a command as a user whom file modes bind, as they do not bind root."""
FORKED = """
import json, os, random, signal, sys, time
from pathlib import Path
from config import DataConfig, InputError
from utils.data import prepare_corpus

def prepare(num_stories=200, warn=print):
    config = DataConfig("builtin", num_stories=num_stories, cache=Path("cache"))
    return prepare_corpus(config, 400, warn)

def fork(call):
    if pid := os.fork():
        return pid
    try:
        call()
    finally:
        os._exit(0)

os.chdir(sys.argv[1])
"""
KILL = """
started = time.monotonic()
os.waitpid(fork(lambda: prepare(300)), 0)
whole, num_partial = time.monotonic() - started, 0
random.seed(0)
for moment in range(12):
    pid = fork(lambda: prepare(200 + moment))
    if moment % 2:  # as soon as something half written is seen
        deadline = time.monotonic() + 9 * whole
        while not [*Path("cache").glob("*.part")] and time.monotonic() < deadline:
            pass
    else:
        time.sleep(whole * random.uniform(0.05, 0.95))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    num_partial += len(list(Path("cache").glob("*.part")))
print(json.dumps([num_partial, prepare(199).fingerprint]))
"""
READ_ONLY = """
prepare()
for path in (*Path("cache").rglob("*"), Path("cache")):
    path.chmod(0o555)
print(len(prepare().train))
try:
    prepare(100)
except InputError as error:
    print(error)
"""
TOGETHER = """
def report():
    fingerprint = prepare(300, lambda line: None).fingerprint
    os.write(1, f"{fingerprint}\\n".encode())

for pid in [fork(report) for _ in range(3)]:
    os.waitpid(pid, 0)
"""
OPEN_AT_ONCE = """
from shutil import rmtree

def open_often():
    try:
        for _ in range(5):
            assert len(prepare(20, lambda line: None).train)
    except BaseException:
        os._exit(1)

failed = 0
for _ in range(int(sys.argv[2])):
    pids = [fork(open_often) for _ in range(4)]
    failed += sum(os.waitpid(pid, 0)[1] != 0 for pid in pids)
    rmtree("cache")
print(failed)
"""
OPEN_ONCE = """
assert len(prepare(20, lambda line: None).train)
"""


@pytest.fixture
def warnings():
    return []


@pytest.fixture
def prepare(tmp_path, warnings):
    """Prepares a small corpus whose tokens are cached under tmp_path."""

    def prepare(num_stories=60) -> Corpus:
        config = DataConfig("builtin", num_stories=num_stories, cache=tmp_path / "cache")
        return prepare_corpus(config, 300, warnings.append)

    return prepare


def run_forked(script: str, folder: Path, *args: str, wrapper: Sequence[str] = ()) -> list[str]:
    done = subprocess.run(
        [*wrapper, sys.executable, "-c", FORKED + script, str(folder), *args],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=3_600 if args else 60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def is_whole(folder: Path) -> bool:
    identity = json.loads((folder / MANIFEST).read_text())["identity"]
    return find_damage(folder, identity) is None


def folders_in(cache: Path) -> set[Path]:
    return {path for path in cache.iterdir() if path.is_dir()}


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_noticed_and_mended(prepare, warnings, tmp_path, name):
    before = prepare().fingerprint
    (file,) = (tmp_path / "cache").glob(f"*/{name}")
    content = file.read_bytes()
    for i in (0, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
        assert prepare().fingerprint == before and file.read_bytes() == content
        (warning,) = warnings
        assert str(file.parent) in warning and "damaged" in warning
        assert name in warning or name == MANIFEST
        warnings.clear()
    prepare()
    assert not warnings


def test_a_lost_a_shortened_and_another_folders_file_are_noticed(prepare, warnings, tmp_path):
    before = prepare().fingerprint
    (file,) = (tmp_path / "cache").glob("*/train.bin")
    content = file.read_bytes()
    for damage in (
        lambda: file.unlink(),
        lambda: file.write_bytes(content[:-2]),
        lambda: file.write_bytes(file.with_name("valid.bin").read_bytes()),
        lambda: (file.with_name(MANIFEST).unlink(), file.write_bytes(b"")),
    ):
        damage()
        assert prepare().fingerprint == before
        assert len(warnings) == 1
        warnings.clear()


def test_a_folder_under_anothers_name_is_noticed(prepare, warnings, tmp_path):
    wanted = prepare(60).fingerprint
    (folder,) = folders_in(tmp_path / "cache")
    prepare(40)
    (other,) = folders_in(tmp_path / "cache") - {folder}
    folder.rename(tmp_path / "away")
    other.rename(folder)
    assert prepare(60).fingerprint == wanted and len(warnings) == 1


@pytest.mark.parametrize("replace", [Path.touch, lambda path: path.symlink_to("nowhere")])
def test_what_is_no_folder_gives_way(prepare, warnings, tmp_path, replace):
    prepare()
    (folder,) = folders_in(tmp_path / "cache")
    folder.rename(tmp_path / "away")
    replace(folder)
    prepare()
    assert is_whole(folder) and not folder.is_symlink() and len(warnings) == 1


class Stop(BaseException):
    """Comes like a signal's handler, between any two lines."""


def test_wherever_it_is_stopped_nothing_half_is_left_and_the_next_start_is_good(tmp_path):
    (tmp_path / "a.txt").write_text("a short story")
    cache = tmp_path / "cache"
    config = DataConfig(str(tmp_path / "a.txt"), tokenizer="learned", cache=cache)
    traced = {module.__file__ for module in (token_cache, data)}
    stopped = 0
    for moment in count():
        left = moment

        def trace(frame, event, arg):
            nonlocal left
            if frame.f_code.co_filename not in traced:
                return None
            left -= event == "line"
            if left < 0:
                sys.settrace(None)
                raise Stop
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            prepare_corpus(config, 260)
        except Stop:
            stopped += 1
        else:
            break
        finally:
            sys.settrace(before)
        for folder in folders_in(cache) if cache.exists() else ():
            assert is_whole(folder)
            rmtree(folder)
    assert stopped > 50
    (folder,) = folders_in(cache)
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)


def test_twelve_kills_leave_nothing_behind_for_the_next_start(tmp_path):
    (line,) = run_forked(KILL, tmp_path)
    num_partial, fingerprint = json.loads(line)
    assert num_partial, "a kill came in the middle"
    for folder in folders_in(tmp_path / "cache"):
        assert is_whole(folder)
    config = DataConfig("builtin", num_stories=199, cache=tmp_path / "again")
    assert prepare_corpus(config, 400).fingerprint == fingerprint


def test_processes_that_build_the_same_folder_at_once_get_the_same_tokens(tmp_path):
    fingerprints = run_forked(TOGETHER, tmp_path)
    assert len(fingerprints) == 3 and len(set(fingerprints)) == 1
    assert all(map(is_whole, folders_in(tmp_path / "cache")))


@pytest.mark.parametrize("rounds", [4, pytest.param(500, marks=pytest.mark.long)])
def test_workers_that_open_one_cache_at_once_all_get_it(rounds, tmp_path):
    """Twenty openings by four workers in each round, the first of which build it."""
    assert run_forked(OPEN_AT_ONCE, tmp_path, str(rounds)) == ["0"]


@pytest.mark.parametrize("rounds", [1, pytest.param(75, marks=pytest.mark.long)])
def test_processes_that_start_at_once_on_one_cache_all_get_it(rounds, tmp_path):
    """Four whole processes in each round."""
    for number in range(rounds):
        folder = tmp_path / str(number)
        folder.mkdir()
        with ThreadPoolExecutor(4) as starts:
            list(starts.map(run_forked, [OPEN_ONCE] * 4, [folder] * 4))


def test_a_whole_folder_stays_though_another_process_builds_it_too(tmp_path):
    """As where a lock does not hold, as it may not over a network."""

    def build(folder: Path) -> None:
        (folder / "text").write_text("whole")

    def build_late(folder: Path) -> None:
        build(folder)
        first.rename(tmp_path / "cache" / first.name)

    first = cached_folder(tmp_path / "other", ["a"], build, pytest.fail)
    inode = first.stat().st_ino
    folder = cached_folder(tmp_path / "cache", ["a"], build_late, pytest.fail)
    assert folder.stat().st_ino == inode and is_whole(folder)
    assert folders_in(tmp_path / "cache") == {folder}


def test_a_full_disk_is_one_line_and_leaves_nothing(prepare, tmp_path):
    before = prepare(100).fingerprint
    files = set((tmp_path / "cache").iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 100, 5_000, 50_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(InputError, match=r"data.cache = .*--data.cache FOLDER") as raised:
                prepare(400)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "\n" not in str(raised.value)
        assert set((tmp_path / "cache").iterdir()) == files
    assert prepare(100).fingerprint == before


@pytest.mark.skipif(bool(PLAIN) and which(PLAIN[0]) is None, reason="root, and no setpriv")
def test_a_read_only_cache_is_read_and_refused_in_one_line_where_it_must_be_written(tmp_path):
    length, error = run_forked(READ_ONLY, tmp_path, wrapper=PLAIN)
    assert int(length) > 1000
    assert "data.cache = cache" in error and "Permission denied" in error
