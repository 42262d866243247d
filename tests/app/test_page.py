"""The page in a browser: drawn, cancelled, looked at, steered, repeated, shared, and failing."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from afa.cli import main
from afa.drawing.recorded import hash_pixels, read_picture
from benchmarks.app import BROWSER, OFFLINE
from tests.app.serve import FAILS

sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = [
    pytest.mark.processes,
    # found but not imported, which takes seconds, by processes that collect and do not run it
    pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed"),
    pytest.mark.skipif(BROWSER is None, reason="there is no Chromium; apt install chromium"),
]
PATIENCE = 120_000  # milliseconds; other tests run beside


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=list(OFFLINE))
        yield browser
        browser.close()


@pytest.fixture
def tab(browser: Any, address: str) -> Iterator[Any]:
    with opened(browser, address) as page:
        yield page


class opened:
    """A new browser's page, as of somebody else; it must not look at any other machine."""

    def __init__(self, browser: Any, address: str, width: int = 1280) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900})
        self.context.set_default_timeout(PATIENCE)
        self.address = address

    def __enter__(self) -> Any:
        page = self.context.new_page()
        self.asked: list[str] = []
        page.on("request", lambda request: self.asked.append(request.url))
        page.goto(self.address)
        page.wait_for_selector("#draw")
        return page

    def __exit__(self, *_: object) -> None:
        own = (self.address, "data:", "blob:")
        assert [url for url in self.asked if not url.startswith(own)] == []
        self.context.close()


def status(page: Any, words: str) -> str:
    """Wait until the page says so."""
    sync_api.expect(page.locator("#status")).to_contain_text(words, timeout=PATIENCE)
    return page.locator("#status").inner_text()


def changed(page: Any, name: str, words: str, before: str) -> str:
    """Wait for another text at a place, with these words; for a moment there is none."""
    script = """([name, words, before]) => {
        const text = document.querySelector('#' + name).innerText;
        return text.includes(words) && text !== before;
    }"""
    page.wait_for_function(script, arg=[name, words, before])
    return page.locator(f"#{name}").inner_text()


def number(page: Any, name: str, value: object) -> None:
    """Type a value into the field of a slider."""
    field = page.locator(f"#{name} input[type=number]")
    field.fill(str(value))
    field.press("Enter")


def only(page: Any, *names: str) -> None:
    """Leave these alone ticked."""
    for box in page.locator("#who input").all():
        box.set_checked(box.get_attribute("name") in names)


def draw(page: Any, words: str, *, prompt: str | None = None, steps: int = 6) -> None:
    if prompt is not None:
        page.locator("#prompt textarea").fill(prompt)
    number(page, "steps", steps)
    page.click("#draw")
    status(page, words)


def picture(page: Any, place: str) -> Image.Image:
    """What is shown at a place, as the browser got it."""
    source = page.locator(f"#{place} img").get_attribute("src")
    return Image.open(io.BytesIO(page.request.get(source).body()))


