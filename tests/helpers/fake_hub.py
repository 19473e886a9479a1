"""A stand-in for the hub on loopback, with as much of it as fetching a file or a dataset needs."""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

from utils.text.builtin.stories import builtin_stories
from utils.text.sources import SEPARATOR

TEXTS = list(builtin_stories(240))
TRAIN, VALID = TEXTS[:200], TEXTS[200:]
FILE_PATH = re.compile(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)")
API_PATH = re.compile(r"/api/(?:models/|(datasets/))([^/]+/[^/]+)(?:/([a-z-]+)/([^/]+)(?:/(.*))?)?")
COMMIT = re.compile("[0-9a-f]{40}")
REFUSALS = {
    "GATED": (403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."}),
    "PRIVATE": (401, b"", {"X-Error-Message": "Invalid username or password."}),
    "FORBIDDEN": (403, b"", {"X-Error-Message": "Forbidden"}),
    "LIMITED": (429, b"", {"RateLimit": '"api";r=0;t=99'}),
}
"""Answers to who asks for anything with one of these words in its name."""
CRAWL_PARTS, CRAWL_PAUSE_S = 20, 0.06
"""How a file with CRAWLS in its name comes."""


class FakeHub(ThreadingHTTPServer):
    """Serves `files`, named REPO/PATH or datasets/REPO/PATH, at any revision."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes], is_broken: bool) -> None:
        super().__init__(("127.0.0.1", 0), FakeHubHandler)
        self.files = files
        self.is_broken = is_broken
        self.closing = threading.Event()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files_of(self, repo: str) -> dict[str, bytes]:
        """Returns the files of a repository, by path."""
        start = f"{repo}/"
        return {
            name.removeprefix(start): content
            for name, content in self.files.items()
            if name.startswith(start)
        }


@contextmanager
def serve_hub(files: dict[str, bytes], is_broken: bool = False) -> Iterator[FakeHub]:
    """Runs a hub. A broken one answers 503 to everything; any answers 503 to what has BUSY in its
    name, and refuses what has one of REFUSALS in it. The second half of a file with CLOSES or
    STALLS in its name never comes; one with CRAWLS in it comes slowly."""
    with FakeHub(files, is_broken) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.closing.set()
            hub.shutdown()
            thread.join()


class FakeHubHandler(BaseHTTPRequestHandler):
    """Answers one connection's requests."""

    protocol_version = "HTTP/1.1"
    server: FakeHub

    def do_GET(self) -> None:
        self.name = ""
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(self.path.partition("?")[0])
        if self.server.is_broken or "BUSY" in path:
            self.answer(503, b"")
        elif refusal := next((name for name in REFUSALS if name in path), None):
            self.answer(*REFUSALS[refusal])
        elif match := FILE_PATH.fullmatch(path):
            self.send_file(*match.groups())
        elif match := API_PATH.fullmatch(path):
            self.send_info(*match.groups(""))
        else:
            self.answer(404, b"")

    do_HEAD = do_POST = do_GET

    def send_file(self, repo: str, revision: str, path: str) -> None:
        files = self.server.files_of(repo)
        content = files.get(path)
        if content is None:
            code = "EntryNotFound" if files else "RepoNotFound"
            return self.answer(
                404, b"", {"X-Error-Code": code, "X-Repo-Commit": commit_of(revision)}
            )
        headers = {
            "ETag": f'"{git_hash(content)}"',
            "X-Repo-Commit": commit_of(revision),
            "Accept-Ranges": "bytes",
        }
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        self.name, self.half = f"{repo}/{path}", len(content) // 2
        if wanted is None:
            return self.answer(200, content, headers)
        first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        self.half = max(0, self.half - first)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self.answer(206, content[first : last + 1], headers)

    def send_info(self, kind: str, repo: str, what: str, revision: str, folder: str) -> None:
        files = self.server.files_of(kind + repo)
        if not files:
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        if what == "tree":
            return self.send_json(list_tree(files, folder))
        if what == "paths-info":
            form = parse_qs(self.body.decode())
            wanted = form.get("paths") or json.loads(self.body)["paths"]
            entries = list_tree(files, "")
            return self.send_json([entry for entry in entries if entry["path"] in wanted])
        siblings = [{"rfilename": path} for path in files]
        info = {"id": repo, "sha": commit_of(revision), "siblings": siblings, "tags": []}
        self.send_json(info)

    def send_json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.send_body(content)

    def send_body(self, content: bytes) -> None:
        if "CRAWLS" in self.name:
            size = len(content) // CRAWL_PARTS + 1
            for begin in range(0, len(content), size):
                self.wfile.write(content[begin : begin + size])
                time.sleep(CRAWL_PAUSE_S)
        elif "CLOSES" in self.name or "STALLS" in self.name:
            self.wfile.write(content[: self.half])
            self.server.closing.wait(60 if "STALLS" in self.name else 0)
            self.close_connection = True
        else:
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Writes nothing on the terminal."""


def list_tree(files: dict[str, bytes], folder: str) -> list[dict]:
    """Returns every file and folder below `folder`, as the hub's API lists them."""
    folders = {path.rpartition("/")[0] for path in files} - {""}
    entries = [
        {"type": "directory", "oid": git_hash(path.encode()), "size": 0, "path": path}
        for path in folders
    ]
    entries += [
        {"type": "file", "oid": git_hash(content), "size": len(content), "path": path}
        for path, content in files.items()
    ]
    return [entry for entry in entries if not folder or entry["path"].startswith(f"{folder}/")]


def git_hash(content: bytes) -> str:
    """Returns what git names a file with this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def commit_of(revision: str) -> str:
    """Returns the commit that a revision stands for."""
    return revision if COMMIT.fullmatch(revision) else "0" * 40


def join_stories(texts: list[str]) -> str:
    """Returns the text that the tokens of some stories decode to."""
    return "".join(f"{text}{SEPARATOR}" for text in texts)


def make_parquet(texts: list[str], column: str = "text") -> bytes:
    """Returns a parquet file with one column of text."""
    import pyarrow
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pyarrow.table({column: texts}), file)
    return file.getvalue()


def run_with_hub(script: str, folder: Path, endpoint: str, args: list[str], offline: bool) -> Any:
    """Runs a script in a process of its own, since the hub's clients read their settings once.

    Args:
        script: Prints a line of JSON at its end.
        folder: Holds the clients' cache.
        endpoint: The hub's address.
        args: The script's arguments.
        offline: Set HF_HUB_OFFLINE.

    Returns:
        What it printed, once it has ended with exit code 0.
    """
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": str(int(offline)),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run(
        [sys.executable, "-c", script, *args],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "Retrying" not in done.stderr, "the clients keep their tries to themselves"
    return json.loads(done.stdout.splitlines()[-1])
