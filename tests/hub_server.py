"""A small Hugging Face hub on loopback: it answers what a pull asks, and remembers what it was asked."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT, OLD = "a" * 39 + "1", "b" * 39 + "2"
BIG = bytes(range(256)) * 400


def released(**changes: bytes | None) -> dict[str, bytes]:
    """Files as a VILA1.5 release has them."""
    files: dict[str, bytes | None] = {
        ".gitattributes": b"x",
        "README.md": b"card",
        "LICENSE": b"words",
        "config.json": b'{"model_type": "llava_llama"}',
        "modeling_vila.py": b"import os",
        "trainer_state.json": b"{}",
        "training_args.bin": b"pickle",
        "llm/config.json": b"{}",
        "llm/model-00001-of-00002.safetensors": BIG,
        "llm/model-00002-of-00002.safetensors": BIG[::-1],
        "llm/model.safetensors.index.json": b"{}",
        "llm/tokenizer.model": b"pieces",
        "vision_tower/config.json": b"{}",
        "vision_tower/model.safetensors": b"tower",
        "mm_projector/config.json": b"{}",
        "mm_projector/model.safetensors": b"projector",
        "mm_projector/modeling.py": b"import os",
    }
    return {name: content for name, content in (files | changes).items() if content is not None}


@dataclass
class Hub:
    """What the server answers, and what it was asked."""

    files: dict[str, bytes] = field(default_factory=released)
    card: dict[str, Any] = field(default_factory=lambda: {"license": "cc-by-nc-4.0"})
    gated: str | bool = False
    sizes: dict[str, int] = field(default_factory=dict)  # that are listed, if they are not the files'
    sent: dict[str, bytes] = field(default_factory=dict)  # content that is sent, if it is not the listed
    breaks: set[str] = field(default_factory=set)  # files whose connection breaks once, half way
    stalls: set[str] = field(default_factory=set)  # files that stop half way until `go_on`
    fails: set[str] = field(default_factory=set)  # files that the hub cannot give
    stalled: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Range
    tokens: set[str | None] = field(default_factory=set)
    endpoint: str = ""

    def fetched(self) -> list[str]:
        marker = f"/resolve/{COMMIT}/"
        return sorted(path.partition(marker)[2] for method, path, _ in self.asked if method == "GET" and marker in path)

    def listing(self, commit: str) -> dict[str, Any]:
        siblings = []
        for name, content in self.files.items():
            entry: dict[str, Any] = {"rfilename": name, "size": self.sizes.get(name, len(content))}
            entry["blobId"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            if name.endswith((".safetensors", ".pt")):
                sha256 = hashlib.sha256(content).hexdigest()
                entry |= {"blobId": "0" * 40, "lfs": {"sha256": sha256, "size": entry["size"], "pointerSize": 134}}
            siblings.append(entry)
        return {"id": "o/VILA", "sha": commit, "gated": self.gated, "cardData": self.card, "siblings": siblings}


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append((self.command, path, self.headers.get("Range")))
            hub.tokens.add(self.headers.get("Authorization"))
            known = {"/api/models/o/VILA": COMMIT} | {
                f"/api/models/o/VILA/revision/{name}": commit
                for name, commit in (("main", COMMIT), (COMMIT, COMMIT), ("v1/old", OLD), (OLD, OLD))
            }
            if path in known:
                self.reply(200, json.dumps(hub.listing(known[path])).encode())
            elif path.startswith("/api/models/o/VILA/revision/"):
                self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            elif path == "/api/models/o/VILA/auth-check":
                self.reply(403, b"{}", {"X-Error-Code": "GatedRepo"})
            elif path.startswith(("/o/VILA/resolve/",)):
                commit, _, name = path.removeprefix("/o/VILA/resolve/").partition("/")
                self.file(commit, name)
            elif path == "/api/models/o/odd":
                self.reply(200, b"<html>")
            elif path == "/api/models/o/broken":
                self.reply(500, b"{}")
            else:
                self.reply(401, b"{}", {"X-Error-Code": "RepoNotFound"})

        def file(self, commit: str, name: str) -> None:
            if name in hub.fails:
                self.reply(403, b"{}", {"X-Error-Message": "no"})
                return
            content = hub.sent.get(name, hub.files[name])
            headers = {
                "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Repo-Commit": COMMIT if commit == "main" else commit,
            }
            start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            stop = self.command == "GET" and (name in hub.breaks or name in hub.stalls)
            self.reply(206 if start else 200, content[start:], headers, len(content) // 2 if stop else None)
            if stop:
                hub.breaks.discard(name)
            if stop and name in hub.stalls:
                hub.stalled.set()
                hub.go_on.wait(20)

        def reply(
            self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: int | None = None
        ) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[:cut])
                self.wfile.flush()

    return Handler


def serve(hub: Hub) -> ThreadingHTTPServer:
    """A server that runs in a thread; `hub.endpoint` is its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server
