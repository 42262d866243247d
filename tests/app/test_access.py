"""Who can reach the page behind a proxy: names, origins, paths, cookies and the password."""

from __future__ import annotations

import asyncio
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from afa.app.access import OWN_FILES, Access, Guard, check_reach, read_access
from tests.refusal import refusal


def ask(access: Access, path: str = "/", **headers: str) -> Any:
    """Send a request through the guard; gives the status and the text, or what got through."""
    sent: list[Any] = []
    passed: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        passed.append(dict(scope["headers"]))
        cookie = b"token=1; HttpOnly; Path=/; SameSite=none; Secure"
        await send({"type": "http.response.start", "headers": [(b"Set-Cookie", cookie)]})

    async def send(message: Any) -> None:
        sent.append(message)

    named = [(key.replace("_", "-").encode(), value.encode()) for key, value in headers.items()]
    scope = {"type": "http", "path": path, "headers": named}
    asyncio.run(Guard(app, access)(scope, None, send))
    if passed:
        return passed[0], sent[0]["headers"][0][1].decode()
    return sent[0]["status"], sent[1]["body"].decode()


def test_an_address_is_read() -> None:
    assert read_access("127.0.0.1", "/afa/").path == "/afa"
    assert read_access("127.0.0.1", "/").path == read_access("127.0.0.1").path == ""
    whole = read_access("127.0.0.1", "https://Example.org:8443/a/b_c/", ["*.example.net"])
    assert (whole.path, whole.scheme, whole.authority) == ("/a/b_c", "https", "example.org:8443")
    assert whole.named == ("*.example.net", "example.org")
    for name, is_own in {
        **{"localhost": True, "::1": True, "example.org": True, "a.example.net": True},
        **{"example.net": False, "evilexample.net": False, "example.org.evil": False, "": False},
    }.items():
        assert whole.answers_to(name) is is_own, name
    # other machines need a password there, and any of its names may be theirs
    assert read_access("0.0.0.0").answers_to("my-machine.lan")
    assert not read_access("0.0.0.0", None, ["example.org"]).answers_to("my-machine.lan")
    assert read_access("192.168.1.4", None, ["example.org"]).answers_to("192.168.1.4")


@pytest.mark.parametrize(
    "path",
    ["afa", "//evil.org", "/a//b", "/a b", "/../etc", "/a?b", "C:/Program Files/Git/afa",
     "https://example.org/afa?x=1", "https://user@example.org/afa", "https:///afa", "/a;b"],
)  # fmt: skip
def test_a_path_that_is_none_is_refused(path: str) -> None:
    with refusal("AFA-APP-008", "/afa"):
        read_access("127.0.0.1", path)


@pytest.mark.parametrize(
    "name", ["*", "https://example.org", "example.org:443", "cafe:80", "a.*", "example.org/afa", ""]
)
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with refusal("AFA-APP-009", "example.org"):
        read_access("127.0.0.1", None, [name])


def test_others_need_a_password_behind_a_proxy_as_well() -> None:
    for named in (["example.org"], ["localhost", "example.org"]):
        with refusal("AFA-APP-010", "example.org", "--no-password"):
            check_reach("127.0.0.1", None, named)
        check_reach("127.0.0.1", None, named, open_to_all=True)
        check_reach("127.0.0.1", "a long password", named)
    check_reach("127.0.0.1", None, ["localhost"])
    with refusal("AFA-APP-004"):  # there it is not only the proxy that reaches the page
        check_reach("0.0.0.0", None, ["example.org"], open_to_all=True)


def test_only_requests_for_the_page_get_through() -> None:
    access = read_access("127.0.0.1", "/afa", ["example.org", "*.example.net"])
    for headers in (
        {"host": "127.0.0.1:7860"},
        {"host": "[::1]:7860"},
        {"host": "EXAMPLE.org"},
        {"host": "127.0.0.1:7860", "x_forwarded_host": "example.org:8443, evil.org"},
        {"host": "example.org", "origin": "https://example.org:8443"},
        # a proxy that passes no host: its name was given by the user
        {"host": "127.0.0.1:7860", "origin": "https://a.example.net"},
    ):
        passed, _ = ask(access, **headers)
        assert passed[b"host"].decode() == headers["host"]
    for headers, status in (
        ({"host": "evil.org"}, 400),
        ({"host": "evil.org@localhost"}, 400),
        ({}, 400),
        ({"host": "localhost", "x_forwarded_host": "evil.org, localhost"}, 400),
        ({"host": "localhost", "origin": "http://evil.org"}, 403),
        ({"host": "localhost", "origin": "null"}, 403),
        ({"host": "example.org", "origin": "https://example.org.evil.org"}, 403),
        ({"host": "example.org", "origin": "http://localhost:3000"}, 403),
    ):
        assert ask(access, **headers)[0] == status, headers
    assert "--allowed-host evil.org" in ask(access, host="evil.org")[1]
    assert ask(access, "/afa/gradio_api/upload/", host="localhost")[0] == 403


def test_origins_are_checked_where_any_host_may_ask() -> None:
    access = read_access("0.0.0.0")
    ask(access, host="machine.lan:7860", origin="http://machine.lan:7860")[0][b"host"]
    assert ask(access, host="machine.lan:7860", origin="http://evil.org")[0] == 403


def test_a_complete_address_goes_before_the_headers_of_the_proxy() -> None:
    access = read_access("127.0.0.1", "https://example.org:8443/afa")
    host = {"host": "localhost", "x_forwarded_host": "localhost:1", "x_forwarded_proto": "http"}
    passed, _ = ask(access, **host, x_gradio_server="http://evil.org")
    assert passed[b"x-forwarded-host"] == b"example.org:8443"
    assert passed[b"x-forwarded-proto"] == b"https"
    assert b"x-gradio-server" not in passed


def test_cookies_are_the_pages_alone() -> None:
    below, root = read_access("127.0.0.1", "/afa"), read_access("127.0.0.1")
    rest = "; SameSite=lax; Secure"
    assert ask(below, host="localhost")[1] == f"token=1; HttpOnly; Path=/afa{rest}"
    assert ask(root, host="localhost")[1] == f"token=1; HttpOnly; Path=/{rest}"


def test_a_path_of_the_pages_own_files_is_refused() -> None:
    for path in ("/assets", "/gradio_api", "/gradio_api/call", "https://example.org/login"):
        with refusal("AFA-APP-011", path.removeprefix("https://example.org")):
            read_access("127.0.0.1", path)
    for path in ("/afa", "/assets2", "/afa/assets"):
        assert read_access("127.0.0.1", path).path == path


def test_the_pages_own_files_are_known() -> None:
    """Those of the installed gradio, which may add some."""
    pytest.importorskip("gradio")
    from gradio.routes import App

    source = Path(inspect.getfile(App)).read_text(encoding="utf-8")
    found = set(re.findall(r"@app\.(?:get|post|head|api_route)\(\s*f?\"/([\w.]+)", source))
    assert {"assets", "login", "theme.css", "gradio_api"} <= found
    assert found <= OWN_FILES
