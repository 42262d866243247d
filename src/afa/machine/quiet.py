"""The libraries' own bars, advice and warnings, kept out of what afa says."""

from __future__ import annotations

import logging
import os
import warnings


def quieten() -> None:
    """Keep the libraries' own bars and advice out of the commands' output."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # or it tells of every retry
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


def quieten_loading() -> None:
    """Keep diffusers' own loading bars off; imports it, so only for commands that need it."""
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.disable_progress_bar()
