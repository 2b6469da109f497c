"""A small hub: the endpoints that `datasets` asks of the real one, for a few small datasets."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_of_the_test"
ROWS = b"".join(json.dumps({"prompt": f"q{n}", "completion": f"a{n}"}).encode() + b"\n" for n in range(20))
TWO = b"---\nconfigs:\n- config_name: en\n  data_files: en.jsonl\n- config_name: es\n  data_files: es.jsonl\n---\n"
DATASETS = {
    "org/orders": {"train.jsonl": ROWS, "test.jsonl": b"".join(ROWS.splitlines(keepends=True)[:10])},
    "org/two": {"README.md": TWO, "en.jsonl": ROWS, "es.jsonl": ROWS.replace(b"q", b"p")},
    "org/faulty": {"train.jsonl": ROWS + b'{"prompt": "q", "completion": ""}\n' * 2},
    "org/broken": {"train.jsonl": b"{\n" * 50},
    "org/pictures": {"train.jsonl": b'{"url": "a"}\n'},
    "org/empty": {"LICENSE": b"free"},
    "org/private": {"train.jsonl": ROWS},
}
REFUSED = {"org/gated": (403, "GatedRepo"), "org/rejected": (401, ""), "org/busy": (503, "")}


class Hub(BaseHTTPRequestHandler):
    """Answers GET and HEAD under /api/datasets/ and /datasets/."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        parts = unquote(urlsplit(self.path).path).removeprefix("/api").split("/")[2:]
        name, (what, revision), file = "/".join(parts[:2]), [*parts[2:4], "", ""][:2], "/".join(parts[4:])
        has_token = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        files = DATASETS.get(name)
        if name in REFUSED:
            self.answer(REFUSED[name][0], error=REFUSED[name][1])
        elif files is None or (name == "org/private" and not has_token):
            self.answer(404, error="RepoNotFound")
        elif revision not in ("", "main", "v1", COMMIT):
            self.answer(404, error="RevisionNotFound")
        elif what == "resolve" and file in files:
            self.answer(200, files[file], etag=f'"{name}-{file}"'.replace("/", "-"))
        elif what == "tree" and not file:
            tree = [{"type": "file", "path": path, "size": len(files[path]), "oid": "0" * 40} for path in files]
            self.answer(200, json.dumps(tree).encode())
        elif what in ("resolve", "tree"):
            self.answer(404, error="EntryNotFound")
        else:
            told = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": path} for path in files]}
            self.answer(200, json.dumps(told).encode())

    def do_HEAD(self):
        self.do_GET()

    def answer(self, status, body=b"", error="", etag='"x"'):
        self.send_response(status)
        for header, value in {
            "Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, "ETag": etag, "X-Error-Code": error
        }.items():  # fmt: skip
            if value:
                self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


def serve():
    """A running server, on a free port of this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
