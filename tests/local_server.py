"""What the tests' servers on loopback have in common; each adds the protocol that it speaks."""

import http.server
import threading
from typing import Any, Self


class LocalServer(http.server.ThreadingHTTPServer):
    """A server on a free port of the loopback interface, which serves while its ``with`` block runs."""

    daemon_threads = True

    def __init__(self, handler: type[http.server.BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class QuietHandler(http.server.BaseHTTPRequestHandler):
    """Keeps connections, and says nothing on the terminal."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass
