"""`/metrics` on the loopback, in the text format of Prometheus."""

import asyncio
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from serve.errors import UserError
from serve.figures import prometheus

HOST = "127.0.0.1"
ANSWER_SECONDS = 5.0


def serve_metrics(port: int, status: Callable[[], dict[str, Any]]) -> ThreadingHTTPServer:
    """Answer in a thread; `status` is called in the running event loop. Raises `UserError` if the port is taken."""
    loop = asyncio.get_running_loop()

    async def ask() -> dict[str, Any]:
        return status()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/metrics":
                self.send_error(404)
                return
            future = asyncio.run_coroutine_threadsafe(ask(), loop)
            body = prometheus(future.result(ANSWER_SECONDS)).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    try:
        server = ThreadingHTTPServer((HOST, port), Handler)
    except OSError as fault:
        raise UserError(f"port {port} of {HOST}: {fault.strerror}; try another METRICS port") from None
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
