"""A small server of nnsight's remote protocol, in a process of its own where moe_interp cannot be imported.

``python tests/remote_server.py`` prints its address and serves until it is killed. It loads whatever local folder a
model key names, runs requests one after the other on nnsight's own request and response models, and tells how many
bytes went over the wire (``GET /bytes``, since the last time it was asked).

Blocking requests: a websocket ``/subscribe`` gives a session id, ``POST /request`` takes the trace, statuses and the
result come back on the websocket. Others: ``GET /response/<id>``.
"""

import base64
import hashlib
import io
import json
import linecache
import struct
import sys
import traceback
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock

ABSENT = ("moe_interp", "jaxtyping", "beartype", "xarray")
for _name in ABSENT:
    sys.modules[_name] = None  # type: ignore[assignment]

import torch  # noqa: E402
import zstandard  # noqa: E402
from nnsight import TransformersModel  # noqa: E402
from nnsight.schema.request import RequestModel  # noqa: E402
from nnsight.schema.response import ResponseModel, Status  # noqa: E402
from nnsight.tracing.globals import BLOCKS, SOURCES  # noqa: E402
from nnsight.tracing.tracer import _saves, dec, inc  # noqa: E402

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
MODELS: dict[str, TransformersModel] = {}
SOCKETS: dict[str, "Handler"] = {}
RESPONSES: dict[str, ResponseModel] = {}
BYTES = {"in": 0, "out": 0}
RUNNING = Lock()


def model(key: str) -> TransformersModel:
    """The model that a key names, with weights."""
    if key not in MODELS:
        MODELS[key] = TransformersModel.from_model_key(key, dispatch=True)
    return MODELS[key]


def run(request: RequestModel, blob: bytes) -> bytes:
    """What a trace saved, as nnsight's client reads it."""
    here = model(request.model_key)
    with as_before():
        return traced(here, request, blob)


@contextmanager
def as_before() -> Iterator[None]:
    """Forget the sources that a request brought: another may have other code under the same file name."""
    kept = [(held, dict(held)) for held in (linecache.cache, SOURCES, BLOCKS)]
    try:
        yield
    finally:
        for held, before in kept:
            held.clear()
            held.update(before)


def traced(here: TransformersModel, request: RequestModel, blob: bytes) -> bytes:
    """Run a trace on a model."""
    tracer = RequestModel.deserialize(blob, here._remoteable_persistent_objects(), request.compress)
    inc()
    try:
        with torch.no_grad():
            tracer.execute(tracer.info.code)
        saves = _saves()
        saved = {name: value for name, value in tracer.info.frame.f_locals.items() if id(value) in saves}
    finally:
        dec()
    file = io.BytesIO()
    torch.save(saved, file)
    content = file.getvalue()
    return zstandard.ZstdCompressor(level=6).compress(content) if request.compress else content


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        """Subscriptions, results of requests that nobody waits for, and bytes."""
        if self.path == "/subscribe":
            return self.subscribe()
        if self.path == "/bytes":
            counted = dict(BYTES)
            BYTES.update({"in": 0, "out": 0})
            return self.answer(json.dumps(counted).encode())
        response = RESPONSES.get(self.path.removeprefix("/response/"))
        if response is None:
            return self.answer(b"", 404)
        if self.path.endswith(".result"):
            return self.answer(response.data)
        if isinstance(response.data, bytes):  # by an address of its own
            port = self.server.server_address[1]
            response = response.model_copy(update={"data": f"http://127.0.0.1:{port}/response/{response.id}.result"})
        return self.answer(response.model_dump_json().encode())

    def do_POST(self) -> None:
        """A trace to run."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        kind = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        parts = {
            part.get_param("name", header="content-disposition"): part.get_payload(decode=True)
            for part in BytesParser().parsebytes(kind + body).walk()
            if not part.is_multipart()
        }
        BYTES["in"] += len(body)
        request = RequestModel.model_validate_json(parts["data"])
        number = uuid.uuid4().hex
        self.answer(ResponseModel(id=number, status=Status.RECEIVED).model_dump_json().encode())
        socket = SOCKETS.get(request.session_id)
        try:
            with RUNNING:
                result = run(request, parts["blob"])
            response = ResponseModel(id=number, status=Status.COMPLETED, data=result)
        except BaseException:
            response = ResponseModel(id=number, status=Status.ERROR, description=traceback.format_exc())
        RESPONSES[number] = response
        if isinstance(response.data, bytes):
            BYTES["out"] += len(response.data)
            RESPONSES[f"{number}.result"] = response
        if socket is not None:
            text = response.status is Status.ERROR
            socket.frame(response.model_dump_json().encode() if text else response.pickle(), text)

    def answer(self, content: bytes, status: int = 200) -> None:
        """An HTTP response."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def subscribe(self) -> None:
        """Open a websocket (RFC 6455) that only this side writes to."""
        key = self.headers["Sec-WebSocket-Key"].encode()
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key + _GUID).digest()).decode())
        self.end_headers()
        session = uuid.uuid4().hex
        SOCKETS[session] = self
        self.done = Event()
        self.frame(json.dumps({"session_id": session}).encode(), text=True)
        self.done.wait()
        del SOCKETS[session]
        self.close_connection = True

    def frame(self, content: bytes, text: bool) -> None:
        """One message."""
        size = len(content)
        length = (
            bytes([size])
            if size < 126
            else b"\x7e" + struct.pack(">H", size)
            if size < 2**16
            else b"\x7f" + struct.pack(">Q", size)
        )
        self.wfile.write(bytes([0x81 if text else 0x82]) + length + content)
        self.wfile.flush()
        if not content.startswith(b'{"session_id"'):
            self.done.set()


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()
