"""Passwords, tokens and signatures are hidden in any text; what is no secret stays."""

from __future__ import annotations

import subprocess
import sys

import pytest

from resnet_dist.system.redact import redact, redact_all
from tests.paths import ROOT


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://u:hush@h/a.tar", "http://***@h/a.tar"),
        ("http://u:hu@sh@h:80/a.tar: 403", "http://***@h:80/a.tar: 403"),
        ("http://u:hu/sh@h/a.tar", "http://***@h/a.tar"),
        ("http://u:hu'sh@h/a.tar", "http://***@h/a.tar"),
        ("https://hush@h/a.tar", "https://***@h/a.tar"),
        (
            "http://h:5000/#/experiments/1/runs?workflowType=machine_learning&token=hush",
            "http://h:5000/#/experiments/1/runs?workflowType=machine_learning&token=***",
        ),
        (
            "see s3://k:hush@b/x?X-Amz-Signature=hush&versionId=3",
            "see s3://***@b/x?X-Amz-Signature=***&versionId=3",
        ),
        ("http://h/my set/a.tar?sig=hush: 404", "http://h/my set/a.tar?sig=*** 404"),
        ("http://h/a?hushhushhushhush", "http://h/a?***"),
        ("pipe:curl -u me:hush https://h/a", "pipe:curl -u *** https://h/a"),
        ("type `ulimit -u 4096`, which", "type `ulimit -u 4096`, which"),
        ("pipe:curl -H 'Authorization: Bearer hush' x", "pipe:curl -H 'Authorization: Bearer ***' x"),
        ("AWS_SECRET=hush aws s3 cp x -", "AWS_SECRET=*** aws s3 cp x -"),
        ("pipe:curl -H 'Authorization: ApiKey hush' x", "pipe:curl -H 'Authorization: ***' x"),
        ('pipe:curl -H "Cookie: a=hush; b=hush" x', 'pipe:curl -H "Cookie: ***" x'),
        ("pipe:curl -b 'a=hush' x", "pipe:curl -b *** x"),
        ("pipe:curl -sSu me:hush x", "pipe:curl -sSu *** x"),
        ("pipe:curl -ume:hush x", "pipe:curl -u*** x"),
        ("pipe:curl --oauth2-bearer hush x", "pipe:curl --oauth2-bearer *** x"),
        ("AWS_SECRET_ACCESS_KEY=hush aws s3 cp x -", "AWS_SECRET_ACCESS_KEY=*** aws s3 cp x -"),
        ("pipe:curl -sS https://h/a.tar | tar -x", "pipe:curl -sS https://h/a.tar | tar -x"),
        ("http://h:8080/user@host/a.tar", "http://h:8080/user@host/a.tar"),
        ("hf://datasets/me/set@main/a.tar", "hf://datasets/me/set@main/a.tar"),
        ("pipe:curl -u me:'hush hush' x", "pipe:curl -u *** x"),
        ("pipe:TOKEN='hush hush' get x", "pipe:TOKEN=*** get x"),
        ("'pipe:curl -u ***' x", "'pipe:curl -u ***' x"),
        ("a user and password or a token: none", "a user and password or a token: none"),
    ],
)
def test_redact(text: str, shown: str) -> None:
    assert redact(text) == shown


def test_texts_without_a_url_are_stored_as_they_are() -> None:
    value = {"a": ["token=x", "http://u:p@h"], "b": (1, None)}
    assert redact_all(value) == {"a": ["token=x", "http://***@h"], "b": (1, None)}


LONG_LINES = """
from resnet_dist.system.redact import redact

size = 100_000
pieces = (
    *("a", "-a", "a.", "QUJD+/=", "token-", "secret_", "authorization", "'", "'a-", "'x-api-key: ", "token: bearer "),
    *("key=", "-u '", "u", "?", "a&", "http://h/", "http://u:p/", "password ", "x-"),
)
for piece in pieces:
    for begin, end in (("", ""), ("http://h/?", ""), ("curl -", ""), ("", " http://h/x"), ("", "=x")):
        redact(begin + piece * (size // len(piece)) + end)
print("done")
"""


@pytest.mark.long
def test_a_long_line_takes_no_longer_than_many_short_ones() -> None:
    """A minified file, or base64, in one line: a search that begins again at every sign would take days."""
    command = [sys.executable, "-c", LONG_LINES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, cwd=ROOT, check=False)
    assert (done.stdout, done.stderr) == ("done\n", "")


@pytest.mark.parametrize("length", [10, 300, 5000])
def test_a_secret_is_hidden_however_long_the_words_before_it_are(length: int) -> None:
    word = "x" * length
    for text in (
        f"{word}_password=hush",
        f"{word}-token: hush",
        f"{word}http://u:hush@h/a",
        f"http://h/{word}?a=1&{'sig' + word}=hush",
        f"{word} Authorization: Bearer hush",
    ):
        assert "hush" not in redact(text), text
        assert word in redact(text)
