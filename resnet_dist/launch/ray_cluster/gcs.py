"""Ask a server that speaks gRPC for its cluster: the GCS knows its versions, its nodes and its dashboard.

The calls are Ray's own, but each has a limit of time and prints nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from resnet_dist.errors import UserError
from resnet_dist.launch.on_ray.settings import set_defaults
from resnet_dist.launch.ray_cluster.tls import channel_credentials, uses_tls

CALL_SECONDS = 2.0


class NoGcs(Enum):
    """Kinds of servers that speak gRPC and give no answer of a GCS."""

    LOCKED = auto()  # it asks for a token, or for another one
    CLIENT_SERVER = auto()
    OTHER = auto()


@dataclass(frozen=True)
class Gcs:
    """A cluster, as its GCS describes it."""

    ray_version: str
    python_version: str
    dashboard: str  # HOST:PORT as the head sees it; empty without one
    session: str
    nodes: dict[str, str]  # address by id, of the nodes that are alive


def read_gcs(target: str, headers: Mapping[str, str]) -> Gcs | NoGcs:
    """Return what the GCS at `target` knows, or what speaks gRPC there instead; over TLS where RAY_USE_TLS is set.

    headers: the token that is sent, if any. Raises UserError where a file for TLS is missing.
    """
    set_defaults()
    import grpc

    # Ray's GCS client does not use a proxy either.
    options = (("grpc.enable_http_proxy", 0), ("grpc.enable_retries", 0))
    metadata = tuple((name.lower(), value) for name, value in headers.items())
    if uses_tls():
        opened = grpc.secure_channel(target, channel_credentials(), options=options)
    else:
        opened = grpc.insecure_channel(target, options=options)
    with opened as channel:
        try:
            return _read(channel, metadata)
        except grpc.RpcError as error:
            locked = error.code() == grpc.StatusCode.UNAUTHENTICATED
            return NoGcs.LOCKED if locked else _read_client_server(channel, metadata)


def _read(channel: Any, metadata: Sequence[tuple[str, str]]) -> Gcs:
    """Return what the GCS knows. Raises grpc.RpcError."""
    from ray.core.generated import gcs_service_pb2 as messages

    def call(method: str, request: Any, reply: Any) -> Any:
        return _method(channel, method, reply)(request, timeout=CALL_SECONDS, metadata=metadata)

    def value(namespace: bytes, key: bytes) -> str:
        request = messages.InternalKVGetRequest(namespace=namespace, key=key)
        reply = call("InternalKVGcsService/InternalKVGet", request, messages.InternalKVGetReply)
        return bytes(reply.value).decode(errors="replace")

    versions: Any = {}
    with suppress(ValueError):  # empty while the head starts
        versions = json.loads(value(b"cluster", b"CLUSTER_METADATA"))
    nodes = call(
        "NodeInfoGcsService/GetAllNodeInfo", messages.GetAllNodeInfoRequest(), messages.GetAllNodeInfoReply
    )
    return Gcs(
        versions.get("ray_version", ""),
        versions.get("python_version", ""),
        value(b"dashboard", b"dashboard"),
        value(b"session", b"session_name"),
        {
            node.node_id.hex(): node.node_manager_address
            for node in nodes.node_info_list
            if node.state == node.ALIVE
        },
    )


def _read_client_server(channel: Any, metadata: Sequence[tuple[str, str]]) -> NoGcs:
    """Return what answers to a method of Ray Client."""
    import grpc
    from ray.core.generated import ray_client_pb2 as messages

    request = messages.ClusterInfoRequest(type=messages.ClusterInfoType.PING)
    method = _method(channel, "RayletDriver/ClusterInfo", messages.ClusterInfoResponse)
    try:
        method(request, timeout=CALL_SECONDS, metadata=metadata)
    except grpc.RpcError as error:
        # NOT_FOUND: it knows the method, but no client of this name.
        codes = {
            grpc.StatusCode.NOT_FOUND: NoGcs.CLIENT_SERVER,
            grpc.StatusCode.UNAUTHENTICATED: NoGcs.LOCKED,
        }
        return codes.get(error.code(), NoGcs.OTHER)
    return NoGcs.CLIENT_SERVER


def _method(channel: Any, name: str, reply: Any) -> Callable[..., Any]:
    def serialize(request: Any) -> bytes:
        return bytes(request.SerializeToString())

    method: Callable[..., Any] = channel.unary_unary(
        f"/ray.rpc.{name}", request_serializer=serialize, response_deserializer=reply.FromString
    )
    return method


def token_headers(*, any_mode: bool = False) -> dict[str, str]:
    """Return the header with the token that Ray would send; empty where RAY_AUTH_MODE does not ask for one.

    any_mode: Ray sends it also where the variable is not set, as for the address auto. Raises UserError where
    the variable asks for a token and there is none.
    """
    mode = os.environ.get("RAY_AUTH_MODE")
    if (mode or "").lower() != "token" and (mode is not None or not any_mode):
        return {}
    set_defaults()
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]
    from ray.exceptions import AuthenticationError

    headers, reason = {}, "no variable or file has one"
    try:
        loader = AuthenticationTokenLoader.instance()
        # This reads the token even where Ray was imported before the variable was set.
        if loader.has_token(ignore_auth_mode=True):
            headers = dict(loader.get_token_for_http_header())
    except AuthenticationError as error:
        reason = str(error).split(". ")[0].rstrip(".")
    if mode is not None and not headers:
        raise UserError(
            f"RAY_AUTH_MODE={mode}, but this shell has no token ({reason}); set RAY_AUTH_TOKEN_PATH to a file with "
            "the token of the cluster, or RAY_AUTH_MODE=disabled where it has none"
        )
    return headers


def local_cluster() -> str:
    """Return HOST:PORT of the cluster that runs on this machine, as Ray finds it for the address `auto`.

    Raises UserError where there is none.
    """
    set_defaults()
    from ray._private.services import canonicalize_bootstrap_address

    try:
        return str(canonicalize_bootstrap_address("auto"))
    except ConnectionError:
        raise UserError("no Ray cluster runs on this machine") from None


def has_local_node(gcs: Gcs) -> bool:
    """Report whether this machine runs a node of the cluster. Ray finds it by its process, and so does this."""
    from ray._private import services

    # Earlier releases find the node by its address.
    find_node_ids = getattr(services, "find_node_ids", None)
    return find_node_ids is None or bool(set(find_node_ids()) & set(gcs.nodes))
