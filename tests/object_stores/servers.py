"""Servers on loopback: an S3 server (SeaweedFS), and an HTTP server that fails on demand."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen
from zlib import crc32

from tests.ports import free_ports

BUCKET = "slides"
WEED = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


@contextmanager
def s3_server(folder: Path) -> Iterator[dict[str, str]]:
    """Run SeaweedFS with a bucket; yield the variables AWS_* with which it is reached."""
    login = {"AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "a-secret-of-the-tests"}
    places = ("master.port", "volume.port", "filer.port", "s3.port")
    ports = dict(zip([*places, *(f"{p}.grpc" for p in places)], free_ports(8), strict=True))
    command = [
        str(WEED), "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        f"-bucket={BUCKET}", "-admin.ui=false", "-webdav=false",
        "-s3.port.iceberg=0", *(f"-{name}={port}" for name, port in ports.items()),
    ]  # fmt: skip
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=os.environ | login, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        address = f"http://127.0.0.1:{ports['s3.port']}"
        _wait(process, f"{address}/{BUCKET}", folder / "log")
        yield login | {"AWS_ENDPOINT_URL": address, "AWS_REGION": "us-east-1"}
    finally:
        process.kill()  # its data are thrown away
        process.wait()


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Wait until the bucket exists: without a login it is forbidden then, and not missing."""
    for _ in range(600):
        if process.poll() is not None:
            break
        try:
            urlopen(url)
        except HTTPError as error:
            if error.code == 403:
                return
        except URLError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"SeaweedFS did not start: {log.read_text()[-2000:]}")


@dataclass(frozen=True)
class Request:
    """A request that the server answered: method, path, first byte and one after the last."""

    method: str
    path: str
    start: int = 0
    stop: int = 0


@dataclass
class WebServer:
    """An HTTP server of a folder, with ranges and ETags.

    Attributes
    ----------
    faults : deque of str
        What the next GET requests get instead of an answer: ``503``, ``cut`` (the connection ends
        in the middle), ``other range``, ``short`` (fewer bytes, and a header that says so),
        ``whole`` (the file instead of the range), ``late`` (a second later).
    etags : bool
        State ETags, and answer ``If-Match``.
    requests : list of Request
    """

    folder: Path
    url: str = ""
    etags: bool = True
    faults: deque[str] = field(default_factory=deque)
    requests: list[Request] = field(default_factory=list)

    @property
    def bytes_sent(self) -> int:
        return sum(request.stop - request.start for request in self.requests)


@contextmanager
def web_server(folder: Path) -> Iterator[WebServer]:
    """Serve the files of a folder."""
    state = WebServer(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = folder / self.path.lstrip("/")
            if not path.is_file():
                self.plain(404)
                return
            data = path.read_bytes()
            etag = f'"{crc32(data):08x}"'
            if state.etags and self.headers.get("If-Match", etag) != etag:
                self.plain(412)
                return
            found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            start, stop = (int(found[1]), int(found[2]) + 1) if found else (0, len(data))
            stop = min(stop, len(data))
            fault = state.faults.popleft() if self.command == "GET" and state.faults else ""
            if fault == "503":
                self.plain(503)
                return
            if fault == "late":
                time.sleep(1)
            if fault == "other range":
                start, stop = start + 1, min(stop + 1, len(data))
            if fault == "short":
                stop -= 1
            if fault == "whole":
                found, start, stop = None, 0, len(data)
            body = data[start:stop] if self.command == "GET" else b""
            state.requests.append(Request(self.command, self.path, start, start + len(body)))
            self.send_response(206 if found else 200)
            if found:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
            self.send_header("Content-Length", str(stop - start))
            self.send_header("Accept-Ranges", "bytes")
            stored = self.date_time_string(int(path.stat().st_mtime))
            self.send_header("Last-Modified", stored)
            if state.etags:
                self.send_header("ETag", etag)
            self.end_headers()
            with suppress(ConnectionError):  # a client need not read all of a wrong answer
                self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)
            if fault == "cut":
                self.close_connection = True

        def plain(self, status: int) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
