"""A stand-in for the Hub: repositories in memory, over HTTP on the loopback interface, for the real client libraries.

Clients run in processes of their own, with `Hub.environment`, because huggingface_hub reads it when it is imported.
Beside what the Hub does, a stand-in can fail on purpose, at the request of a given number.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from urllib.parse import parse_qs, unquote, urlparse

from card_validation import validate


SHA = "0123456789abcdef0123456789abcdef01234567"  # the one revision of repositories that are served from folders
OWNER, TOKEN = "someone", "hf_write"
ROLES = {TOKEN: "write", "hf_read": "read"}  # both are the owner's
STORED_APART = (".safetensors", ".parquet", ".gz", ".png")  # by LFS, as is all that is not text
TYPES = "models|datasets|spaces"


@dataclass
class File:
    """Content, or where it lies; by LFS or in the commit itself."""

    content: bytes | Path
    is_lfs: bool = False

    def read(self) -> bytes:
        return self.content if isinstance(self.content, bytes) else self.content.read_bytes()

    @property
    def size(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    @property
    def oid(self) -> str:
        if isinstance(self.content, Path):
            return SHA
        if self.is_lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(f"blob {self.size}\0".encode() + self.content).hexdigest()


@dataclass
class Repository:
    """Each commit holds all its files and stays what it was; a branch is the name of one."""

    private: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)  # of a Space

    def commit(self, branch: str, files: dict[str, File]) -> str:
        parts = [str(len(self.commits)), branch, *(f"{name} {files[name].oid}" for name in sorted(files))]
        sha = hashlib.sha1("\n".join(parts).encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {name: file.read() for name, file in self.commits[self.resolve(revision)].items()}


@dataclass
class Fault:
    """What happens at the request number `at`, counted from 1, or at the first whose address holds the text `at`.

    "refuse": answered with 403 and not done; "drop": not done, and the connection ends; "lost": done, but the
    connection ends before the answer; "kill": not done, and `act` is called, to end the client; "meanwhile": `act` is
    called, and then it is done.
    """

    at: int | str
    how: str
    act: Callable[[], None] = lambda: None


class Hub:
    """Repositories by `models/OWNER/NAME` and so on; `with Hub() as hub` serves them at `hub.endpoint`."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # LFS, by SHA-256
        self.transferred: list[tuple[str, int]] = []  # file and bytes of every download
        self.requests: list[str] = []
        self.fault: Fault | None = None
        self.lock = Lock()

    def __enter__(self) -> "Hub":
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Of a client, whose cache begins empty if `home` does; set before huggingface_hub is imported."""
        logged_in = {"HF_TOKEN": token} if token else {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
        settings = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), **settings, **logged_in}

    def begin(self, fault: Fault | None = None) -> None:
        """Counts requests anew."""
        self.requests.clear()
        self.fault = fault


class _Refused(Exception):
    """(status, the Hub's code for it, message)"""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        url = urlparse(self.path)
        self.path_only, self.query = url.path, {name: values[0] for name, values in parse_qs(url.query).items()}
        self.body = self._read_body()
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {self.path_only}")
            fault = self.hub.fault
            how = fault.how if fault is not None and self._is_at(fault.at) else ""
            if how:
                self.hub.fault = None
            if how == "refuse":
                return self._answer(403, b"{}", {"X-Error-Message": "Refused on purpose."})
            if how in ("kill", "meanwhile"):
                fault.act()
            if how not in ("kill", "drop"):
                try:
                    status, content, headers = self._route()
                except _Refused as refused:
                    status, code, message = refused.args
                    content = json.dumps({"error": message, "errors": [{"message": message}]}).encode()
                    headers = {"X-Error-Code": code, "X-Error-Message": message}
        if how in ("", "meanwhile"):
            self._answer(status, content, headers)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _is_at(self, place: int | str) -> bool:
        return place in self.path_only if isinstance(place, str) else place == len(self.hub.requests)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _route(self) -> tuple[int, bytes, dict[str, str]]:
        for method, pattern, work in ROUTES:
            match = re.fullmatch(pattern, self.path_only)
            if match and self.command in method:
                found = work(self, *(part and unquote(part) for part in match.groups()))
                return found if isinstance(found, tuple) else (200, json.dumps(found).encode(), JSON)
        raise _Refused(404, "", f"No such address: {self.command} {self.path_only}")

    # Who asks, and for what

    def _token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _repository(self, kind: str, name: str, *, write: bool = False) -> Repository:
        role = ROLES.get(self._token())
        found = self.hub.repositories.get(f"{kind}/{name}")
        if found is None or (found.private and role is None):
            raise _Refused(404 if role else 401, "RepoNotFound", "Repository not found")
        if write and (role != "write" or name.split("/")[0] != OWNER):
            raise _Refused(403 if role else 401, "", "You don't have the rights to write here")
        return found

    def _files(self, repository: Repository, revision: str) -> tuple[str, dict[str, File]]:
        sha = repository.resolve(revision)
        if sha is None:
            raise _Refused(404, "RevisionNotFound", "Invalid rev id")
        return sha, repository.commits[sha]

    # Accounts and repositories

    def whoami(self) -> dict:
        role = ROLES.get(self._token())
        if role is None:
            raise _Refused(401, "", "Invalid user token.")
        access = {"displayName": "test", "role": role}
        return {"type": "user", "name": OWNER, "orgs": [], "auth": {"type": "access_token", "accessToken": access}}

    def variables(self, name: str) -> dict:
        variables = self._repository("spaces", name, write=True).variables
        if self.command == "POST":
            asked = json.loads(self.body)
            variables[asked["key"]] = asked["value"]
        elif self.command == "DELETE":
            variables.pop(json.loads(self.body)["key"])
        return {key: {"key": key, "value": value} for key, value in variables.items()}

    def create(self) -> dict | tuple:
        asked = json.loads(self.body)
        owner, kind = asked.get("organization") or OWNER, f"{asked.get('type') or 'model'}s"
        role = ROLES.get(self._token())
        if role != "write" or owner != OWNER:
            raise _Refused(
                403 if role else 401, "", f"You don't have the rights to create a {kind[:-1]} under {owner}"
            )
        name = f"{owner}/{asked['name']}"
        url = {"url": f"{self.hub.endpoint}/{'' if kind == 'models' else kind + '/'}{name}", "name": name}
        if f"{kind}/{name}" in self.hub.repositories:
            return 409, json.dumps({**url, "error": "You already created this repo"}).encode(), JSON
        repository = Repository(private=asked.get("visibility") == "private")
        repository.commit("main", {".gitattributes": File(b"*.safetensors filter=lfs\n")})
        self.hub.repositories[f"{kind}/{name}"] = repository
        return url

    def auth_check(self, kind: str, name: str, write: str | None) -> dict:
        self._repository(kind, name, write=write is not None)
        return {}

    def branch(self, kind: str, name: str, branch: str) -> dict:
        repository = self._repository(kind, name, write=True)
        if branch in repository.branches:
            raise _Refused(409, "", "Reference already exists")
        start = (json.loads(self.body) if self.body else {}).get("startingPoint") or "main"
        repository.branches[branch] = self._files(repository, start)[0]
        return {}

    def info(self, kind: str, name: str, revision: str | None) -> dict:
        repository = self._repository(kind, name)
        sha, files = self._files(repository, revision or "main")
        siblings = [{"rfilename": path} for path in sorted(files)]
        return {"_id": "1", "id": name, "sha": sha, "private": repository.private, "tags": [], "siblings": siblings}

    def refs(self, kind: str, name: str) -> dict:
        branches = self._repository(kind, name).branches.items()
        listed = [{"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": sha} for branch, sha in branches]
        return {"branches": listed, "converts": [], "tags": []}

    # Reading

    def tree(self, kind: str, name: str, revision: str, folder: str | None) -> list:
        _, files = self._files(self._repository(kind, name), revision)
        entries = self._entries(files)
        prefix = f"{folder}/" if folder else ""
        if prefix and not any(path.startswith(prefix) for path in files):
            raise _Refused(404, "EntryNotFound", f"{folder} does not exist")
        recursive = self.query.get("recursive", "").lower() in ("true", "1")
        inside = [path for path in entries if path.startswith(prefix) and path != folder]
        return [entries[path] for path in inside if recursive or "/" not in path[len(prefix) :]]

    def paths_info(self, kind: str, name: str, revision: str) -> list:
        is_json = self.headers["Content-Type"].startswith("application/json")
        asked = json.loads(self.body) if is_json else parse_qs(self.body.decode())
        entries = self._entries(self._files(self._repository(kind, name), revision)[1])
        return [entries[path] for path in asked["paths"] if path in entries]

    def _entries(self, files: dict[str, File]) -> dict[str, dict]:
        entries = {}
        for path, file in sorted(files.items()):
            for parent in list(Path(path).parents)[-2::-1]:
                entries[str(parent)] = {"type": "directory", "path": str(parent), "oid": SHA, "size": 0}
            entries[path] = {"type": "file", "path": path, "oid": file.oid, "size": file.size}
            if file.is_lfs:
                entries[path]["lfs"] = {"oid": file.oid, "size": file.size, "pointerSize": 134}
        return entries

    def resolve(self, kind: str | None, name: str, revision: str, path: str) -> tuple:
        sha, files = self._files(self._repository(kind or "models", name), revision)
        if path not in files:
            return 404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha}
        content, etag, total, status = files[path].read(), files[path].oid, files[path].size, 200
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if files[path].is_lfs:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(total)}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end = int(wanted[1]), int(wanted[2] or total - 1)
            content, status = content[start : end + 1], 206
            headers["Content-Range"] = f"bytes {start}-{start + len(content) - 1}/{total}"
        if self.command == "GET":
            self.hub.transferred.append((path, len(content)))
        return status, content, headers

    # Writing

    def validate_yaml(self) -> dict | tuple:
        asked = json.loads(self.body)
        errors, warnings = validate(asked["content"], asked["repoType"])
        found = {
            name: [{"message": text} for text in texts] for name, texts in (("errors", errors), ("warnings", warnings))
        }
        return (400, json.dumps(found).encode(), JSON) if errors else found

    def preupload(self, kind: str, name: str, revision: str) -> dict:
        _, files = self._files(self._repository(kind, name, write=True), revision)
        answers = []
        for asked in json.loads(self.body)["files"]:
            is_lfs = asked["path"].endswith(STORED_APART) or b"\0" in base64.b64decode(asked["sample"])
            there = files.get(asked["path"])
            answer = {"path": asked["path"], "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False}
            answers.append({**answer, "oid": there and there.oid})
        return {"files": answers}

    def lfs_batch(self, kind: str | None, name: str) -> dict:
        self._repository(kind or "models", name, write=True)
        answers = []
        for asked in json.loads(self.body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.objects:
                upload, verify = (f"{self.hub.endpoint}/{what}/{asked['oid']}" for what in ("lfs", "lfs-verify"))
                answer["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
            answers.append(answer)
        return {"transfer": "basic", "objects": answers}

    def lfs_put(self, oid: str) -> dict:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refused(400, "", "The content has another SHA-256")
        self.hub.objects[oid] = self.body
        return {}

    def lfs_verify(self, oid: str) -> dict:
        if len(self.hub.objects.get(oid, b"")) != json.loads(self.body)["size"]:
            raise _Refused(400, "", "The object is not there")
        return {}

    def commit(self, kind: str, name: str, branch: str) -> dict:
        repository = self._repository(kind, name, write=True)
        if branch not in repository.branches:
            raise _Refused(404, "RevisionNotFound", "Invalid rev id")
        head, files = self._files(repository, branch)
        files = dict(files)
        for line in self.body.decode().splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header" and value.get("parentCommit", head) != head:
                raise _Refused(412, "", "A commit has happened since. Please refresh and try again")
            if key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise _Refused(400, "", "The commit points to an LFS file that is not there")
                files[value["path"]] = File(self.hub.objects[value["oid"]], is_lfs=True)
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise _Refused(404, "EntryNotFound", "A file with this name doesn't exist")
        sha = repository.commit(branch, files)
        url = f"{self.hub.endpoint}/{'' if kind == 'models' else kind + '/'}{name}/commit/{sha}"
        return {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""}

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments) -> None:
        pass


JSON = {"Content-Type": "application/json"}
_REPOSITORY = rf"/api/({TYPES})/([^/]+/[^/]+)"
ROUTES = (
    (("GET",), "/api/whoami-v2", _Handler.whoami),
    (("POST",), "/api/repos/create", _Handler.create),
    (("POST",), "/api/validate-yaml", _Handler.validate_yaml),
    (("GET",), rf"{_REPOSITORY}/auth-check(/write)?", _Handler.auth_check),
    (("GET", "POST", "DELETE"), "/api/spaces/([^/]+/[^/]+)/variables", _Handler.variables),
    (("GET",), rf"{_REPOSITORY}/refs", _Handler.refs),
    (("GET",), rf"{_REPOSITORY}/tree/([^/]+)(?:/(.*))?", _Handler.tree),
    (("POST",), rf"{_REPOSITORY}/paths-info/([^/]+)", _Handler.paths_info),
    (("POST",), rf"{_REPOSITORY}/branch/([^/]+)", _Handler.branch),
    (("POST",), rf"{_REPOSITORY}/preupload/([^/]+)", _Handler.preupload),
    (("POST",), rf"{_REPOSITORY}/commit/([^/]+)", _Handler.commit),
    (("GET",), rf"{_REPOSITORY}(?:/revision/([^/]+))?", _Handler.info),
    (("POST",), rf"/(?:({TYPES})/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (("PUT",), "/lfs/([0-9a-f]{64})", _Handler.lfs_put),
    (("POST",), "/lfs-verify/([0-9a-f]{64})", _Handler.lfs_verify),
    (("GET", "HEAD"), rf"/(?:({TYPES})/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", _Handler.resolve),
)


@contextmanager
def serve(root: Path) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """
    Public dataset repositories from the folders ROOT/OWNER/NAME, whose one revision is `SHA`.

    Gives the address to set as HF_ENDPOINT, and what is transferred, which grows.
    """
    with Hub() as hub:
        for folder in root.glob("*/*"):
            files = {str(path.relative_to(folder)): File(path) for path in folder.rglob("*") if path.is_file()}
            name = f"datasets/{folder.relative_to(root).as_posix()}"
            hub.repositories[name] = Repository(commits={SHA: files}, branches={"main": SHA})
        yield hub.endpoint, hub.transferred
