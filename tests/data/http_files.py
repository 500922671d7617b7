"""A server of files for tests: ranges, versions (ETag), a list of what was asked, and faults on request."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Files:
    """What ``served`` runs: ``asked`` lists (path, first byte, end) of each GET, ``faults`` what the next ones get instead:
    a status, or "cut" for half of the bytes, or "whole" for all of the file."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.url = folder, ""
        self.asked: list[tuple[str, int, int]] = []
        self.faults: list[int | str] = []


@contextmanager
def served(folder: Path) -> Iterator[Files]:
    files = Files(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self._answer(body=False)

        def do_GET(self):
            self._answer(body=True)

        def log_message(self, *args):
            pass

        def _answer(self, body):
            path = folder / self.path.lstrip("/")
            if not path.is_file():
                self._head(404, 0)
                return
            content = path.read_bytes()
            tag = f'"{path.stat().st_mtime_ns}"'
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
            first, end = (int(wanted[1]), min(int(wanted[2]) + 1, len(content))) if wanted else (0, len(content))
            fault = None
            if body:
                files.asked.append((self.path, first, end))
                fault = files.faults.pop(0) if files.faults else None
            if isinstance(fault, int):
                self._head(fault, 0)
                return
            if fault == "whole":
                first, end, wanted = 0, len(content), None
            part = content[first:end]
            self._head(
                206 if wanted else 200, len(part), tag, f"bytes {first}-{end - 1}/{len(content)}" if wanted else None
            )
            if body:
                self.wfile.write(part[: len(part) // 2] if fault == "cut" else part)
                if fault == "cut":
                    self.close_connection = True
                    self.connection.shutdown(2)

        def _head(self, status, length, tag=None, range_=None):
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            self.send_header("Accept-Ranges", "bytes")
            if tag:
                self.send_header("ETag", tag)
            if range_:
                self.send_header("Content-Range", range_)
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    files.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield files
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
