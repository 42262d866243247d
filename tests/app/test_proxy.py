"""The page through a real nginx below a path: in Chromium, from Python, and with curl."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from afa.drawing.recorded import hash_pixels, read_picture
from benchmarks.app import BROWSER, OFFLINE
from tests.app.test_page import PATIENCE, draw, number, only, status, turn_to
from tests.documentation import DOCS, blocks_of

sync_api = pytest.importorskip("playwright.sync_api")
NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed"),
    pytest.mark.skipif(NGINX is None, reason="there is no nginx; apt install nginx-light"),
]
PASSWORD = "a long password"
_CERTIFICATE = "ssl_certificate cert.pem; ssl_certificate_key key.pem;"
_AROUND = """daemon off; pid nginx.pid; error_log stderr; {user}
events {{}}
http {{ access_log access.log; client_body_temp_path body; proxy_temp_path proxied;
fastcgi_temp_path f; uwsgi_temp_path u; scgi_temp_path s;
{server} }}
"""


def documented(title: str) -> str:
    """A block of the page about the app."""
    (found,) = [block.text for block in blocks_of(DOCS / "app.md") if block.title == title]
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def make_certificate(folder: Path) -> None:
    """Write `cert.pem` and `key.pem`, signed by nobody else."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl")
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-subj",
        "/CN=example.org",
    ]
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run([*command, *files], check=True, capture_output=True)


