"""Tests against a ComfyUI, named by the environment variable COMFYUI; without it, none runs.

It is either ComfyUI's own folder, in an environment with what it needs, or a folder in which
`python -m tools.comfyui` has installed ComfyUI's core, in afa's own environment.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

COMFYUI = os.environ.get("COMFYUI")
collect_ignore_glob = [] if COMFYUI else ["test_*.py"]
ROOT = Path(__file__).parents[3]

if COMFYUI:
    from tools.comfyui_core import use_comfyui, use_core

    if (Path(COMFYUI) / "core").is_dir():
        use_core(COMFYUI)
    else:
        use_comfyui(COMFYUI)
    sys.path.insert(0, str(ROOT))  # ComfyUI has a folder `tests` of its own
