"""A stand-in for the hub on loopback: as much of it as fetching a file or a dataset asks for."""

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote

FILE = re.compile(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)")
API = re.compile(r"/api/(?:models/|(datasets/))([^/]+/[^/]+)(?:/([a-z-]+)/([^/]+)(?:/(.*))?)?")
COMMIT = re.compile("[0-9a-f]{40}")


class Hub(ThreadingHTTPServer):
    """Serves `files`, named REPO/PATH or datasets/REPO/PATH, at any revision."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes], broken: bool) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.broken = broken
        self.log: list[str] = []
        self.over = threading.Event()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def in_repo(self, repo: str) -> dict[str, bytes]:
        start = f"{repo}/"
        return {
            name.removeprefix(start): content
            for name, content in self.files.items()
            if name.startswith(start)
        }


@contextmanager
def serving(files: dict[str, bytes], broken: bool = False) -> Iterator[Hub]:
    """A broken hub answers 503 to everything; a good one still does for what has BUSY in its name.

    Of a file with CLOSES or STALLS in its name the second half never comes; one with CRAWLS in it
    comes slowly.
    """
    with Hub(files, broken) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.over.set()
            hub.shutdown()
            thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        self.name = ""
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.log.append(f"{self.command} {self.path}")
        path = unquote(self.path.partition("?")[0])
        if self.server.broken or "BUSY" in path:
            self.answer(503, b"")
        elif match := FILE.fullmatch(path):
            self.send_file(*match.groups())
        elif match := API.fullmatch(path):
            self.send_facts(*match.groups(""))
        else:
            self.answer(404, b"")

    do_HEAD = do_POST = do_GET

    def send_file(self, repo: str, revision: str, path: str) -> None:
        content = self.server.in_repo(repo).get(path)
        if content is None:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        headers = {
            "ETag": f'"{oid(content)}"',
            "X-Repo-Commit": commit(revision),
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

    def send_facts(self, kind: str, repo: str, what: str, revision: str, folder: str) -> None:
        files = self.server.in_repo(kind + repo)
        if not files:
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        if what == "tree":
            return self.send_json(tree(files, folder))
        if what == "paths-info":
            form = parse_qs(self.body.decode())
            wanted = form.get("paths") or json.loads(self.body)["paths"]
            return self.send_json([entry for entry in tree(files, "") if entry["path"] in wanted])
        siblings = [{"rfilename": path} for path in files]
        self.send_json({"id": repo, "sha": commit(revision), "siblings": siblings, "tags": []})

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
            for at in range(0, len(content), len(content) // 20 + 1):
                self.wfile.write(content[at : at + len(content) // 20 + 1])
                time.sleep(0.06)
        elif "CLOSES" in self.name or "STALLS" in self.name:
            self.wfile.write(content[: self.half])
            self.server.over.wait(60 if "STALLS" in self.name else 0)
            self.close_connection = True
        else:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Not on the terminal: `Hub.log` has it."""


def tree(files: dict[str, bytes], folder: str) -> list[dict]:
    """Every file and folder below `folder`."""
    folders = {path.rpartition("/")[0] for path in files} - {""}
    entries = [{"type": "directory", "oid": oid(f.encode()), "size": 0, "path": f} for f in folders]
    entries += [
        {"type": "file", "oid": oid(content), "size": len(content), "path": path}
        for path, content in files.items()
    ]
    return [entry for entry in entries if not folder or entry["path"].startswith(f"{folder}/")]


def oid(content: bytes) -> str:
    """As git names it."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def commit(revision: str) -> str:
    return revision if COMMIT.fullmatch(revision) else "0" * 40
