"""A cache of the Hugging Face hub as its library lays it out, and a small hub that serves such repositories."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"

Files = Mapping[str, bytes]


def write_cached(
    cache: Path, kind: str, repository: str, files: Files, *, commit: str = COMMIT, ref: str = "main"
) -> Path:
    """Put a snapshot into a cache: links to blobs, and the commit of a branch or tag. Returns the snapshot's folder."""
    folder = cache / f"{kind}s--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    for name in ("refs", "blobs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    snapshot.mkdir(parents=True, exist_ok=True)
    (folder / "refs" / ref).write_text(commit)
    for name, content in files.items():
        blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).unlink(missing_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    return snapshot


@dataclass
class Hub:
    """A hub on this machine, with branch main at `COMMIT` of every repository.

    Attributes:
        repositories: Files by kind ("model" or "dataset") and id.
        gated: Ids whose files nobody may have.
        requests: What was asked for: method and path.
    """

    repositories: dict[tuple[str, str], Files] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    address: str = ""

    def environment(self, cache: Path) -> dict[str, str]:
        """What a process needs to use it, with a cache of its own."""
        return {
            "HF_ENDPOINT": self.address,
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def answer(self, path: str, form: Mapping[str, list[str]]) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the answer to a request.

        Args:
            form: Values of the query and of the body.
        """
        steps = path.strip("/").split("/")
        api = steps[0] == "api"
        steps = steps[1:] if api else steps
        kind = "dataset" if steps[0] == "datasets" else "model"
        steps = steps[1:] if steps[0] in ("models", "datasets") else steps
        repository, rest = "/".join(steps[:2]), steps[2:]
        if (kind, repository) not in self.repositories:
            return _error(404, "RepoNotFound")
        if len(rest) > 1 and rest[1] not in ("main", COMMIT):
            return _error(404, "RevisionNotFound")
        files = self.repositories[kind, repository]
        if api:
            if rest[:1] == ["auth-check"]:
                return _error(403, "GatedRepo")
            return _json(self._described(rest, repository, files, form))
        if repository in self.gated:
            return _error(403, "GatedRepo")
        name = "/".join(rest[2:])
        if name not in files:
            return _error(404, "EntryNotFound")
        tag = hashlib.sha1(files[name]).hexdigest()
        return 200, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}, files[name]

    def _described(self, rest: list[str], repository: str, files: Files, form: Mapping[str, list[str]]) -> Any:
        if rest[:1] in ([], ["revision"]):
            siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
            gated = "manual" if repository in self.gated else False
            return {"id": repository, "sha": COMMIT, "private": False, "gated": gated, "siblings": siblings}
        folders = {str(parent) for name in files for parent in PurePosixPath(name).parents} - {"."}
        entries: list[dict[str, Any]] = [
            {"type": "directory", "path": folder, "oid": "0" * 40} for folder in sorted(folders)
        ]
        entries += [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in files.items()
        ]
        if rest[0] == "paths-info":
            return [entry for entry in entries if entry["path"] in form.get("paths", [])]
        if form.get("recursive", [""])[0].lower() == "true":
            return entries
        parent = "/".join(rest[2:]) or "."
        return [entry for entry in entries if str(PurePosixPath(entry["path"]).parent) == parent]


def _json(document: Any) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(document).encode()


def _error(status: int, code: str) -> tuple[int, dict[str, str], bytes]:
    return status, {"X-Error-Code": code, "X-Repo-Commit": COMMIT}, b""


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers at its `address`."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            path, query = unquote(urlsplit(self.path).path), parse_qs(urlsplit(self.path).query)
            hub.requests.append(f"{self.command} {path}")
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, headers, content = hub.answer(path, {**query, **parse_qs(body.decode())})
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = answer  # noqa: N815

        def log_message(self, *_arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
