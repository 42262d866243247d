"""Who can reach the page, and what it takes from them."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from afa.app import views
from afa.app.server import check_reach
from afa.cli import main
from tests.refusal import refusal
from tests.warm import run

pytestmark = [
    pytest.mark.processes,
    # found but not imported, which takes seconds, by processes that collect and do not run it
    pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed"),
]


def ask(address: str, data: bytes | None = None, **headers: str) -> tuple[int, str]:
    request = urllib.request.Request(address, data=data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_others_need_a_password() -> None:
    check_reach("127.0.0.1", None)
    check_reach("localhost", None)
    check_reach("0.0.0.0", "a long password")
    for host in ("0.0.0.0", "192.168.1.4", "::", "example.org"):
        with refusal("AFA-APP-004", host):
            check_reach(host, None)
    for host in ("127.0.0.1", "0.0.0.0"):
        with refusal("AFA-APP-005", "8"):
            check_reach(host, "short")


def test_the_page_is_there_and_nothing_of_it_is_elsewhere(address: str) -> None:
    code, text = ask(address)
    assert code == 200
    assert "fonts.googleapis" not in text
    config = json.loads(ask(f"{address}/config")[1])
    assert config["analytics_enabled"] is False


def test_uploads_of_any_kind_are_off(address: str) -> None:
    body = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\na\r\n--x--'
    )
    for path in ("/gradio_api/upload", "/upload", "/gradio_api/upload/"):
        content = {"Content-Type": "multipart/form-data; boundary=x"}
        assert ask(f"{address}{path}", body, **content)[0] in (403, 404)
    assert ask(f"{address}/gradio_api/upload", body)[1] == "Uploads are disabled."


def test_names_that_point_here_from_elsewhere_are_refused(address: str) -> None:
    assert ask(address, Host="evil.example:7860")[0] == 400


def test_files_of_the_machine_are_not_served(address: str) -> None:
    for path in ("/etc/passwd", "../../etc/passwd"):
        assert ask(f"{address}/gradio_api/file={path}")[0] in (403, 404)


def test_a_password_is_asked_for(serve: Callable[..., str], tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("a long password\nand more\n")
    address = serve("--password-file", str(secret))
    assert ask(f"{address}/config")[0] == 401
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    wrong, right = b"username=afa&password=other", b"username=afa&password=a+long+password"
    assert ask(f"{address}/login", wrong, **form)[0] == 400
    assert ask(f"{address}/login", right, **form)[0] == 200


def test_a_port_that_is_taken_is_one_line(address: str) -> None:
    code, _, said = run(["app", "--port", address.rsplit(":", 1)[1]])
    assert code == 2
    assert "AFA-APP-007" in said.splitlines()[-1]


def test_what_cannot_be_served_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short, gone, good = tmp_path / "short", tmp_path / "gone", tmp_path / "good"
    short.write_text("abc")
    good.write_text("a long password")
    for options, code in {
        ("--host", "0.0.0.0"): "AFA-APP-004",
        ("--password-file", str(short)): "AFA-APP-005",
        ("--password-file", str(gone)): "AFA-CLI-001",
        ("--output", str(short)): "AFA-CLI-003",
        ("--dtype", "int4"): "AFA-CLI-002",
        (str(gone),): "AFA-LOAD-061",
        ("--root-path", "afa"): "AFA-APP-008",
        ("--allowed-host", "*"): "AFA-APP-009",
        ("--allowed-host", "example.org"): "AFA-APP-010",
        ("--root-path", "https://example.org/afa"): "AFA-APP-010",
        ("--no-password", "--password-file", str(good)): "AFA-CLI-055",
    }.items():
        with pytest.raises(SystemExit) as stop:
            main(["app", *options])
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert code in said
        assert said.count("\n") == 1


def test_the_path_of_gradio_s_environment_is_that_of_the_page(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GRADIO_ROOT_PATH", "afa")
    with pytest.raises(SystemExit):
        main(["app"])
    assert "AFA-APP-008" in capsys.readouterr().err


def test_what_users_write_is_never_a_part_of_the_page() -> None:
    evil = "<img src=x onerror=alert(1)>"
    for text in (views.note(evil), views.complaint(evil), views.caption(evil)):
        assert "<img" not in text
    assert "<img" not in views.progress(evil, 0, 1, 0, 1)
