"""A web server on this machine that behaves as badly as a test asks for."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Page:
    """What a path answers; the lists are used up, one item a request, and then all goes well."""

    content: bytes = b""
    ranges: bool = True
    etag: str = ""
    kind: str = "application/octet-stream"
    location: str = ""
    declare: bool = True
    """Whether the length is told; a chunked page is told chunk by chunk."""
    chunked: bool = False
    content_range: str = ""
    """Sent in place of the right Content-Range."""
    surplus: bytes = b""
    """Sent behind the declared length, and then nothing until the server is closed."""
    statuses: list[int] = field(default_factory=list)
    cuts: list[int] = field(default_factory=list)
    """Bytes of the body after which the connection is closed."""
    stalls: list[int] = field(default_factory=list)
    """Bytes of the body after which nothing more comes until the server is closed."""


@dataclass
class Web:
    """The address of a server, its pages, and each request as (path, Range)."""

    address: str
    pages: dict[str, Page] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)

    def add(self, path: str, page: Page) -> str:
        """Serve a page; returns its url."""
        self.pages[path] = page
        return f"{self.address}/{path}"

    @property
    def ranges(self) -> list[str]:
        """The Range of each request, empty for none."""
        return [range_ for _, range_ in self.requests]


class _Handler(BaseHTTPRequestHandler):
    web: Web

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is logged."""

    def do_GET(self) -> None:
        name, asked = self.path.lstrip("/"), self.headers.get("Range", "")
        self.web.requests.append((name, asked))
        page = self.web.pages.get(name)
        if page is None:
            self.send_error(404)
        elif page.statuses:
            self.send_error(page.statuses.pop(0))
        elif page.location:
            self.send_response(302)
            self.send_header("Location", page.location)
            self.end_headers()
        else:
            self._send(page, asked)

    def _send(self, page: Page, asked: str) -> None:
        place = re.fullmatch(r"bytes=(\d+)-", asked) if page.ranges else None
        start, size = int(place[1]) if place else 0, len(page.content)
        if start >= size > 0:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{size}")
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            return
        self.send_response(206 if place else 200)
        if place:
            self.send_header("Content-Range", page.content_range or f"bytes {start}-{size - 1}/{size}")
        self.send_header("Content-Type", page.kind)
        if page.etag:
            self.send_header("ETag", page.etag)
        if page.chunked:
            self.protocol_version = "HTTP/1.1"
            self.send_header("Transfer-Encoding", "chunked")
        elif page.declare:
            self.send_header("Content-Length", str(size - start))
        self.end_headers()
        body, whole = page.content[start:], True
        if page.cuts:
            body, whole = body[: page.cuts.pop(0)], False
        stall = page.stalls.pop(0) if page.stalls else None
        body = body[:stall]
        if page.chunked:
            body = b"%x\r\n%s\r\n" % (len(body), body) + b"0\r\n\r\n" * whole
        self.wfile.write(body + page.surplus)
        self.wfile.flush()
        if stall is not None or page.surplus:
            self.web.closing.wait(20)


@contextmanager
def serve() -> Iterator[Web]:
    """A server in a thread of its own."""
    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    web = Web(f"http://127.0.0.1:{server.server_address[1]}")
    handler.web = web
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield web
    finally:
        web.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
