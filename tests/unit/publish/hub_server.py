"""A small server on loopback that speaks as much of the Hub's protocol as publishing needs.

Repositories are made, files announced, large ones sent by Git LFS (in one part or in several), and a commit takes all.
"""

import base64
import hashlib
import json
import re
import urllib.parse

from tests.local_server import LocalServer, QuietHandler


class HubServer(LocalServer):
    """Holds what was committed: ``repositories[type/owner/name]`` is a mapping of paths to bytes.

    Parameters
    ----------
    token
        The one that may write.
    large
        From how many bytes on a file goes by LFS.
    part
        From how many bytes on it is sent in several parts, each of so many.
    """

    def __init__(self, token: str, large: int = 1000, part: int = 40_000) -> None:
        super().__init__(_Handler)
        self.token, self.large, self.part = token, large, part
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}  # by SHA-256: sent, whether or not a commit has them
        self.parts: dict[tuple[str, int], bytes] = {}
        self.commits: list[str] = []
        self.puts = 0
        self.break_at: int | None = None  # the upload from which on the storage refuses
        self.refuse: set[str] = set()  # repositories that may not be written


class _Handler(QuietHandler):
    server: HubServer

    def answer(self, value: object = None, status: int = 200, **headers: str) -> None:
        body = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, text in headers.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"] or 0))

    def do_GET(self) -> None:
        found = re.match(r"/api/(models|datasets)/([^/]+/[^/]+)", self.path)
        name = found and f"{found[1][:-1]}/{found[2]}"
        if name not in self.server.repositories:
            self.answer({"error": "Repository not found"}, 404, **{"X-Error-Code": "RepoNotFound"})
            return
        files = [{"rfilename": path} for path in self.server.repositories[name]]
        commit = self.server.commits[-1] if self.server.commits else None
        self.answer(
            {"id": found[2], "private": self.server.private[name], "sha": commit, "siblings": files}
        )

    def do_PUT(self) -> None:
        """A file, or a part of one."""
        server, content = self.server, self.body()
        server.puts += 1
        if server.break_at is not None and server.puts >= server.break_at:
            self.answer(
                {"error": "The address has expired."}, 403
            )  # at once; a lost connection is tried for half a minute
            return
        _, oid, number = self.path.strip("/").split("/")
        server.parts[oid, int(number)] = content
        if number == "0":
            self.keep(oid, content)
        self.answer(ETag=f'"{hashlib.md5(content).hexdigest()}"')

    def keep(self, oid: str, content: bytes) -> None:
        assert hashlib.sha256(content).hexdigest() == oid
        self.server.objects[oid] = content

    def do_POST(self) -> None:
        server, path, body = (
            self.server,
            urllib.parse.unquote(self.path.partition("?")[0]),
            self.body(),
        )
        if path.startswith("/complete/"):  # an address of its own, as of a storage: no token
            given = json.loads(body)
            content = b"".join(
                server.parts[given["oid"], part["partNumber"]] for part in given["parts"]
            )
            self.keep(given["oid"], content)
            self.answer({})
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif self.headers["Authorization"] != f"Bearer {server.token}":
            self.answer({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            given = json.loads(body)
            name = (
                f"{given.get('type', 'model')}/{given.get('organization', 'owner')}/{given['name']}"
            )
            if name in server.refuse:
                self.answer({"error": f"You don't have the rights. Bearer {server.token}"}, 403)
            elif name in server.repositories:
                self.answer(
                    {"error": "You already created this repo", "url": self.address(name)}, 409
                )
            else:
                server.repositories[name], server.private[name] = (
                    {},
                    given["visibility"] == "private",
                )
                self.answer({"url": self.address(name)})
        elif found := re.match(r"/api/(model|dataset)s/([^/]+/[^/]+)/preupload/main$", path):
            here = server.repositories[f"{found[1]}/{found[2]}"]
            self.answer(
                {"files": [self.announced(file, here) for file in json.loads(body)["files"]]}
            )
        elif path.endswith("/info/lfs/objects/batch"):
            self.answer(
                {
                    "transfer": "multipart",
                    "objects": [self.wanted(one) for one in json.loads(body)["objects"]],
                }
            )
        elif path == "/verify":
            self.answer({}, 200 if json.loads(body)["oid"] in server.objects else 404)
        elif found := re.match(r"/api/(model|dataset)s/([^/]+/[^/]+)/commit/main$", path):
            self.commit(f"{found[1]}/{found[2]}", [json.loads(line) for line in body.splitlines()])
        else:
            self.answer({"error": path}, 404)

    def address(self, name: str) -> str:
        return f"{self.server.endpoint}/{name.removeprefix('model/').replace('dataset/', 'datasets/', 1)}"

    def announced(self, file: dict, here: dict[str, bytes]) -> dict:
        large = file["size"] >= self.server.large
        known = here.get(file["path"])
        if known is None:
            oid = None
        elif large:
            oid = hashlib.sha256(known).hexdigest()
        else:
            oid = hashlib.sha1(f"blob {len(known)}\0".encode() + known).hexdigest()
        return {
            "path": file["path"],
            "uploadMode": "lfs" if large else "regular",
            "shouldIgnore": False,
            "oid": oid,
        }

    def wanted(self, given: dict) -> dict:
        server, oid, size = self.server, given["oid"], given["size"]
        if oid in server.objects:
            return {"oid": oid, "size": size}
        action: dict = {"href": f"{server.endpoint}/upload/{oid}/0"}
        if size > server.part:
            count = -(-size // server.part)
            header = {
                str(number): f"{server.endpoint}/upload/{oid}/{number}"
                for number in range(1, count + 1)
            }
            action = {
                "href": f"{server.endpoint}/complete/{oid}",
                "header": {"chunk_size": str(server.part), **header},
            }
        return {
            "oid": oid,
            "size": size,
            "actions": {"upload": action, "verify": {"href": f"{server.endpoint}/verify"}},
        }

    def commit(self, name: str, lines: list[dict]) -> None:
        server, here = self.server, dict(self.server.repositories[name])
        for line in lines:
            value = line["value"]
            if line["key"] == "lfsFile":
                here[value["path"]] = server.objects[value["oid"]]
            elif line["key"] == "file":
                here[value["path"]] = base64.b64decode(value["content"])
        server.repositories[name] = here
        server.commits.append(hashlib.sha1(f"{name}{len(server.commits)}".encode()).hexdigest())
        url = f"{self.address(name)}/commit/{server.commits[-1]}"
        self.answer({"commitUrl": url, "commitOid": server.commits[-1], "pullRequestUrl": None})
