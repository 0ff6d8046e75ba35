"""A small server on loopback that answers as the Hub does to who asks for a model's config.json."""

import hashlib
import json
import re
import time
import urllib.parse
from contextlib import suppress

from tests.local_server import LocalServer, QuietHandler

COMMIT = "c" * 40


class ModelsServer(LocalServer):
    """Serves the config.json of models.

    Parameters
    ----------
    models
        By id the configuration; or instead of it what goes wrong: ``gated``, ``limited`` (429), ``broken`` (500),
        ``empty`` (a repository without a config.json), ``slow`` (an answer after seconds), or ``-> owner/name``
        (renamed).
    """

    def __init__(self, models: dict[str, dict | str]) -> None:
        super().__init__(_Handler)
        self.models = models
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, authorization


class _Handler(QuietHandler):
    server: ModelsServer

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Access-Control-Allow-Origin", "*")
        self.send_header("Access-Control-Expose-Headers", "X-Error-Code")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str | None = None) -> None:
        self.answer(b"{}", status, **({"X_Error_Code": code} if code else {}))

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        self.server.requests.append((self.command, path, self.headers["Authorization"]))
        if path == "/api/models":  # the Hub's search
            word = urllib.parse.parse_qs(urllib.parse.urlparse(self.path).query)["search"][
                0
            ].lower()
            body = json.dumps(
                [{"id": name} for name in self.server.models if word in name.lower()]
            ).encode()
            return self.answer(body, Content_Type="application/json")
        found = re.match(r"^/([^/]+/[^/]+)/resolve/([^/]+)/(.+)$", path)
        held = self.server.models.get(found[1]) if found else None
        if held is None:
            self.refuse(401 if self.headers["Authorization"] is None else 404, "RepoNotFound")
        elif held == "gated" and self.headers["Authorization"] is None:
            self.refuse(401, "GatedRepo")
        elif held == "gated":
            self.refuse(403, "GatedRepo")
        elif held == "limited":
            self.answer(b"{}", 429, Retry_After="0")
        elif held == "broken":
            self.refuse(500)
        elif held == "slow":
            time.sleep(3)
            with suppress(BrokenPipeError):  # who asked has gone
                self.refuse(500)
        elif isinstance(held, str) and held.startswith("-> "):
            self.answer(
                b"", 307, Location=f"/{held.removeprefix('-> ')}/resolve/{found[2]}/{found[3]}"
            )
        elif held == "empty" or found[3] != "config.json":
            self.refuse(404, "EntryNotFound")
        elif found[2] not in ("main", "v2", COMMIT):
            self.refuse(404, "RevisionNotFound")
        else:
            body = json.dumps(held).encode()
            self.answer(body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET
