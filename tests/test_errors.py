"""Messages, log lines and files have no passwords and no signatures."""

from __future__ import annotations

import pytest

from nextlat_dist.errors import UserError, without_secrets
from nextlat_dist.reporting.log import logger


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pw@host/data?sig=abc&x=2", "https://***@host/data?***"),
        ("at https://token@host:8443/data, and more", "at https://***@host:8443/data, and more"),
        ("https://me:p@ss@host/data", "https://***@host/data"),
        ("https://me:p/ss@host/data", "https://***@host/data"),
        ("https://me:p w@host/data", "https://***@host/data"),
        ("{'path': 'https://host/d?sig=abc', 'weight': 2}", "{'path': 'https://host/d?***', 'weight': 2}"),
        ("override 'data.train=https://me:pw@host/d?k=v' is", "override 'data.train=https://***@host/d?***' is"),
        ("a https://a:b@c/d e https://f:g@h/i?j k", "a https://***@c/d e https://***@h/i?*** k"),
        ("s3://bucket/d?versionId=3", "s3://bucket/d?***"),
        ("https://me:${PW}@host/d?sig=${SIG}", "https://me:${PW}@host/d?sig=${SIG}"),
        ("https://${USER}:${PW}@host/d?sig=${SIG}&x=plain", "https://${USER}:${PW}@host/d?***"),
        ("https://me:${PW}x@host/d", "https://***@host/d"),
    ],
)
def test_hidden(text: str, shown: str) -> None:
    assert without_secrets(text) == shown
    assert without_secrets(shown) == shown
    assert str(UserError(text)) == shown


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:8000/data/manifest.json: HTTP status 500",
        "s3://bucket/a@b",
        "https://host/x@2/d",
        "what is it? see https://host/page. no?",
        "http://host:80 mail me@home",
        "a/b?c",
        "",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert without_secrets(text) == text


def test_log_lines_and_the_tracebacks_in_them(capsys: pytest.CaptureFixture[str]) -> None:
    log = logger("nextlat_dist.test")
    try:
        raise OSError("no answer from https://me:pw@host/data?sig=abc")
    except OSError:
        log.warning("reading %s", "https://me:pw@host/data", exc_info=True)
    written = capsys.readouterr().err
    assert "reading https://***@host/data" in written
    assert "no answer from https://***@host/data?***" in written
    assert "pw" not in written
    assert "abc" not in written
