"""The model card of a saved ensemble."""

from __future__ import annotations

from typing import Any


def _card_line(expert: dict[str, Any]) -> str:
    line, lora = f"- `{expert['source']}` (SHA-256 `{expert['sha256']}`)", expert.get("lora")
    if lora is not None:
        line += f" with {lora['scale']:g} of `{lora['source']}` (SHA-256 `{lora['sha256']}`)"
    return line


def model_card(config: dict[str, Any]) -> str:
    """Write a model card in the hub's format, with instructions to use the ensemble.

    Args:
        config: the ensemble's `config.json`; its experts, aggregator and sites are read.
    """
    experts = "\n".join(_card_line(expert) for expert in config["experts"])
    settings = ", ".join(f"{key} {value}" for key, value in config["aggregator"].items())
    return f"""---
library_name: afa
tags: [text-to-image, diffusion, ensemble]
---

# An ensemble of {len(config["experts"])} diffusion models

Adaptive Feature Aggregation (Wang et al., ICLR 2025, arXiv 2405.17082): the frozen experts below
run side by side, and after each block a small network fuses their features with weights per pixel.

## Experts

{experts}

This folder does not contain their weights.

## Aggregators

{settings}; {len(config["sites"])} sites.

## Use

    import afa
    pipeline = afa.load_ensemble("this-folder")
    picture = pipeline("a prompt").images[0]

or `afa generate this-folder "a prompt" --output pictures`.
"""