@pytest.fixture(scope="module")
def proxied(
    serve: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., str]]:
    """Serve the page with options behind nginx; gives its address at `example.org`."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*options: str, changes: dict[str, str] | None = None) -> str:
        folder = tmp_path_factory.mktemp("nginx")
        (folder / "password").write_text(PASSWORD)
        port = free_port()
        given = [option.format(port=port) for option in options]
        direct = serve(*given, "--password-file", str(folder / "password"))
        server = documented("afa.conf")
        for old, new in (changes or {}).items():
            assert old in server
            server = server.replace(old, new)
        server = server.replace("127.0.0.1:7860", direct.split("/")[2])
        server = server.replace("listen 80", f"listen 127.0.0.1:{port}")
        if is_secure := "ssl" in server:
            make_certificate(folder)
        user = "user root;" if os.geteuid() == 0 else ""
        (folder / "nginx.conf").write_text(_AROUND.format(user=user, server=server))
        with (folder / "said").open("wb") as said:
            command = [str(NGINX), "-p", str(folder), "-c", "nginx.conf"]
            started.append(subprocess.Popen(command, stderr=said))
        end = time.monotonic() + 60
        while time.monotonic() < end:
            assert started[-1].poll() is None, (folder / "said").read_text()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        return f"http{'s' if is_secure else ''}://example.org:{port}/afa"

    yield start
    for process in started:
        process.terminate()
    for process in started:
        process.wait(60)


@pytest.fixture(scope="module")
def page_address(proxied: Callable[..., str]) -> str:
    """The page with the options of the documentation."""
    return proxied("--root-path", "/afa", "--allowed-host", "example.org")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if BROWSER is None:
        pytest.skip("there is no Chromium; apt install chromium")
    here = "--host-resolver-rules=MAP example.org 127.0.0.1"
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=[*OFFLINE, here])
        yield browser
        browser.close()


class opened:
    """The page in a new browser after the login; every file must be of the page."""

    def __init__(self, browser: Any, address: str) -> None:
        self.context = browser.new_context(
            viewport={"width": 1280, "height": 900}, ignore_https_errors=True
        )
        self.context.set_default_timeout(PATIENCE)
        self.address = address
        self.asked: list[str] = []
        self.failed: list[str] = []

    def __enter__(self) -> Any:
        page = self.context.new_page()
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("response", lambda answer: self._note(answer))
        page.goto(self.address)  # without a slash at the end: nginx adds it
        page.locator("input[type=password]").fill(PASSWORD)
        page.locator("input").first.fill("afa")
        page.get_by_role("button", name="Login").click()
        page.wait_for_selector("#draw")
        return page

    def _note(self, answer: Any) -> None:
        # what the list of endpoints asks for in vain: no MCP and no monitoring
        optional = answer.url.endswith(("/mcp/schema", "/monitoring/summary"))
        if not answer.ok and answer.status != 301 and not optional:
            self.failed.append(answer.url)

    def __exit__(self, *_: object) -> None:
        own = (f"{self.address}/", "data:", "blob:")
        outside = [url for url in self.asked if not url.startswith(own) and url != self.address]
        assert outside == []
        assert self.failed == []
        paths = {cookie["path"] for cookie in self.context.cookies()}
        assert paths == {"/afa"}
        self.context.close()


def picture(page: Any, place: str) -> Image.Image:
    """What is shown at a place, asked for by the browser, which knows where example.org is."""
    script = "async u => Array.from(new Uint8Array(await (await fetch(u)).arrayBuffer()))"
    source = page.locator(f"#{place} img").get_attribute("src")
    return Image.open(io.BytesIO(bytes(page.evaluate(script, source))))


def use(page: Any, folder: Path) -> None:
    """Draw, cancel and download."""
    only(page, "AFA", "animals")
    draw(page, "2 pictures,")
    shown = picture(page, "picture-4")
    number(page, "steps", 150)
    page.click("#draw")
    status(page, "of 150")
    page.click("#cancel")
    status(page, "Stopped after 0 of 2 pictures")
    turn_to(page, "History")
    page.locator("#gallery .thumbnail-lg").nth(1).click()
    sync_api.expect(page.locator("#download")).to_be_enabled()
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(folder / "got.png")
    said = read_picture(folder / "got.png")
    assert said.recipe.drawn_by == "AFA"
    assert said.pixels == hash_pixels(shown)


def test_the_page_works_below_a_path(browser: Any, page_address: str, tmp_path: Path) -> None:
    with opened(browser, page_address) as page:
        use(page, tmp_path)
        page.get_by_role("button", name="Use via API").click()
        sync_api.expect(page.get_by_text("/draw").first).to_be_visible()
        assert "draw_all" not in page.locator("body").inner_text()


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("options", "changes"),
    [
        # the proxy keeps the path
        (
            ("--root-path", "/afa", "--allowed-host", "example.org"),
            {"proxy_pass http://127.0.0.1:7860/;": "proxy_pass http://127.0.0.1:7860;"},
        ),
        # as most proxies are
        (
            ("--root-path", "/afa", "--allowed-host", "example.org"),
            {"listen 80;": f"listen 80 ssl; {_CERTIFICATE}"},
        ),
        # the proxy does not say where the page is
        (("--root-path", "http://example.org:{port}/afa"), {"$http_host": "$proxy_host"}),
    ],
)
def test_other_proxies(
    proxied: Callable[..., str],
    browser: Any,
    tmp_path: Path,
    options: tuple[str, ...],
    changes: dict[str, str],
) -> None:
    with opened(browser, proxied(*options, changes=changes)) as page:
        use(page, tmp_path)


def curl(address: str, *options: str) -> str:
    """Ask for an address of `example.org`, which is here."""
    name = re.sub(r"^http://|/.*", "", address)
    command = ["curl", "-s", "--resolve", f"{name}:127.0.0.1", *options, address]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout


def test_only_known_names_get_through(page_address: str) -> None:
    here = page_address.replace("example.org", "127.0.0.1")
    assert "--allowed-host evil.org" in curl(f"{here}/", "-H", "Host: evil.org")
    assert "Not authenticated" in curl(f"{page_address}/gradio_api/info")
    assert "Uploads are disabled" in curl(f"{page_address}/gradio_api/upload", "-d", "x")


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_the_documented_call_with_curl(page_address: str, tmp_path: Path) -> None:
    jar = str(tmp_path / "jar")
    login = ["-c", jar, "-d", "username=afa", "--data-urlencode", f"password={PASSWORD}"]
    assert "true" in curl(f"{page_address}/login", *login)
    name = page_address.split("/")[2]
    known = f'curl() {{ command curl -b {jar} --resolve {name}:127.0.0.1 "$@"; }}\n'
    script = documented("draw.sh").replace("http://127.0.0.1:7860", page_address)
    script = script.replace('"steps": 20', '"steps": 3')

    def called(text: str) -> tuple[str, Any]:
        command = ["bash", "-c", known + text]
        said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        event, data = said.stdout.strip().splitlines()[-2:]
        return event, json.loads(data.removeprefix("data: "))

    event, (file, recipe) = called(script)
    assert event == "event: complete"
    assert recipe["prompt"] == "a fox in the snow"
    assert file["url"].startswith(f"{page_address}/gradio_api/file=")
    curl(file["url"], "-b", jar, "-o", str(tmp_path / "got.png"))
    assert read_picture(tmp_path / "got.png").recipe.steps == 3
    event, error = called(script.replace('"steps": 3', '"steps": "3"'))
    assert event == "event: error"
    assert "AFA-APP-012" in error["error"]
    for wrong in ('{"steps": 3}', '{"prompt": "a fox", "colour": 3}'):
        content = ["-b", jar, "-H", "Content-Type: application/json", "-d", wrong]
        assert "AFA-APP-015" in curl(f"{page_address}/gradio_api/call/v2/draw", *content)
        assert "AFA-APP-015" in curl(f"{page_address}/gradio_api/call/v2/nothing", *content)


def test_the_documented_call_from_python(serve: Callable[..., str], tmp_path: Path) -> None:
    """Directly: the client of gradio finds no host of its own name."""
    gradio_client = pytest.importorskip("gradio_client")
    address = serve("--root-path", "/afa", "--output", str(tmp_path))
    code = documented("draw.py").replace("http://127.0.0.1:7860/", f"{address}/")
    names: dict[str, Any] = {}
    exec(code.replace("steps=20", "steps=3"), names)
    assert read_picture(Path(names["picture"])).recipe.bias["food"] == {"up": -0.5}
    client = names["client"]
    assert list(client.view_api(return_format="dict")["named_endpoints"]) == ["/draw"]
    with pytest.raises(gradio_client.exceptions.AppError, match="AFA-APP-013"):
        client.predict("a fox", drawn_by="nobody", api_name="/draw")
    job = client.submit("a fox", steps=150, api_name="/draw")
    while not job.outputs():
        time.sleep(0.05)
    job.cancel()
    client.predict("a fox", steps=1, drawn_by="animals", api_name="/draw")
    # one drawing at a time: without the end of the first, its picture would be there by now
    assert {read_picture(file).recipe.steps for file in tmp_path.iterdir()} == {3, 1}