def turn_to(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def test_everybody_draws_and_the_picture_comes_out_again(tab: Any, tmp_path: Path) -> None:
    draw(tab, "5 pictures,")
    shown = [picture(tab, f"picture-{n}") for n in range(5)]
    assert len({each.tobytes() for each in shown}) == 5
    turn_to(tab, "History")
    tab.locator("#gallery .thumbnail-lg").nth(4).click()
    sync_api.expect(tab.locator("#download")).to_be_enabled()
    for n, name in ((4, "AFA"), (0, "animals"), (3, "uniform merge")):
        tab.locator("#gallery .thumbnail-lg").nth(n).click()
        sync_api.expect(tab.get_by_text(f'"drawn_by": "{name}"')).to_have_count(int(n != 4))
        with tab.expect_download() as download:
            tab.click("#download")
        file = tmp_path / f"{n}.png"
        download.value.save_as(file)
        said = read_picture(file)
        assert said.recipe.drawn_by == name
        assert said.pixels == hash_pixels(shown[n])
        again = tmp_path / f"again-{n}"
        with pytest.raises(SystemExit) as stop:
            main(["generate", "--from-image", str(file), "--output", str(again)])
        assert stop.value.code == 0
        (made,) = again.iterdir()
        assert hash_pixels(Image.open(made)) == hash_pixels(shown[n])


@pytest.mark.nightly
def test_a_picture_of_another_precision_comes_out_again(
    browser: Any, serve: Callable[..., str], tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    with opened(browser, serve("--dtype", "bfloat16", "--output", str(kept))) as page:
        only(page, "AFA")
        draw(page, "1 picture,")
        shown = picture(page, "picture-4")
    (file,) = kept.iterdir()
    said = read_picture(file)
    assert said.recipe.dtype == "bfloat16"
    assert said.pixels == hash_pixels(shown)
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--from-image", str(file), "--output", str(tmp_path / "again")])
    assert stop.value.code == 0
    (made,) = (tmp_path / "again").iterdir()
    assert hash_pixels(Image.open(made)) == hash_pixels(shown)


def test_who_did_what_follows_step_site_and_clicks(tab: Any) -> None:
    only(tab, "AFA")
    draw(tab, "1 picture,")
    turn_to(tab, "Fusion weights")
    whole = changed(tab, "legend", "animals", "")
    number(tab, "step", 1)
    first = changed(tab, "legend", "animals", whole)
    tab.locator("#site input").click()
    tab.get_by_role("option", name="mid").click()
    changed(tab, "legend", "animals", first)
    tab.locator("#map img").click(position={"x": 100, "y": 200})
    here = changed(tab, "numbers", "from the left", "")
    tab.locator("#map img").click(position={"x": 300, "y": 200})
    shares = changed(tab, "numbers", "from the left", here).split(":")[1]
    total = sum(int(part.split()[-1].rstrip("%")) for part in shares.split(","))
    assert 97 <= total <= 103


def test_steering_changes_the_picture_and_its_settings_come_back(tab: Any) -> None:
    turn_to(tab, "Steer")
    number(tab, "steps", 6)
    tab.click("#steer")
    status(tab, "2 pictures,")
    assert picture(tab, "steered-0").tobytes() == picture(tab, "steered-1").tobytes()
    number(tab, "bias-1", 3)
    tab.click("#steer")
    sync_api.expect(tab.locator("#cancel")).to_be_enabled()
    status(tab, "2 pictures,")
    assert picture(tab, "steered-0").tobytes() != picture(tab, "steered-1").tobytes()
    tab.get_by_role("button", name="Reset to 0").click()
    sync_api.expect(tab.locator("#bias-1 input[type=number]")).to_have_value("0")
    turn_to(tab, "History")
    tab.locator("#gallery .thumbnail-lg").nth(3).click()
    sync_api.expect(tab.locator("#use")).to_be_enabled()
    tab.click("#use")
    turn_to(tab, "Steer")
    tab.get_by_text("By stage of the network").click()
    sync_api.expect(tab.locator("#bias-1-up input[type=number]")).to_have_value("3")


def test_a_scheduler_draws_another_picture_and_comes_back(tab: Any, tmp_path: Path) -> None:
    only(tab, "AFA")
    draw(tab, "1 picture,")
    own = picture(tab, "picture-4")
    tab.get_by_role("button", name="More").click()
    tab.locator("#scheduler input").click()
    # those that fit: the zoo's noise schedule has a zero terminal SNR, which Heun lacks
    sync_api.expect(tab.get_by_role("option", name="heun", exact=True)).to_have_count(0)
    tab.get_by_role("option", name="euler_a", exact=True).click()
    tab.click("#draw")
    sync_api.expect(tab.locator("#cancel")).to_be_enabled()
    status(tab, "1 picture,")
    assert picture(tab, "picture-4").tobytes() != own.tobytes()
    turn_to(tab, "History")
    for n, name in ((0, "the experts' own"), (1, "euler_a")):
        tab.locator("#gallery .thumbnail-lg").nth(n).click()
        sync_api.expect(tab.get_by_text('"scheduler": "euler_a"')).to_have_count(n)
        tab.click("#use")
        sync_api.expect(tab.locator("#scheduler input")).to_have_value(name)
    with tab.expect_download() as download:
        tab.click("#download")
    download.value.save_as(tmp_path / "drawn.png")
    with Image.open(tmp_path / "drawn.png") as drawn:
        assert "Sampler: Euler a," in drawn.info["parameters"]


def test_cancel_really_stops(tab: Any) -> None:
    number(tab, "steps", 150)
    only(tab, "AFA")
    tab.click("#draw")
    status(tab, "of 150")
    tab.click("#cancel")
    status(tab, "Stopped after 0 of 1 pictures")
    only(tab, "animals")
    draw(tab, "1 picture,", steps=1)


def test_who_leaves_is_not_waited_for(browser: Any, address: str) -> None:
    with opened(browser, address) as page:
        number(page, "steps", 150)
        page.click("#draw")
        status(page, "of 150")
    with opened(browser, address) as page:
        only(page, "animals")
        draw(page, "1 picture,", steps=1)  # not after five of 150 steps, which take minutes
        assert float(page.locator("#status").inner_text().split()[2]) < 30


@pytest.mark.nightly
def test_two_at_once_are_served_one_after_the_other(browser: Any, address: str) -> None:
    with opened(browser, address) as one, opened(browser, address) as two:
        for page, prompt in ((one, "a fox"), (two, "a bee")):
            page.locator("#prompt textarea").fill(prompt)
            number(page, "steps", 12)
            page.click("#draw")
        for page in (one, two):
            status(page, "5 pictures,")
        assert picture(one, "picture-4").tobytes() != picture(two, "picture-4").tobytes()
        turn_to(two, "History")
        assert two.locator("#gallery .thumbnail-lg").count() == 5  # nothing of the other's


def test_a_failure_is_shown_and_the_page_goes_on(tab: Any) -> None:
    only(tab, "AFA")
    draw(tab, "RuntimeError: out of <b>unicorns</b>", prompt=FAILS)
    assert tab.locator("#status [role=alert]").count() == 1
    assert tab.locator("#status b").count() == 0
    sync_api.expect(tab.locator("#draw")).to_be_enabled()
    draw(tab, "1 picture,", prompt="a fox")


def test_mistakes_are_told(tab: Any) -> None:
    only(tab)
    draw(tab, "AFA-APP-001")
    only(tab, "AFA")
    draw(tab, "at most 20000 characters", prompt="a" * 20_001)


def test_a_prompt_is_never_a_part_of_the_page(tab: Any) -> None:
    evil = "<img src=x onerror=\"document.title='gone'\"><script>document.title='gone'</script>"
    only(tab, "AFA")
    draw(tab, "1 picture,", prompt=evil, steps=2)
    for name in ("Fusion weights", "History"):
        turn_to(tab, name)
        time.sleep(1)
    tab.locator("#gallery .thumbnail-lg").first.click()
    sync_api.expect(tab.locator("#download")).to_be_enabled()
    assert tab.title() == "afa"
    assert tab.locator("#caption").inner_text().strip() == evil


def test_it_fits_a_telephone(browser: Any, address: str) -> None:
    with opened(browser, address, width=390) as page:
        draw(page, "5 pictures,", steps=2)
        for name in ("Compare", "Fusion weights", "Steer", "History"):
            turn_to(page, name)
            assert page.evaluate("document.documentElement.scrollWidth") <= 390
