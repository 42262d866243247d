"""Suppress progress bars, advice and warnings of libraries."""

from __future__ import annotations

import logging
import os
import warnings


def quieten() -> None:
    """Suppress the libraries' progress bars and advice in the commands' output."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # otherwise it logs every retry
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


def quieten_loading() -> None:
    """Disable diffusers' progress bars; imports diffusers, so only for commands that need it."""
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.disable_progress_bar()
