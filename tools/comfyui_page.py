"""Open ComfyUI's page with the example workflows: write them as the page saves them, and pictures.

    python -m tools.comfyui_page build/comfyui-server

Starts the server of `tools.comfyui_server`, which must have run once. Chromium loads each workflow
in API form, arranges its nodes and saves it, as a user would. Writes `example_workflows/NAME.json`
and the pictures of `docs/comfyui`. The pages of ComfyUI's frontend change, so
this is run by hand and not by CI.
"""

from __future__ import annotations

import argparse
import json
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from tools.comfyui_server import PACK, ROOT, Server

EXAMPLES = PACK / "example_workflows"
PICTURES = ROOT / "docs/comfyui"
_CHROMIUM = "/usr/bin/chromium"
_OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
#: large enough for titles on the nodes of a wide workflow
_SIZE: Any = {"width": 2_400, "height": 1_200}
#: by the longest way from the left, in columns, as people arrange workflows
_ARRANGE = """
() => {
  const graph = window.app.graph, depth = {};
  const at = (node) => {
    if (depth[node.id] !== undefined) return depth[node.id];
    depth[node.id] = 0;
    let deepest = 0;
    for (const input of node.inputs || []) {
      if (input.link == null) continue;
      const link = graph.links.get ? graph.links.get(input.link) : graph.links[input.link];
      deepest = Math.max(deepest, at(graph.getNodeById(link.origin_id)) + 1);
    }
    return depth[node.id] = deepest;
  };
  graph._nodes.forEach(at);
  const columns = {};
  for (const node of graph._nodes) (columns[depth[node.id]] ||= []).push(node);
  let x = 40;
  for (const column of Object.keys(columns).map(Number).sort((a, b) => a - b)) {
    let y = 60, widest = 0;
    for (const node of columns[column].sort((a, b) => Number(a.id) - Number(b.id))) {
      node.pos = [x, y];
      y += node.size[1] + 70;
      widest = Math.max(widest, node.size[0]);
    }
    x += widest + 60;
  }
  graph.setDirtyCanvas(true, true);
}
"""


def opened(browser: Browser, address: str) -> Page:
    """Open the page and close what lies over the canvas."""
    page = browser.new_page(viewport=_SIZE)
    page.goto(address)
    page.wait_for_function("() => window.app && window.app.graph && window.app.canvas")
    page.wait_for_timeout(4_000)
    page.keyboard.press("Escape")
    banner = page.get_by_text("Introducing Nodes 2.0")
    if banner.count():
        page.mouse.click(_SIZE["width"] - 32, 20)
        page.wait_for_timeout(500)
    return page


def saved(page: Page, name: str) -> dict[str, Any]:
    """Load a workflow in API form, arrange it, and return it as the page saves it."""
    workflow = json.loads((EXAMPLES / f"api/{name}.json").read_text())
    page.evaluate("([flow, name]) => window.app.loadApiJson(flow, name)", [workflow, name])
    page.wait_for_timeout(1_500)
    page.evaluate(_ARRANGE)
    page.wait_for_timeout(500)
    # as text, because entries that are undefined must be left out
    return dict(json.loads(page.evaluate("() => JSON.stringify(window.app.graph.serialize())")))


def shown(page: Page, name: str, workflow: dict[str, Any]) -> None:
    """Load a workflow as it was saved, and write a picture of the page."""
    page.evaluate("(flow) => window.app.loadGraphData(flow)", workflow)
    page.wait_for_timeout(1_500)
    page.keyboard.press(".")  # fits the view
    page.wait_for_timeout(1_500)
    alert = page.locator(".p-toast-message")
    if alert.count():
        raise SystemExit(f"{name}: {alert.first.inner_text()[:500]}")
    PICTURES.mkdir(exist_ok=True)
    with Image.open(BytesIO(page.screenshot())) as picture:
        smaller = picture.convert("RGB").resize((1_600, 800))
        smaller.save(PICTURES / f"{name.lower().replace(' ', '-')}.jpg", quality=85)


def main() -> None:
    """Write all example workflows and their pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="that of tools.comfyui_server")
    arguments = parser.parse_args()
    server = Server(arguments.folder.absolute(), port=8191)
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=_CHROMIUM, args=_OPTIONS)
            for path in sorted((EXAMPLES / "api").glob("*.json")):
                workflow = saved(opened(browser, server.address), path.stem)
                text = json.dumps(workflow, indent=1, sort_keys=True)
                (EXAMPLES / path.name).write_text(f"{text}\n")
                shown(opened(browser, server.address), path.stem, workflow)
            browser.close()
    finally:
        server.stop()


if __name__ == "__main__":
    main()
