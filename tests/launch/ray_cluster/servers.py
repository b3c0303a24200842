"""Small servers on loopback that answer as a dashboard, as a GCS, as Ray Client, as something else, or not at all."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from ray.core.generated import gcs_pb2, gcs_service_pb2, ray_client_pb2

SESSION = "session_1"
NODE_ID = bytes(range(28))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextmanager
def speaking(greeting: bytes) -> Iterator[int]:
    """Yield the port of a server that sends `greeting` to everyone; with an empty one it stays silent."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        connections = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:  # The test has ended.
                    return
                connections.append(connection)
                connection.sendall(greeting)

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        for connection in connections:
            connection.close()


@contextmanager
def swallowing() -> Iterator[int]:
    """Yield a port whose queue of connections is full, so that the kernel drops every further packet."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        waiting = []
        for _ in range(4):
            connection = socket.socket()
            connection.setblocking(False)
            connection.connect_ex(server.getsockname())
            waiting.append(connection)
        yield server.getsockname()[1]
        for connection in waiting:
            connection.close()


@dataclass
class Web:
    """A web server: `answers` gets the headers of a request, and returns status, headers and body."""

    port: int = 0
    seen: list[dict[str, str]] = field(default_factory=list)


@contextmanager
def web(answers: Callable[[dict[str, str]], tuple[int, dict[str, str], str]]) -> Iterator[Web]:
    state = Web()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            state.seen.append({"path": self.path, **headers})
            status, extra, body = answers(headers)
            self.send_response(status)
            for name, value in extra.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        state.port = server.server_address[1]
        yield state
        server.shutdown()


def dashboard(token: str = "", session: str = SESSION) -> Any:
    """Return a context with the dashboard of a cluster; with a token, one that requires it."""
    version = json.dumps({"version": "4", "ray_version": "2.60.0", "session_name": session})

    def answers(headers: dict[str, str]) -> tuple[int, dict[str, str], str]:
        if token and "authorization" not in headers:
            return 401, {}, "Unauthorized: Missing authentication token"
        if token and headers["authorization"] != f"Bearer {token}":
            return 403, {}, "Forbidden: Invalid authentication token"
        return 200, {"Content-Type": "application/json"}, version

    return web(answers)


Method = Callable[[bytes], bytes]


@contextmanager
def grpc_server(
    methods: dict[str, Method], token: str = "", credentials: Any = None
) -> Iterator[tuple[int, list[str]]]:
    """Yield the port of a server with these methods, and a list of the tokens that it gets; credentials: for TLS."""
    tokens: list[str] = []

    class Handler(grpc.GenericRpcHandler):
        def service(self, details: Any) -> Any:
            sent = dict(details.invocation_metadata).get("authorization", "")
            tokens.append(sent)
            method = methods.get(details.method)
            if method is None:
                return None
            return grpc.unary_unary_rpc_method_handler(
                lambda request, context: answer(method, request, context, sent)
            )

    def answer(method: Method, request: bytes, context: Any, sent: str) -> bytes:
        if token and sent != f"Bearer {token}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "Invalid or missing authentication token")
        try:
            return method(request)
        except KeyError:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such client")
            raise

    server = grpc.server(ThreadPoolExecutor(2), handlers=[Handler()])
    port = (
        server.add_secure_port("127.0.0.1:0", credentials)
        if credentials
        else server.add_insecure_port("127.0.0.1:0")
    )
    server.start()
    try:
        yield port, tokens
    finally:
        server.stop(None).wait(5)


def gcs(
    versions: Sequence[str],
    *,
    dashboard: str = "",
    token: str = "",
    nodes: Sequence[str] = ("10.0.0.1",),
    credentials: Any = None,
) -> Any:
    """Return a context with the GCS of a cluster of these versions of Ray and Python."""
    values = {
        (b"cluster", b"CLUSTER_METADATA"): json.dumps(
            {"ray_version": versions[0], "python_version": versions[1]}
        ),
        (b"dashboard", b"dashboard"): dashboard,
        (b"session", b"session_name"): SESSION,
    }

    def get(data: bytes) -> bytes:
        request = gcs_service_pb2.InternalKVGetRequest.FromString(data)
        value = values.get((request.namespace, request.key), "")
        return bytes(gcs_service_pb2.InternalKVGetReply(value=value.encode()).SerializeToString())

    def all_nodes(data: bytes) -> bytes:
        infos = [
            gcs_pb2.GcsNodeInfo(node_id=NODE_ID, node_manager_address=node, state=gcs_pb2.GcsNodeInfo.ALIVE)
            for node in nodes
        ]
        infos.append(
            gcs_pb2.GcsNodeInfo(node_id=b"x", node_manager_address="10.9.9.9", state=gcs_pb2.GcsNodeInfo.DEAD)
        )
        return bytes(gcs_service_pb2.GetAllNodeInfoReply(node_info_list=infos).SerializeToString())

    methods = {
        "/ray.rpc.InternalKVGcsService/InternalKVGet": get,
        "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo": all_nodes,
    }
    return grpc_server(methods, token, credentials)


def client_server(token: str = "") -> Any:
    """Return a context with the client server of a cluster, which knows no client."""

    def unknown(data: bytes) -> bytes:
        ray_client_pb2.ClusterInfoRequest.FromString(data)
        raise KeyError

    return grpc_server({"/ray.rpc.RayletDriver/ClusterInfo": unknown}, token)
