"""A read-only Hub: dataset repositories from folders, over HTTP, for the calls that huggingface_hub makes to read."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote, urlparse


SHA = "0123456789abcdef0123456789abcdef01234567"  # the one revision of every repository


class _Handler(BaseHTTPRequestHandler):
    root: Path  # ROOT/OWNER/NAME holds a repository's files
    transferred: list[tuple[str, int]]  # file and bytes of every download

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/[^/]+/?(.*)", path):
            recursive = parse_qs(urlparse(self.path).query).get("recursive", [""])[0].lower() == "true"
            folder = self.root / match[1] / match[2]
            if not folder.is_dir():
                return self._missing("EntryNotFound")
            names = sorted(folder.rglob("*") if recursive else folder.iterdir())
            return self._json([self._entry(match[1], name) for name in names])
        if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(/revision/[^/]+)?", path):
            files = [
                str(f.relative_to(self.root / match[1])) for f in (self.root / match[1]).rglob("*") if f.is_file()
            ]
            return self._json({"id": match[1], "sha": SHA, "siblings": [{"rfilename": name} for name in files]})
        if match := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self._file(match[1], match[2])
        return self._missing("RepoNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = unquote(urlparse(self.path).path)
        match = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/paths-info/[^/]+", path)
        content = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if self.headers["Content-Type"].startswith("application/json"):
            paths = json.loads(content)["paths"]
        else:
            paths = parse_qs(content)["paths"]
        found = [self.root / match[1] / name for name in paths]
        self._json([self._entry(match[1], name) for name in found if name.exists()])

    def _entry(self, repository: str, path: Path) -> dict:
        name = str(path.relative_to(self.root / repository))
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": SHA, "size": 0}
        return {"type": "file", "path": name, "oid": SHA, "size": path.stat().st_size}

    def _file(self, repository: str, name: str) -> None:
        path = self.root / repository / name
        if not path.is_file():
            return self._missing("EntryNotFound")
        content, total = path.read_bytes(), path.stat().st_size
        headers = {"ETag": f'"{SHA}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        status = 200
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end = int(wanted[1]), int(wanted[2] or total - 1)
            content, status = content[start : end + 1], 206
            headers["Content-Range"] = f"bytes {start}-{start + len(content) - 1}/{total}"
        if self.command == "GET":
            self.transferred.append((name, len(content)))
        return self._answer(status, content, headers)

    def _json(self, value: list | dict) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _missing(self, code: str) -> None:
        self._answer(404, b"{}", {"X-Error-Code": code})

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments) -> None:
        pass


@contextmanager
def serve(root: Path) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """The address to set as HF_ENDPOINT, and what is transferred, which grows."""
    transferred: list[tuple[str, int]] = []
    handler = type("Handler", (_Handler,), {"root": root, "transferred": transferred})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", transferred
    finally:
        server.shutdown()
