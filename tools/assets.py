"""The files that ship with the package besides its code, with their authors and licences."""

from __future__ import annotations

from typing import NamedTuple


class Asset(NamedTuple):
    """A file or folder of the package."""

    path: str
    what: str
    who: str
    licence: str
    text: str


_AUTHORS = "the afa authors"
_APACHE = "Apache-2.0"

#: paths in the repository; a pattern stands for all files that match it
ASSETS = (
    Asset(
        "src/afa/zoo/assets/sprites.png",
        "small pictures of glyphs from the font Noto Color Emoji",
        "Google LLC, 2013; rendered by the afa authors",
        "OFL-1.1",
        "named in `NOTICE`; the font itself is not included",
    ),
    *(
        Asset(f"src/afa/zoo/assets/{folder}", what, _AUTHORS, _APACHE, "`LICENSE`")
        for folder, what in (
            ("base", "a model, trained on scenes made of the sprites"),
            ("animals", "an expert, trained on scenes made of the sprites"),
            ("food", "an expert, trained on the same kind of scenes"),
            ("things", "an expert, trained on the same kind of scenes"),
            ("ensemble", "aggregators, trained on such scenes, and the ensemble's configuration"),
            ("judges", "a classifier and a CLIP model, trained on such scenes"),
            ("shared", "the models' autoencoder (trained on such scenes), tokenizer and scheduler"),
            ("report.json", "the report of the training"),
        )
    ),
    Asset(
        "src/afa/studies/distillation/merges.json",
        "settings of merges, chosen by comparing them",
        _AUTHORS,
        _APACHE,
        "`LICENSE`",
    ),
    Asset(
        "src/afa/configs/clip",
        "the vocabulary of CLIP's tokenizer",
        "OpenAI, 2021",
        "MIT",
        "in `NOTICE`",
    ),
    Asset(
        "src/afa/configs/t5",
        "the vocabulary of T5's tokenizer",
        "Google LLC, 2019",
        _APACHE,
        "named in `NOTICE`; the text is in `LICENSE`",
    ),
    Asset(
        "src/afa/configs/*.json",
        "configurations of published models, used to read their files; no weights",
        "facts from the models' authors, compiled by the afa authors",
        _APACHE,
        "`LICENSE`",
    ),
)
