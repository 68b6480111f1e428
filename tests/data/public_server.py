"""A small HTTP server on this machine that misbehaves as told, in the place of the publishers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


@dataclass
class Publisher:
    """What the server sends and how badly.

    Attributes:
        files: content by path and query.
        ranges: whether it continues a file.
        cuts: for the next answers with content, after how many bytes of it the connection ends; None is not at all.
        statuses: for the next answers, an HTTP status other than 200.
        announced: a wrong Content-Length for all answers; -1 leaves it out.
        chunked: whether it sends a stream of chunks without a length.
        redirect: where every request is sent on to.
        etag: what tells versions of a file apart.
        asked: the requests so far, path and Range.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    cuts: list[int | None] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    announced: int | None = None
    chunked: bool = False
    redirect: str | None = None
    etag: str = '"1"'
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    url: str = ""


@contextmanager
def serving() -> Iterator[Publisher]:
    """Run a publisher on a free port of the loopback interface."""
    publisher = Publisher()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            publisher.asked.append((self.path, wanted))
            status = publisher.statuses.pop(0) if publisher.statuses else 200
            content = publisher.files.get(self.path)
            if publisher.redirect:
                self.send_response(302)
                self.send_header("Location", publisher.redirect)
                self.end_headers()
                return
            if status != 200 or content is None:
                self.send_error(status if status != 200 else 404)
                return
            start = 0
            if wanted and publisher.ranges and self.headers.get("If-Range") == publisher.etag:
                start = int(wanted.removeprefix("bytes=").removesuffix("-"))
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            else:
                self.send_response(200)
            self.send_header("ETag", publisher.etag)
            body = content[start:]
            if publisher.chunked:
                self.send_header("Transfer-Encoding", "chunked")
                body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
            elif publisher.announced != -1:
                self.send_header("Content-Length", str(publisher.announced or len(body)))
            self.end_headers()
            with suppress(ConnectionError):  # a client that was killed
                self.wfile.write(body[: publisher.cuts.pop(0) if publisher.cuts else None])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    publisher.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield publisher
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def path_of(url: str) -> str:
    """Where the mirror of an address lies."""
    parts = urlsplit(url)
    return f"/{parts.netloc}{parts.path}" + (f"?{parts.query}" if parts.query else "")
