"""The page in a process of its own, as `afa app`, with a prompt that fails.

python -m tests.app.serve --port 8000
"""

from __future__ import annotations

import sys
from typing import Any

from afa.app import drawing
from afa.cli import main

FAILS = "a unicorn"


def _draw(pipeline: Any, recipe: Any) -> Any:
    if recipe.prompt == FAILS:
        raise RuntimeError("out of <b>unicorns</b>")
    return _whole(pipeline, recipe)


_whole = drawing.draw
if __name__ == "__main__":
    drawing.draw = _draw
    main(["app", *sys.argv[1:]])
