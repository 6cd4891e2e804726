"""The part of Google Cloud Storage's JSON API that gcsfs and tensorstore use, in memory, for tests.

With generations and conditions on them, without which tensorstore refuses a server. Run as a program it prints
its port and serves until it is killed.
"""

import itertools
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import parse_qsl, unquote, urlsplit

STAMP = "2026-01-01T00:00:00.000Z"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 20  # head and body in one packet: apart they wait 40 ms for each other
    objects: ClassVar[dict] = {}  # (bucket, name) -> (generation, bytes)
    uploads: ClassVar[dict] = {}  # of uploads in several parts: id -> (bucket, name, query, bytes so far)
    generations = itertools.count(1)
    lock = threading.RLock()

    def log_message(self, *_):
        pass

    def answer(self, status, content=b"", **headers):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers.setdefault("Content_Type", "application/json")
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def parts(self, body):
        """The parts of a multipart body, each without its headers."""
        mark = b"--" + re.search('boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
        for part in body.split(mark)[1:-1]:
            yield re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1].removesuffix(b"\n").removesuffix(b"\r")

    @staticmethod
    def about(bucket, name, generation, content):
        return {
            "kind": "storage#object", "bucket": bucket, "name": name, "generation": str(generation),
            "metageneration": "1", "size": str(len(content)), "updated": STAMP, "timeCreated": STAMP,
            "contentType": "application/octet-stream",
        }  # fmt: skip

    def unmet(self, bucket, name, query):
        """The status of a condition on the generation that does not hold, or None."""
        now = self.objects.get((bucket, name), (0, b""))[0]
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != now:
            return 412
        if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == now:
            return 304
        return None

    def store(self, bucket, name, query, content):
        with self.lock:
            if status := self.unmet(bucket, name, query):
                return self.answer(status)
            self.objects[bucket, name] = next(self.generations), content
            return self.answer(200, self.about(bucket, name, *self.objects[bucket, name]))

    def listed(self, bucket, query):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], set()
        with self.lock:
            for (of, name), kept in sorted(self.objects.items()):
                if of != bucket or not name.startswith(prefix) or name < query.get("startOffset", ""):
                    continue
                if "endOffset" in query and name >= query["endOffset"]:
                    continue
                rest = name[len(prefix) :]
                if delimiter and delimiter in rest:
                    prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
                else:
                    items.append(self.about(bucket, name, *kept))
        return self.answer(200, {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

    def route(self):
        url = urlsplit(self.path)
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        found = re.search(r"/b/([^/]+)(?:/o(?:/(.*))?)?$", url.path)
        bucket, name = (unquote(found[1]), unquote(found[2] or "")) if found else ("", "")
        return url.path, query, bucket, name

    def do_GET(self):
        path, query, bucket, name = self.route()
        if path.endswith("/o"):
            return self.listed(bucket, query)
        if not name:
            return self.answer(200, {"kind": "storage#bucket", "name": bucket})
        with self.lock:
            if (bucket, name) not in self.objects:
                return self.answer(404, {"error": {"code": 404, "message": "not found"}})
            if status := self.unmet(bucket, name, query):
                return self.answer(status)
            generation, content = self.objects[bucket, name]
        if query.get("alt") != "media":
            return self.answer(200, self.about(bucket, name, generation, content))
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        stamp = {"x_goog_generation": generation, "Content_Type": "application/octet-stream"}
        if not wanted:
            return self.answer(200, content, **stamp)
        first = int(wanted[1]) if wanted[1] else max(0, len(content) - int(wanted[2]))
        last = min(int(wanted[2]), len(content) - 1) if wanted[1] and wanted[2] else len(content) - 1
        if first >= len(content):
            return self.answer(416, Content_Range=f"bytes */{len(content)}")
        return self.answer(
            206, content[first : last + 1], Content_Range=f"bytes {first}-{last}/{len(content)}", **stamp
        )

    def do_POST(self):
        path, query, bucket, name = self.route()
        body = self.body()
        if path.startswith("/batch"):
            return self.batch(body)
        if "upload_id" in query:
            return self.more(query, body)
        kind = query.get("uploadType")
        if kind == "media":
            return self.store(bucket, query["name"], query, body)
        if kind == "multipart":
            about, content = self.parts(body)
            return self.store(bucket, json.loads(about)["name"], query, content)
        if kind == "resumable":
            name = query.get("name") or json.loads(body)["name"]
            with self.lock:
                number = str(next(self.generations))
                self.uploads[number] = bucket, name, query, b""
            host = self.headers["Host"]
            place = f"http://{host}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={number}"
            return self.answer(200, Location=place)
        if copied := re.match(r"(.*)/(?:rewriteTo|copyTo)/b/([^/]+)/o/(.*)$", name):
            source, to = (bucket, copied[1]), (unquote(copied[2]), copied[3])
            with self.lock:
                if source not in self.objects:
                    return self.answer(404, {"error": {"code": 404, "message": "not found"}})
                self.objects[to] = next(self.generations), self.objects[source][1]
                return self.answer(200, {"done": True, "resource": self.about(*to, *self.objects[to])})
        return self.answer(501)

    def do_PUT(self):
        self.more(self.route()[1], self.body())

    def more(self, query, body):
        """A further part of an upload; the last one says how long the whole is."""
        bucket, name, first, sofar = self.uploads[query["upload_id"]]
        sofar += body
        if self.headers.get("Content-Range", "/1").endswith("/*"):
            self.uploads[query["upload_id"]] = bucket, name, first, sofar
            return self.answer(308, Range=f"bytes=0-{len(sofar) - 1}")
        del self.uploads[query["upload_id"]]
        return self.store(bucket, name, first, sofar)

    def do_DELETE(self):
        _, query, bucket, name = self.route()
        with self.lock:
            status = self.unmet(bucket, name, query)
            if status is None:
                status = 204 if self.objects.pop((bucket, name), None) else 404
        return self.answer(status)

    def batch(self, body):
        """Several deletions in one request."""
        answers = []
        for number, part in enumerate(self.parts(body), 1):
            where = re.search(r"DELETE \S*/b/([^/]+)/o/(\S+)", part.decode())
            gone = where and self.objects.pop((unquote(where[1]), unquote(where[2])), None)
            line = "204 No Content" if gone else "404 Not Found"
            answers.append(
                f"--answer\r\nContent-Type: application/http\r\nContent-ID: <response-{number}>\r\n\r\n"
                f"HTTP/1.1 {line}\r\nContent-Length: 0\r\n\r\n\r\n"
            )
        text = "".join(answers) + "--answer--\r\n"
        return self.answer(200, text.encode(), Content_Type="multipart/mixed; boundary=answer")


class Server(ThreadingHTTPServer):
    def handle_error(self, *_):
        """A client that hangs up in the middle of an answer is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*_)


def start():
    """A server in a thread, and its address."""
    server = Server(("localhost", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://localhost:{server.server_port}"


def settings(address):
    """The environment in which gcsfs and tensorstore use a server."""
    return {
        "STORAGE_EMULATOR_HOST": address,  # gcsfs
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # would ask Google what kind of bucket this is
    }


def names(folder):
    """What is below gs://bucket/`folder`."""
    return sorted(name.removeprefix(f"{folder}/") for _, name in list(Handler.objects))


def content(folder, name):
    return Handler.objects["bucket", f"{folder}/{name}"][1]


if __name__ == "__main__":
    print(start()[1], flush=True)
    threading.Event().wait()
