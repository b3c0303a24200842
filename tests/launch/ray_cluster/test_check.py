"""Whatever is typed as the address of a cluster: one sentence within seconds, or an address that Ray can use."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from resnet_dist.errors import UserError
from resnet_dist.launch.ray_cluster import check, gcs, probe
from resnet_dist.launch.ray_cluster.check import find_cluster, find_dashboard
from tests.launch.ray_cluster import servers

SAME = (version("ray"), platform.python_version())
SECRET = "s3cret" * 6


@pytest.fixture(autouse=True)
def a_plain_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the variables of a cluster, and let this machine run the node of the fake GCS."""
    for name in [*os.environ]:
        if name.startswith("RAY_A") or name.startswith("RAY_JOB") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setattr("ray._private.services.find_node_ids", lambda: {servers.NODE_ID.hex()})
    monkeypatch.setattr(check, "NODE_SECONDS", 0.1)
    monkeypatch.setattr(check, "NODE_POLL_SECONDS", 0.02)


def refusal(find: Callable[[], Any]) -> str:
    """Return the sentence with which `find` refuses an address, which must come within ten seconds."""
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        find()
    assert time.monotonic() - start < 10
    assert "\n" not in str(caught.value)
    return str(caught.value)


def dashboard_of(option: str | None) -> str:
    return find_dashboard(option, lambda text: None)


FINDERS = {"train": find_cluster, "submit": dashboard_of}


@pytest.fixture(params=["train", "submit"])
def find(request: pytest.FixtureRequest) -> Callable[[str], Any]:
    return FINDERS[request.param]


