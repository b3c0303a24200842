"""The sentences about an address: what was tried, what answered there, what to type instead."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import version

from resnet_dist.launch.ray_cluster.address import DASHBOARD_PORT, GCS_PORT, Address, bracketed
from resnet_dist.launch.ray_cluster.gcs import Gcs
from resnet_dist.launch.ray_cluster.probe import Answer, Kind
from resnet_dist.launch.ray_cluster.tls import AUTHORITY, CERTIFICATE, KEY, TLS_VARIABLE, uses_tls

PYTHON_LEVEL_VARIABLE = "RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL"
TYPE_DASHBOARD = f"submit and the commands about jobs need the dashboard of a cluster, such as http://HOST:{DASHBOARD_PORT}"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_NODES_NAMED = 3


def found_at(address: Address, answer: Answer) -> str:
    """Describe what answers at `address`."""
    target = address.target if address.has_port else f"{address.target}, the default port of this form,"
    sentences = {
        Kind.UNKNOWN_HOST: f"the host {address.host} is unknown here ({answer.detail})",
        Kind.NOT_LISTENING: f"nothing listens on {target} ({answer.detail})",
        Kind.NO_ANSWER: f"{target} does not answer ({answer.detail}): a firewall drops the packets, or there is no such "
        "machine",
        Kind.SILENT: f"what listens on {target} does not answer as a Ray cluster: {answer.detail}",
        Kind.DASHBOARD: f"the dashboard of a Ray {answer.ray_version} cluster answers there",
        Kind.LOCKED_DASHBOARD: "the dashboard of a Ray cluster answers there",
        Kind.HTTP: f"{answer.detail} answers there",
        Kind.TLS: f"a server that requires TLS answers on {target}",
        Kind.NO_TLS: f"a server without TLS answers on {target} ({answer.detail})",
        Kind.HTTP2: f"a server of HTTP/2 or gRPC that is no GCS of Ray answers on {target}",
        Kind.OTHER: f"{answer.detail} answers on {target}",
    }
    return sentences[answer.kind]


def type_gcs(source: str) -> str:
    """Return the advice for a command that trains: the address of a GCS, or none."""
    leave = f"unset {source}" if source != "--address" else "leave --address out"
    return (
        f"type HOST:{GCS_PORT} as `ray start --head` printed it (auto on a node of the "
        f"cluster), or {leave} to start Ray on this machine"
    )


def refuse_for_training(address: Address, source: str, answer: Answer) -> str:
    """Return the sentence for an address that training cannot use."""
    found = f"{address.label}: {found_at(address, answer)}"
    if answer.kind in (Kind.DASHBOARD, Kind.LOCKED_DASHBOARD):
        host = bracketed(address.host)
        return (
            f"{found}; this command needs the cluster's GCS, usually {host}:{GCS_PORT} (auto on a node of the cluster); "
            f"from elsewhere: resnet-dist submit … --address {address.url}"
        )
    files = f"{CERTIFICATE}, {KEY} and {AUTHORITY}"
    if uses_tls() and answer.kind in (Kind.TLS, Kind.SILENT):
        return (
            f"{found}; over TLS, with the files of {files}, no GCS answers: they must be those of the cluster, and its "
            "certificate must be for this host"
        )
    if answer.kind is Kind.TLS:
        return f"{found}; where it is the GCS, set {TLS_VARIABLE}=1 and {files} as on the cluster"
    return f"{found}; {type_gcs(source)}"


def refuse_for_jobs(address: Address, answer: Answer, tried_proxy: str) -> str:
    """Return the sentence for an address that `submit` cannot use."""
    found = f"{address.label}: {found_at(address, answer)}{tried_proxy}"
    if answer.kind is Kind.TLS:
        return f"{found}; use https://{address.target}{address.path}"
    if answer.kind is Kind.NO_TLS:
        return f"{found}; use http://{address.target}{address.path}"
    return f"{found}; {TYPE_DASHBOARD}, as `ray start --head` printed it"


def without_tls(address: Address) -> str:
    """Return the sentence for a cluster that speaks no TLS, where the variables of this shell ask for it."""
    return (
        f"{address.label}: a server of gRPC without TLS answers on {address.target}, but this shell has "
        f"{TLS_VARIABLE}={os.environ[TLS_VARIABLE]}; unset it, or start the cluster with it"
    )


def client_server(address: Address) -> str:
    """Return the sentence for Ray Client where the GCS is needed: it knows neither what nodes have, nor which leave."""
    return (
        f"{address.label}: Ray's client server answers there, through which no ranks or workers can be placed; this command needs "
        f"the cluster's GCS, usually {bracketed(address.host)}:{GCS_PORT} (auto on a node of the cluster); from elsewhere: "
        f"resnet-dist submit … --address ray://{address.target}"
    )


def token_needed(address: Address, *, sent: bool) -> str:
    """Return the sentence for a cluster that refuses the token of this shell, or its lack. sent: it has one."""
    if sent:
        return (
            f"{address.label}: that cluster refuses the token of this shell ({_token_source()}); set RAY_AUTH_TOKEN_PATH to "
            "a file with the cluster's token: `ray get-auth-token` prints it on the head"
        )
    return (
        f"{address.label}: that cluster requires a token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to a file with "
        "the cluster's token (default ~/.ray/auth_token): `ray get-auth-token` prints it on the head"
    )


def _token_source() -> str:
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "of RAY_AUTH_TOKEN"
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return f"of RAY_AUTH_TOKEN_PATH={path}" if path else "of ~/.ray/auth_token"


def other_versions(address: Address, gcs: Gcs) -> str:
    """Return the sentence for a cluster of other versions than this shell's; empty where Ray accepts them."""
    ray, python = version("ray"), platform.python_version()
    if not gcs.ray_version or not gcs.python_version:
        return ""
    parts = 2 if os.environ.get(PYTHON_LEVEL_VARIABLE) == "minor" else 3
    other_python = gcs.python_version.split(".")[:parts] != python.split(".")[:parts]
    if gcs.ray_version == ray and not other_python:
        return ""
    needed = [f"Python {gcs.python_version}"] if other_python else []
    if gcs.ray_version != ray:
        needed.append(f"pip install 'ray[default,train]=={gcs.ray_version}'")
    return (
        f"{address.label}: that cluster runs Ray {gcs.ray_version} on Python {gcs.python_version}, but this shell Ray {ray} "
        f"on Python {python} ({sys.executable}), and Ray connects equal versions alone; use here: {', then '.join(needed)}; "
        f"or {submit_instead(address, gcs)}, which needs no equal versions"
    )


def outside(address: Address, gcs: Gcs) -> str:
    """Return the sentence for a machine that is no node of the cluster."""
    addresses = list(gcs.nodes.values())
    nodes, more = ", ".join(addresses[:MAX_NODES_NAMED]), len(addresses) - MAX_NODES_NAMED
    return (
        f"{address.label}: this machine is no node of that cluster (its nodes: {nodes}{f' and {more} more' if more > 0 else ''}"
        f"), and ranks can be started from a node alone; use {submit_instead(address, gcs)}"
    )


def submit_instead(address: Address, gcs: Gcs) -> str:
    """Return the command line of `submit` for the cluster, as far as its GCS knows its dashboard."""
    if not gcs.dashboard:
        return "`resnet-dist submit`, for which the head must be started with --include-dashboard true"
    host, _, port = gcs.dashboard.rpartition(":")
    if host not in LOOPBACK:
        return f"resnet-dist submit … --address http://{gcs.dashboard}"
    if address.host in LOOPBACK:
        return f"resnet-dist submit … --address http://{address.host}:{port}"
    return (
        f"resnet-dist submit … --address http://127.0.0.1:{port} behind `ssh -L {port}:127.0.0.1:{port} {address.host}`, "
        "because its dashboard listens on the head alone"
    )
