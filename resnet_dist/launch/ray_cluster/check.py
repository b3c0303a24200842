"""Check the address of a Ray cluster: return what Ray can use, or raise one sentence, both within ten seconds."""

from __future__ import annotations

import importlib.util
import json
import os
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import replace

from resnet_dist.errors import UserError
from resnet_dist.launch.on_ray.settings import ADDRESS_VARIABLE
from resnet_dist.launch.ray_cluster import advice
from resnet_dist.launch.ray_cluster.address import (
    AUTO,
    DASHBOARD_PORT,
    DASHBOARD_VARIABLE,
    GCS_PORT,
    LOCAL,
    Address,
    gcs_address,
    parse_address,
    typed_address,
)
from resnet_dist.launch.ray_cluster.gcs import (
    Gcs,
    NoGcs,
    has_local_node,
    local_cluster,
    read_gcs,
    token_headers,
)
from resnet_dist.launch.ray_cluster.probe import VERSION_PATH, Answer, Kind, probe
from resnet_dist.launch.ray_cluster.tls import uses_tls
from resnet_dist.system.redact import redact

# A node that has just been started registers within this time.
NODE_SECONDS = 3.0
NODE_POLL_SECONDS = 0.3
PROXY_SECONDS = 2.5
HEADERS_VARIABLE = "RAY_JOB_HEADERS"
UNREACHABLE = (Kind.UNKNOWN_HOST, Kind.NOT_LISTENING, Kind.NO_ANSWER)


class ClusterAway(UserError):
    """No answer from the host of an address: a mistake where a command would begin something, an outage where it asks."""


def find_cluster(option: str | None) -> str | None:
    """Return the address with which Ray joins a cluster, from --address or RAY_ADDRESS; None: start Ray here.

    Raises UserError where no cluster answers there, or none that this process can use: of another version,
    with another token, or of other machines.
    """
    found = gcs_address(option)
    if found is None or found[0].word == LOCAL:
        return None
    address, source = found
    if address.word != AUTO:
        return _check_cluster(address, source, token_headers())
    if (of_variable := gcs_address(None)) is not None and of_variable[0].word == "":
        # Ray prefers the variable to the word auto.
        os.environ[ADDRESS_VARIABLE] = _check_cluster(*of_variable, token_headers(any_mode=True))
        return AUTO
    _check_cluster(_of_this_machine(address), source, token_headers(any_mode=True))
    return AUTO


def _of_this_machine(address: Address) -> Address:
    """Return the address of the cluster that runs on this machine."""
    try:
        target = local_cluster()
    except UserError as error:
        raise UserError(
            f"{address.label}: {error}; start one with `ray start --head`, or type HOST:{GCS_PORT} of another"
        ) from None
    return parse_address(target, f"{address.label} ({target})", GCS_PORT)


def _check_cluster(address: Address, source: str, headers: Mapping[str, str]) -> str:
    """Return the address for ray.init(), whatever its scheme. headers: with a token, for a cluster that requires one."""
    if address.scheme not in ("", "http", "https", "ray"):
        raise UserError(f"{address.label}: Ray has no addresses of this scheme; {advice.type_gcs(source)}")
    answer = probe(address)
    if uses_tls() and answer.kind is Kind.HTTP2:
        raise UserError(advice.without_tls(address))
    # A server of gRPC over TLS sends an alert, or closes the connection, where a client begins without it.
    may_be_gcs = answer.kind in (Kind.TLS, Kind.SILENT) if uses_tls() else answer.kind is Kind.HTTP2
    gcs = _ask(address, headers) if may_be_gcs else NoGcs.OTHER
    if gcs is NoGcs.CLIENT_SERVER:
        raise UserError(advice.client_server(address))
    if not isinstance(gcs, Gcs):
        raise UserError(advice.refuse_for_training(address, source, answer))
    gcs = _without_dead_dashboard(address, gcs)
    if problem := advice.other_versions(address, gcs):
        raise UserError(problem)
    _check_has_node(address, gcs, headers)
    return address.target


def _ask(address: Address, headers: Mapping[str, str]) -> Gcs | NoGcs:
    """Return what the GCS knows. Raises UserError where it refuses the token, or its lack."""
    # Try without a token first: a server that asks for none must not get it.
    found = read_gcs(address.target, {})
    if found is NoGcs.LOCKED and headers:
        found = read_gcs(address.target, headers)
    if found is NoGcs.LOCKED:
        raise UserError(advice.token_needed(address, sent=bool(headers)))
    return found


def _without_dead_dashboard(address: Address, gcs: Gcs) -> Gcs:
    """Remove a dashboard on this machine that does not run: the GCS names one after --include-dashboard false too."""
    host, _, port = gcs.dashboard.rpartition(":")
    if address.host not in advice.LOOPBACK or host not in advice.LOOPBACK:
        return gcs  # Elsewhere a firewall may be in between: this shows nothing.
    answer = probe(replace(address, scheme="http", host=host, port=int(port), path=""))
    return replace(gcs, dashboard="") if answer.kind is Kind.NOT_LISTENING else gcs


def _check_has_node(address: Address, gcs: Gcs, headers: Mapping[str, str]) -> None:
    """Raise UserError where this machine runs no node of the cluster: Ray would wait for one for a minute."""
    deadline = time.monotonic() + NODE_SECONDS
    while not has_local_node(gcs):
        if time.monotonic() >= deadline:
            raise UserError(advice.outside(address, gcs))
        time.sleep(NODE_POLL_SECONDS)
        again = _ask(address, headers)
        gcs = again if isinstance(again, Gcs) else gcs


