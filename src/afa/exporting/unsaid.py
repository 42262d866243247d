"""What a single file cannot say: settings of its folder that differ from the published model's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from afa.denoisers.architecture import difference
from afa.files import read_json
from afa.loading.facts import read_facts
from afa.loading.single_file.conversion import model_class_of
from afa.loading.single_file.identify import config_folder
from afa.loading.single_file.load import Described

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from afa.loading.facts import Facts

#: what `afa.exporting.plan` marks in the file, or refuses
_MARKED = ("prediction_type", "rescale_betas_zero_snr")
_SHIFTS = ("shift", "use_dynamic_shifting", "base_shift", "max_shift")
_ENCODER = ("hidden_act", "num_attention_heads", "num_heads", "layer_norm_eps", "eos_token_id")
#: in place of a digest
_VOCABULARY = "another vocabulary"


def unsaid_of(folder: Path, configuration: str) -> list[str]:
    """List settings of a pipeline folder that programs will not know from its single file.

    Compares the facts that experts of an ensemble must share (`afa.loading.facts`), and what
    changes a text encoder's output or a flow's timesteps.

    Args:
        folder: of the exported pipeline.
        configuration: the bundled configuration that programs assume.

    Returns: one line per setting.

    Raises:
        AfaError: if a configuration or tokenizer of the folder cannot be read.
    """
    places = (folder, config_folder(configuration))
    ours, theirs = (read_facts(str(place), Described(place)) for place in places)
    own, assumed = (
        dict(_settings(place, facts)) for place, facts in zip(places, (ours, theirs), strict=True)
    )
    found = [
        (*key, own[key], assumed[key]) for key in own if key in assumed and own[key] != assumed[key]
    ]
    model_class = ours.kind.family.model_class
    if (entry := difference(theirs.denoiser, ours.denoiser, model_class)) is not None:
        found.append((ours.kind.denoiser, entry[0], entry[2], entry[1]))
    return [
        f"a single file cannot say {key} = {value if key != 'vocabulary' else _VOCABULARY} of the "
        f"{part}: programs assume that of {configuration}"
        + (f", {other}" if key != "vocabulary" else "")
        for part, key, value, other in found
    ]


def _settings(folder: Path, facts: Facts) -> Iterator[tuple[tuple[str, str], Any]]:
    """Yield the settings of all parts but the denoiser by part and name."""
    for key, value in facts.latents.items():
        yield ("vae", key), value
    for key, value in facts.schedule.items():
        if key not in _MARKED:
            yield ("scheduler", key), value
    written = read_json(folder / "scheduler" / "scheduler_config.json")
    for key in _SHIFTS:
        yield ("scheduler", key), written.get(key)
    for name, digest in facts.vocabularies.items():
        yield (name, "vocabulary"), digest
    for name, settings in facts.settings.items():
        for key, value in settings.items():
            yield (name, key), value
    for name in facts.encoders:
        config = model_class_of(name, folder).config_class
        encoder = {**config().to_dict(), **read_json(folder / name / "config.json")}
        for key in _ENCODER:
            yield (name, key), encoder.get(key)
