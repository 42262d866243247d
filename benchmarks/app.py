"""Measure the response times of the browser app, or take its screenshots.

    python -m benchmarks.app
    python -m benchmarks.app --screenshots docs/images

`afa app` and Chromium run as separate processes on the same cores. The first picture of a process
takes longer than later ones; both are measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
WIDTHS = (1280, 390)
#: options that prevent network requests
OFFLINE = (
    *("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-quic", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
ADDRESS, USABLE = "afa app: the address is printed", "the page can be used"
FIRST, ALL = "the first picture after the click", "all five pictures after the click"
AGAIN = "the first picture after another click"


@contextlib.contextmanager
def page_of(times: dict[str, float] | None = None) -> Iterator[str]:
    """Run `afa app` and yield the address of its page."""
    times = {} if times is None else times
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "afa", "app"],
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        found = next(filter(None, (re.search(r"at (http://\S+)", line) for line in process.stdout)))
        times[ADDRESS] = time.perf_counter() - began
        # drain the output: a full pipe would block the process
        threading.Thread(target=deque, args=(process.stdout, 0), daemon=True).start()
        yield found[1]
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """Run a headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER, args=list(OFFLINE))
        yield started
        started.close()


def opened(started: Any, address: str, width: int = 1280) -> Any:
    """Open the page and wait until it can be used."""
    context = started.new_context(viewport={"width": width, "height": 900})
    context.set_default_timeout(120_000)
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector("#draw")
    return page


def measure() -> dict[str, float]:
    """Measure the times of one start, in seconds."""
    times: dict[str, float] = {}
    with browser() as started, page_of(times) as address:
        began = time.perf_counter()
        page = opened(started, address)
        times[USABLE] = times[ADDRESS] + time.perf_counter() - began
        for first, last in ((FIRST, ALL), (AGAIN, None)):
            page.evaluate(
                "document.querySelectorAll('[id^=picture-] img').forEach(i => i.src = '')"
            )
            began = time.perf_counter()
            page.click("#draw")
            page.wait_for_function("""() => [...document.querySelectorAll('[id^=picture-] img')]
                .some(image => image.naturalWidth > 0)""")
            times[first] = time.perf_counter() - began
            done(page, "5 pictures,")
            if last is not None:
                times[last] = time.perf_counter() - began
    return times


def done(page: Any, words: str) -> None:
    """Wait until the page reports that it is done."""
    script = "words => document.querySelector('#status').innerText.includes(words)"
    page.wait_for_function(script, arg=words)


def screenshots(folder: Path) -> None:
    """Take a screenshot of every view, at desktop and phone width."""
    with browser() as started, page_of() as address:
        for width in WIDTHS:
            page = opened(started, address, width)

            def shoot(name: str, page: Any = page, width: int = width) -> None:
                page.wait_for_timeout(1000)
                page.screenshot(path=folder / f"app-{name}-{width}.png", full_page=True)

            page.click("#draw")
            done(page, "5 pictures,")
            shoot("compare")
            page.get_by_role("tab", name="Fusion weights").click()
            page.wait_for_timeout(1500)
            step = page.locator("#step input[type=number]")
            step.fill("8")
            step.press("Enter")
            page.wait_for_timeout(1000)
            page.locator("#map img").click(position={"x": 60, "y": 150})
            shoot("weights")
            page.get_by_role("tab", name="Steer").click()
            page.wait_for_timeout(500)
            bias = page.locator("#bias-0 input[type=number]")
            bias.fill("2.5")
            bias.press("Enter")
            page.click("#steer")
            done(page, "2 pictures,")
            shoot("steer")
            page.get_by_role("tab", name="History").click()
            page.wait_for_timeout(1000)
            page.locator("#gallery button").first.click()
            shoot("history")
            page.context.close()


def main() -> None:
    """Measure and print, or take the screenshots."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--screenshots", type=Path)
    arguments = parser.parse_args()
    if arguments.screenshots is not None:
        screenshots(arguments.screenshots)
        return
    rounds = [measure() for _ in range(arguments.rounds)]
    results = [
        {
            "until": name,
            "num_rounds": len(rounds),
            "seconds": statistics.median(seen[name] for seen in rounds),
            "low": min(seen[name] for seen in rounds),
            "high": max(seen[name] for seen in rounds),
        }
        for name in (ADDRESS, USABLE, FIRST, ALL, AGAIN)
    ]
    print(json.dumps(results, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