def find_dashboard(option: str | None, report: Callable[[str], None]) -> str:
    """Return the address for Ray's job client, from --address, RAY_API_SERVER_ADDRESS or RAY_ADDRESS.

    Raises UserError where no dashboard answers there, ClusterAway where nothing does.
    """
    found = typed_address(option, (DASHBOARD_VARIABLE, ADDRESS_VARIABLE), DASHBOARD_PORT)
    if found is None:
        raise UserError(f"{advice.TYPE_DASHBOARD}: give --address, or set {DASHBOARD_VARIABLE}")
    address, _ = found
    if address.word == LOCAL:
        raise UserError(
            f"{address.label}: {advice.TYPE_DASHBOARD}; `resnet-dist train` starts Ray on this machine"
        )
    if address.word == AUTO:
        return _dashboard_of_gcs(_of_this_machine(address), report)
    if address.scheme not in ("", "http", "https", "ray"):
        return _of_module(address)
    answer = _probe_dashboard(address)
    if answer.kind is Kind.DASHBOARD:
        _bypass_proxy(address)
        return address.url
    if answer.kind is Kind.HTTP2:
        return _dashboard_of_gcs(address, report)
    tried = ""
    if answer.kind in UNREACHABLE and (proxy := _proxy(address)) is not None:
        tried = _try_proxy(address, *proxy)
        if not tried:
            return address.url
    kind = ClusterAway if answer.kind in (Kind.NOT_LISTENING, Kind.NO_ANSWER) else UserError
    raise kind(advice.refuse_for_jobs(address, answer, tried))


def _of_module(address: Address) -> str:
    """Return an address of another scheme, which Ray takes for the name of a module that knows the cluster."""
    try:
        spec = importlib.util.find_spec(address.scheme)
    except ValueError:
        spec = None
    if spec is None:
        raise UserError(f"{address.label}: no address has this scheme; {advice.TYPE_DASHBOARD}")
    return address.typed


def _probe_dashboard(address: Address) -> Answer:
    """Return what answers at the address of a dashboard, with the token where it asks for one.

    Raises UserError where it refuses the token, or its lack.
    """
    headers = job_headers()
    answer, token = probe(address, headers), token_headers()
    if answer.kind is Kind.LOCKED_DASHBOARD and token:
        answer = probe(address, {**headers, **token})
    if answer.kind is Kind.LOCKED_DASHBOARD:
        raise UserError(advice.token_needed(address, sent=bool(token)))
    return answer


def _dashboard_of_gcs(address: Address, report: Callable[[str], None]) -> str:
    """Return the dashboard of the cluster whose GCS, or client server, answers at `address`."""
    gcs = _ask(address, token_headers())
    if gcs is NoGcs.CLIENT_SERVER:
        return f"ray://{address.target}"
    if not isinstance(gcs, Gcs):
        raise UserError(advice.refuse_for_jobs(address, Answer(Kind.HTTP2), ""))
    host, _, port = gcs.dashboard.rpartition(":")
    for candidate in dict.fromkeys((host, address.host)) if port.isdecimal() else ():
        dashboard = replace(
            address, scheme="http", host=candidate.strip("[]"), port=int(port), path="", word=""
        )
        # Another cluster may have the same port on this machine's own 127.0.0.1.
        if (answer := _probe_dashboard(dashboard)).kind is Kind.DASHBOARD and answer.session == gcs.session:
            report(f"submitting to {dashboard.url}, the dashboard of the cluster at {address.target}")
            _bypass_proxy(dashboard)
            return dashboard.url
    raise UserError(
        f"{address.label}: the GCS of a Ray {gcs.ray_version} cluster answers there; use {advice.submit_instead(address, gcs)}"
    )


def job_headers() -> dict[str, str]:
    """Return the headers of RAY_JOB_HEADERS, which Ray's own commands send too. Raises UserError."""
    text = os.environ.get(HEADERS_VARIABLE) or "{}"
    try:
        return {str(name): str(value) for name, value in json.loads(text).items()}
    except (ValueError, AttributeError):
        raise UserError(
            f'{HEADERS_VARIABLE}: this must be an object of JSON with the names and values of headers, such as {{"X-Team": "a"}}'
        ) from None


def _proxy(address: Address) -> tuple[str, str] | None:
    """Return the variable and the URL of the proxy that requests to `address` would use; None without one."""
    scheme = "https" if address.scheme == "https" else "http"
    if urllib.request.proxy_bypass(address.target):
        return None
    for name in (f"{scheme}_proxy", "all_proxy"):
        if value := os.environ.get(name) or os.environ.get(name.upper()):
            return (name if os.environ.get(name) else name.upper()), value
    return None


def _bypass_proxy(address: Address) -> None:
    """Keep the requests of this process to `address` from a proxy: it has been reached without one."""
    if _proxy(address) is not None:
        before = os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")
        os.environ["no_proxy"] = ",".join(filter(None, (before, address.host)))


def _try_proxy(address: Address, variable: str, proxy: str) -> str:
    """Return why the dashboard is not reached through the proxy; empty where it is."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({"http": proxy, "https": proxy}))
    request = urllib.request.Request(
        f"{address.url}{VERSION_PATH}", headers={**job_headers(), **token_headers()}
    )
    try:
        with opener.open(request, timeout=PROXY_SECONDS) as response:
            json.load(response)["ray_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return (
            f", nor is it reached through {variable}={redact(proxy)} ({error}); a cluster that needs no proxy belongs into "
            f"no_proxy (no_proxy={address.host})"
        )
    return ""
