"""What ships with the package besides its code: whose it is, and under what terms."""

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

#: paths are those in the repository; a pattern stands for the files that fit it
ASSETS = (
    Asset(
        "src/afa/zoo/assets/sprites.png",
        "pictures of glyphs of the font Noto Color Emoji",
        "Google LLC, 2013; drawn small by the afa authors",
        "OFL-1.1",
        "named in `NOTICE`; the font is no part",
    ),
    *(
        Asset(f"src/afa/zoo/assets/{folder}", what, _AUTHORS, _APACHE, "`LICENSE`")
        for folder, what in (
            ("base", "a model, trained on scenes drawn with the sprites"),
            ("animals", "an expert, trained on scenes drawn with the sprites"),
            ("food", "an expert, likewise"),
            ("things", "an expert, likewise"),
            ("ensemble", "aggregators, trained likewise, and the description of the ensemble"),
            ("judges", "a classifier and a CLIP model, trained likewise"),
            ("shared", "the models' autoencoder, trained likewise, tokenizer and scheduler"),
            ("report.json", "how the training went"),
        )
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
        "named in `NOTICE`; `LICENSE` is the text",
    ),
    Asset(
        "src/afa/configs/*.json",
        "widths and settings of published models, by which their files are read; no weights",
        "facts of the models' authors, put together by the afa authors",
        _APACHE,
        "`LICENSE`",
    ),
)