OTHERS: dict[str, tuple[Callable[[], AbstractContextManager[Any]], str]] = {
    "ssh": (
        lambda: servers.speaking(b"SSH-2.0-OpenSSH_9\r\n"),
        "an SSH server ('SSH-2.0-OpenSSH_9') answers",
    ),
    "redis": (
        lambda: servers.speaking(b"-ERR wrong\r\n"),
        "something that is no Ray cluster ('-ERR wrong') answers",
    ),
    "silent": (lambda: servers.speaking(b""), "it accepts a connection but sends nothing"),
    "swallowing": (servers.swallowing, "does not answer (no answer in 0.5 s): a firewall drops the packets"),
    "tls": (lambda: servers.speaking(b"\x15\x03\x01\x00\x02\x02\x46"), "a server that requires TLS answers"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_something_else_is_called_what_it_is(
    kind: str, find: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(probe, "CONNECT_SECONDS", 0.5)
    start, expected = OTHERS[kind]
    with start() as port:
        sentence = refusal(lambda: find(f"127.0.0.1:{port}"))
    assert sentence.startswith(f"--address 127.0.0.1:{port}: ")
    assert expected in sentence


@pytest.mark.parametrize(
    ("status", "headers", "body", "expected"),
    [
        (200, {}, "<html>", "a web server that is no Ray dashboard (status 200) answers"),
        (200, {}, "[1]", "a web server that is no Ray dashboard (status 200) answers"),
        (404, {}, "", "a web server that is no Ray dashboard (status 404) answers"),
        (403, {}, "log in", "a web server that is no Ray dashboard (status 403) answers"),
        (
            301,
            {"Location": "https://ray.example/"},
            "",
            "a web server that redirects to https://ray.example/ answers",
        ),
    ],
)
def test_a_web_server_that_is_no_dashboard(
    find: Callable[[str], Any], status: int, headers: dict[str, str], body: str, expected: str
) -> None:
    with servers.web(lambda request: (status, headers, body)) as server:
        assert expected in refusal(lambda: find(f"http://127.0.0.1:{server.port}"))


def test_nothing_listens(find: Callable[[str], Any]) -> None:
    port = servers.free_port()
    assert f"nothing listens on 127.0.0.1:{port} (Connection refused)" in refusal(
        lambda: find(f"127.0.0.1:{port}")
    )
    assert "is unknown here" in refusal(lambda: find("not-a-host.invalid:6379"))


def test_a_name_server_that_never_answers(
    find: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "NAME_SECONDS", 0.2)
    monkeypatch.setattr("socket.getaddrinfo", lambda *arguments, **more: time.sleep(1))
    assert "no name server has answered in 0.2 s" in refusal(lambda: find("host:6379"))


@pytest.mark.parametrize(
    "text", ["::1:6379", "a b", "host:port", "host:99999", "host:0", "http://", "//", "[::1", "ra y://host:1"]
)
def test_a_text_that_is_no_address(find: Callable[[str], Any], text: str) -> None:
    sentence = refusal(lambda: find(text))
    assert sentence.startswith(f"--address {text}: ")
    assert "use HOST:PORT, http://HOST:PORT, ray://HOST:PORT, auto or local" in sentence


def test_a_scheme_that_nothing_knows(find: Callable[[str], Any]) -> None:
    assert "scheme" in refusal(lambda: find("sssh://host"))


@pytest.mark.parametrize(
    "form", ["127.0.0.1:{}", " 127.0.0.1:{}/ ", "http://127.0.0.1:{}", "RAY://127.0.0.1:{}", "'localhost:{}'"]
)
def test_any_form_of_a_gcs_joins_its_cluster(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with servers.gcs(SAME) as (port, _):
        host = "localhost" if "localhost" in form else "127.0.0.1"
        assert find_cluster(form.format(port)) == f"{host}:{port}"
        monkeypatch.setenv("RAY_ADDRESS", form.format(port))
        assert find_cluster(None) == f"{host}:{port}"
        assert find_cluster("local") is None
        assert find_cluster(" auto ") == "auto"
        assert os.environ["RAY_ADDRESS"] == f"{host}:{port}"


@pytest.mark.parametrize(
    "form", ["127.0.0.1:{}", "http://127.0.0.1:{}/", "HTTP://127.0.0.1:{}", " 127.0.0.1:{} "]
)
def test_any_form_of_a_dashboard_takes_jobs(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with servers.dashboard() as server:
        url = f"http://127.0.0.1:{server.port}"
        assert dashboard_of(form.format(server.port)) == url
        monkeypatch.setenv("RAY_ADDRESS", "elsewhere:1")
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", form.format(server.port))
        assert dashboard_of(None) == url


def test_no_address_means_this_machine_for_train_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", " ")
    assert find_cluster(None) is None
    assert find_cluster("") is None
    assert "--address" in refusal(lambda: dashboard_of(None))
    assert "`resnet-dist train` starts Ray" in refusal(lambda: dashboard_of("LOCAL"))


def test_no_cluster_on_this_machine(find: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*arguments: Any) -> str:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr("ray._private.services.canonicalize_bootstrap_address", none)
    assert refusal(lambda: find("auto")).startswith(
        "--address auto: no Ray cluster runs on this machine; start one"
    )


def test_auto_names_the_dead_cluster_that_ray_remembers(
    find: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = f"127.0.0.1:{servers.free_port()}"
    monkeypatch.setattr("ray._private.services.canonicalize_bootstrap_address", lambda address: target)
    assert refusal(lambda: find("Auto")).startswith(f"--address Auto ({target}): ")


def test_the_dashboard_is_named_where_the_gcs_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    with servers.dashboard() as server:
        sentence = refusal(lambda: find_cluster(f"127.0.0.1:{server.port}"))
        assert (
            "the dashboard of a Ray 2.60.0 cluster answers there; this command needs the cluster's GCS"
            in sentence
        )
        assert f"resnet-dist submit … --address http://127.0.0.1:{server.port}" in sentence
        monkeypatch.setenv("RAY_ADDRESS", f"http://127.0.0.1:{server.port}")
        assert refusal(lambda: find_cluster(None)).startswith(f"RAY_ADDRESS=http://127.0.0.1:{server.port}: ")


def test_the_client_server_is_named_where_the_gcs_is_needed() -> None:
    with servers.client_server() as (port, _):
        # The ranks could not be placed: Ray Client does not know which nodes leave.
        for typed in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
            sentence = refusal(partial(find_cluster, typed))
            assert sentence.startswith(f"--address {typed}: Ray's client server answers there")
            assert sentence.endswith(f"from elsewhere: resnet-dist submit … --address ray://127.0.0.1:{port}")
        assert dashboard_of(f"ray://127.0.0.1:{port}") == f"ray://127.0.0.1:{port}"


def test_another_grpc_server(find: Callable[[str], Any]) -> None:
    with servers.grpc_server({}) as (port, _):
        assert "no GCS of Ray answers" in refusal(lambda: find(f"127.0.0.1:{port}"))


def test_a_gcs_leads_to_its_own_dashboard() -> None:
    notes: list[str] = []
    with servers.dashboard() as server, servers.gcs(SAME, dashboard=f"127.0.0.1:{server.port}") as (port, _):
        url = f"http://127.0.0.1:{server.port}"
        assert find_dashboard(f"127.0.0.1:{port}", notes.append) == url
        assert notes == [f"submitting to {url}, the dashboard of the cluster at 127.0.0.1:{port}"]
    with (
        servers.dashboard(session="another") as other,
        servers.gcs(SAME, dashboard=f"127.0.0.1:{other.port}") as (port, _),
    ):
        sentence = refusal(lambda: dashboard_of(f"127.0.0.1:{port}"))
        assert "the GCS of a Ray" in sentence
        assert f"--address http://127.0.0.1:{other.port}" in sentence
    with servers.gcs(SAME) as (port, _):
        assert "--include-dashboard true" in refusal(lambda: dashboard_of(f"127.0.0.1:{port}"))


@pytest.mark.parametrize(
    ("versions", "advice"),
    [
        (("2.9.0", SAME[1]), "use here: pip install 'ray[default,train]==2.9.0';"),
        ((SAME[0], "3.9.1"), "use here: Python 3.9.1;"),
        (("2.9.0", "3.9.1"), "use here: Python 3.9.1, then pip install 'ray[default,train]==2.9.0';"),
    ],
)
def test_other_versions_name_both_sides(versions: tuple[str, str], advice: str) -> None:
    with servers.gcs(versions, dashboard="10.0.0.1:8265") as (port, _):
        sentence = refusal(lambda: find_cluster(f"127.0.0.1:{port}"))
    assert f"that cluster runs Ray {versions[0]} on Python {versions[1]}" in sentence
    assert f"this shell Ray {SAME[0]} on Python {SAME[1]}" in sentence
    assert advice in sentence
    assert "resnet-dist submit … --address http://10.0.0.1:8265" in sentence


def test_a_dashboard_that_does_not_run_is_not_advised() -> None:
    with servers.gcs(("2.9.0", SAME[1]), dashboard=f"127.0.0.1:{servers.free_port()}") as (port, _):
        sentence = refusal(lambda: find_cluster(f"127.0.0.1:{port}"))
    assert "--include-dashboard true" in sentence
    with (
        servers.dashboard() as server,
        servers.gcs(("2.9.0", SAME[1]), dashboard=f"127.0.0.1:{server.port}") as (port, _),
    ):
        assert f"--address http://127.0.0.1:{server.port}" in refusal(
            lambda: find_cluster(f"127.0.0.1:{port}")
        )


def test_other_patch_versions_of_python_where_ray_accepts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    other = f"{SAME[1].rpartition('.')[0]}.99"
    with servers.gcs((SAME[0], other)) as (port, _):
        refusal(lambda: find_cluster(f"127.0.0.1:{port}"))
        monkeypatch.setenv("RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL", "minor")
        assert find_cluster(f"127.0.0.1:{port}") == f"127.0.0.1:{port}"


@pytest.mark.parametrize(
    ("dashboard", "advice"),
    [
        ("10.0.0.1:8265", "use resnet-dist submit … --address http://10.0.0.1:8265"),
        ("127.0.0.1:8265", "ssh -L 8265:127.0.0.1:8265"),
        ("", "--include-dashboard true"),
    ],
)
def test_a_driver_outside_the_cluster_is_sent_to_submit(
    dashboard: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray._private.services.find_node_ids", lambda: {"another"})
    # A name, because the advice for a head on this machine is another one.
    monkeypatch.setattr(gcs, "CALL_SECONDS", 2.0)
    real = probe._resolve
    monkeypatch.setattr(probe, "_resolve", lambda host, port: real("127.0.0.1", port))
    monkeypatch.setattr(
        check, "read_gcs", lambda target, headers: gcs.read_gcs(target.replace("head", "127.0.0.1"), headers)
    )
    with servers.gcs(SAME, dashboard=dashboard, nodes=["10.0.0.1"]) as (port, _):
        sentence = refusal(lambda: find_cluster(f"head:{port}"))
    assert "this machine is no node of that cluster (its nodes: 10.0.0.1)" in sentence
    assert advice in sentence


def test_a_node_that_registers_late_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def node_ids() -> set[str]:
        calls.append(1)
        return {servers.NODE_ID.hex()} if len(calls) > 2 else set()

    monkeypatch.setattr("ray._private.services.find_node_ids", node_ids)
    monkeypatch.setattr(check, "NODE_SECONDS", 5.0)
    with servers.gcs(SAME) as (port, _):
        assert find_cluster(f"127.0.0.1:{port}") == f"127.0.0.1:{port}"


@pytest.fixture
def token_shell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Yield a function that gives this shell a token; Ray keeps the first that it has read."""
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

    def give(token: str) -> None:
        file = tmp_path / "token"
        file.write_text(token)
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file) if token else str(tmp_path / "none"))
        AuthenticationTokenLoader.instance().reset_cache()

    monkeypatch.setenv("HOME", str(tmp_path))
    yield give
    AuthenticationTokenLoader.instance().reset_cache()


@pytest.fixture(params=["train", "submit", "submit to the GCS"])
def locked(request: pytest.FixtureRequest) -> Iterator[tuple[Callable[[], Any], str]]:
    """Yield a function that looks for a cluster with a token, and what it finds with the right one."""
    with (
        servers.dashboard(SECRET) as server,
        servers.gcs(SAME, token=SECRET, dashboard=f"127.0.0.1:{server.port}") as (port, _),
    ):
        target, url = f"127.0.0.1:{port}", f"http://127.0.0.1:{server.port}"
        if request.param == "train":
            yield (lambda: find_cluster(target)), target
        else:
            yield (lambda: dashboard_of(url if request.param == "submit" else target)), url


def test_a_token_that_is_missing_wrong_or_right(
    locked: tuple[Callable[[], Any], str], token_shell: Callable[[str], None]
) -> None:
    find, found = locked
    sentence = refusal(find)
    assert "that cluster requires a token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH" in sentence
    token_shell("")
    assert "this shell has no token" in refusal(find)
    token_shell("wrong" * 6)
    sentence = refusal(find)
    assert "refuses the token of this shell (of RAY_AUTH_TOKEN_PATH=" in sentence
    assert "wrongwrong" not in sentence
    token_shell(SECRET)
    assert find() == found


def test_a_client_server_with_a_token(token_shell: Callable[[str], None]) -> None:
    with servers.client_server(SECRET) as (port, _):
        assert "requires a token" in refusal(lambda: find_cluster(f"ray://127.0.0.1:{port}"))
        token_shell(SECRET)
        assert "Ray's client server answers there" in refusal(lambda: find_cluster(f"ray://127.0.0.1:{port}"))
        assert dashboard_of(f"ray://127.0.0.1:{port}") == f"ray://127.0.0.1:{port}"


def test_a_token_is_sent_only_to_what_asks_for_one(token_shell: Callable[[str], None]) -> None:
    token_shell(SECRET)
    with servers.gcs(SAME) as (port, tokens):
        assert find_cluster(f"127.0.0.1:{port}") == f"127.0.0.1:{port}"
        assert set(tokens) == {""}
    with servers.web(lambda headers: (401, {}, "log in")) as server:
        refusal(lambda: find_cluster(f"127.0.0.1:{server.port}"))
        refusal(lambda: dashboard_of(f"127.0.0.1:{server.port}"))
        assert SECRET not in str(server.seen)


def test_a_dashboard_behind_a_web_server() -> None:
    def answers(headers: dict[str, str]) -> tuple[int, dict[str, str], str]:
        ok = headers.get("authorization") == "Basic bmFtZTpwQHNz" and headers.get("x-team") == "a"
        return (200, {}, '{"ray_version": "2.60.0"}') if ok else (401, {}, "log in")

    with servers.web(answers) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_JOB_HEADERS", '{"X-Team": "a"}')
        url = f"http://name:p%40ss@127.0.0.1:{server.port}/ray"
        assert dashboard_of(f"{url}/") == url
        assert server.seen[0]["path"] == "/ray/api/version"
        patch.setenv("RAY_JOB_HEADERS", "X-Team: a")
        assert refusal(lambda: dashboard_of(url)).startswith("RAY_JOB_HEADERS: ")
        patch.setenv("RAY_JOB_HEADERS", "{}")
        assert "p%40ss" not in refusal(lambda: dashboard_of(url))


def test_a_proxy_in_front_of_a_dashboard(monkeypatch: pytest.MonkeyPatch) -> None:
    with servers.web(lambda headers: (502, {}, "bad gateway")) as proxy:
        monkeypatch.setenv("http_proxy", f"http://me:secret@127.0.0.1:{proxy.port}")
        with servers.dashboard() as server:
            assert dashboard_of(f"127.0.0.1:{server.port}") == f"http://127.0.0.1:{server.port}"
        assert os.environ["no_proxy"] == "127.0.0.1"
        assert proxy.seen == []
        monkeypatch.setenv("no_proxy", "elsewhere")
        sentence = refusal(lambda: dashboard_of(f"127.0.0.1:{servers.free_port()}"))
        assert f"http_proxy=http://***@127.0.0.1:{proxy.port}" in sentence
        assert "no_proxy=127.0.0.1" in sentence


def test_a_dashboard_that_only_a_proxy_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    with servers.dashboard() as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.port}")
        assert dashboard_of("http://ray.invalid:8265") == "http://ray.invalid:8265"
