"""A small server on loopback that speaks as much of the Hub's protocol as reading a dataset needs.

Modes: what goes wrong, and where. ``ok`` serves everything.
"""

import hashlib
import json
import re
import threading
import time
import urllib.parse

from tests.local_server import LocalServer, QuietHandler

REPOSITORY = "owner/pairs"
CONFIGS = """---
license: mit
configs:
- config_name: train
  data_files:
  - split: train
    path: train/*
- config_name: test
  data_files:
  - split: train
    path: test/*
---
"""


class HubServer(LocalServer):
    """Serves one dataset repository: ``files`` (path -> bytes) at ``commit``, in one of the modes.

    Parameters
    ----------
    files
        The repository's files.
    mode
        ``ok``; ``unauthorized`` (401); ``gated`` (403); ``missing`` (404); ``slow`` (an answer that never comes);
        ``breaks`` (a data file's connection breaks off half-way).
    """

    def __init__(self, files: dict[str, bytes], mode: str = "ok", commit: str = "a" * 40) -> None:
        super().__init__(_Handler)
        self.files, self.mode, self.commit = files, mode, commit
        self.authorizations: set[str | None] = set()
        self.stopped = threading.Event()

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        super().__exit__()


class _Handler(QuietHandler):
    server: HubServer

    def answer(
        self, body: bytes, status: int = 200, length: int | None = None, **headers: str
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.answer(
            json.dumps({"error": code}).encode(), status, X_Error_Code=code, X_Error_Message=code
        )

    def entry(self, path: str) -> dict:
        content = self.server.files[path]
        return {
            "type": "file",
            "path": path,
            "size": len(content),
            "oid": hashlib.sha1(content).hexdigest(),
        }

    def children(self, folder: str) -> list[dict]:
        """The files and folders directly inside a folder."""
        prefix = f"{folder}/" if folder else ""
        below = [name.removeprefix(prefix) for name in self.server.files if name.startswith(prefix)]
        folders = sorted({name.split("/")[0] for name in below if "/" in name})
        files = [self.entry(prefix + name) for name in below if "/" not in name]
        return files + [
            {"type": "directory", "path": prefix + name, "oid": "0" * 40} for name in folders
        ]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0)).decode()
        paths = (
            json.loads(body)["paths"]
            if body.startswith("{")
            else urllib.parse.parse_qs(body)["paths"]
        )
        self.answer(
            json.dumps([self.entry(path) for path in paths if path in self.server.files]).encode()
        )

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        server = self.server
        if REPOSITORY in path:
            server.authorizations.add(self.headers["Authorization"])
        if server.mode == "slow":
            server.stopped.wait(30)
            return
        if server.mode == "unauthorized":
            self.answer(b'{"error": "Invalid username or password."}', 401)
        elif server.mode == "gated":
            self.refuse(403, "GatedRepo")
        elif server.mode == "missing" or not re.match(rf"(/api)?/datasets/{REPOSITORY}(/|$)", path):
            self.refuse(404, "RepoNotFound")
        elif found := re.match(rf"/api/datasets/{REPOSITORY}/tree/[^/]+/?(.*)$", path):
            self.answer(json.dumps(self.children(found[1].strip("/"))).encode())
        elif re.match(rf"/api/datasets/{REPOSITORY}(/revision/[^/]+)?$", path):
            siblings = [{"rfilename": name} for name in server.files]
            self.answer(
                json.dumps({"id": REPOSITORY, "sha": server.commit, "siblings": siblings}).encode()
            )
        elif found := re.match(rf"/datasets/{REPOSITORY}/resolve/[^/]+/(.*)$", path):
            self.send_file(found[1])
        else:
            self.refuse(404, "EntryNotFound")

    do_HEAD = do_GET

    def send_file(self, name: str) -> None:
        if name not in self.server.files:
            self.refuse(404, "EntryNotFound")
            return
        body = self.server.files[name]
        headers = {
            "ETag": f'"{hashlib.sha1(body).hexdigest()}"',
            "X_Repo_Commit": self.server.commit,
        }
        status, total = 200, len(body)
        if part := re.match(r"bytes=(\d+)-(\d*)", self.headers["Range"] or ""):
            first, last = int(part[1]), min(int(part[2] or total), total - 1)
            body, status = body[first : last + 1], 206
            headers["Content_Range"] = f"bytes {first}-{last}/{total}"
        if self.server.mode == "breaks" and not name.endswith(".md") and self.command == "GET":
            self.answer(body[: len(body) // 2], status, len(body), **headers)
            self.wfile.flush()
            time.sleep(0.05)
            self.close_connection = True
            self.connection.close()
            return
        self.answer(body, status, **headers)
