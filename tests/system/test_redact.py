"""Passwords, tokens and signatures are hidden in any text; what is no secret stays."""

from __future__ import annotations

import pytest

from resnet_dist.system.redact import redact, redact_all


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
        ("a user and password or a token: none", "a user and password or a token: none"),
    ],
)
def test_redact(text: str, shown: str) -> None:
    assert redact(text) == shown


def test_texts_without_a_url_are_stored_as_they_are() -> None:
    value = {"a": ["token=x", "http://u:p@h"], "b": (1, None)}
    assert redact_all(value) == {"a": ["token=x", "http://***@h"], "b": (1, None)}
