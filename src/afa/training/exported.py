"""Write the ensemble of a checkpoint, without loading an expert and while the training goes on."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from afa.errors import AfaError
from afa.files import read_json, staged, write_atomic
from afa.loading.ensemble_folder import config_of, names_of_parameters, write_files
from afa.loading.saved import read_config, referred
from afa.loading.sources import absolute_source, relative_source
from afa.training.changing import History
from afa.training.checkpoints import Checkpoints
from afa.training.continuing import RECIPE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from afa.ensemble.denoiser import EnsembleDenoiser
    from afa.training.checkpoints import Checkpoint
    from afa.training.trained import Aggregators

CHECKPOINTS = "checkpoints"
#: file in a run's folder with everything besides weights that the ensemble of a checkpoint needs
DESCRIPTION = "ensemble.json"


def write_description(aggregators: Aggregators, output: Path) -> None:
    """Write what `export_checkpoint` needs besides a checkpoint, at the start of a training.

    Args:
        aggregators: the trained part of the ensemble.
        output: the run's folder.
    """
    ensemble: EnsembleDenoiser = aggregators.ensemble
    names = names_of_parameters(ensemble)
    description = {
        "config": config_of(ensemble, output),
        "parameters": [names[parameter] for parameter in aggregators.parameters],
        "words": list(ensemble.provenance.words or ()),
    }
    write_atomic(output / DESCRIPTION, json.dumps(description, ensure_ascii=False) + "\n")


def export_checkpoint(
    run: Path, output: Path, *, step: int | None = None, best: bool = False
) -> int:
    """Write the ensemble of a checkpoint of `afa train`, as at the end of the training.

    The run may be in progress. With `ema_decay`, the ensemble has the averaged weights.

    Args:
        run: the folder of the training.
        output: a new folder.
        step: of the checkpoint; None uses the newest.
        best: use the weights with the lowest validation loss up to that step, which a run with
            `early_stopping` keeps.

    Returns: the step of the checkpoint.

    Raises:
        AfaError: if there is no such checkpoint, it is damaged or does not belong to the run, or
            the output exists.
    """
    recipe = _recipe(run)
    require_new(output)
    found = read_checkpoint(run, step)
    place = run / DESCRIPTION
    if not place.is_file():
        raise AfaError(
            "AFA-TRAIN-096",
            f"'{place}', which a training writes at its start, is missing: an earlier release "
            "started this run. Repeat the command of the training, which writes it (Ctrl-C stops "
            "it again), and then this command.",
        )
    description = read_json(place)
    try:
        config, words = _moved(description["config"], run, output), list(description["words"])
        tensors = weights_of(found, "aggregators", description["parameters"], best=best)
    except (KeyError, TypeError, AttributeError, IndexError):
        raise AfaError(
            "AFA-TRAIN-097",
            f"'{place}' is not as afa train writes it, or is of another run than the checkpoint. "
            "Repeat the command of the training, which writes it again.",
        ) from None
    with staged(output) as partial:
        lines = lines_about(run, recipe, found.step, best=best)
        write_files(partial, config, tensors, words, lines)
        saved = read_config(partial)
        references = [*saved["experts"], saved["vae"], *saved["parts"]]
        hashes = [referred(each, partial).identity for each in references if each is not None]
        require_models(found, hashes, run)
    return found.step


def require_new(output: Path) -> None:
    """Check that an output folder does not exist.

    Raises:
        AfaError: if it does.
    """
    if output.exists():
        raise AfaError(
            "AFA-TRAIN-095", f"The output '{output}' exists; it must be a new folder. Name another."
        )


def require_models(found: Checkpoint, hashes: Sequence[str], run: Path) -> None:
    """Check that a checkpoint was trained with models that have these hashes.

    Raises:
        AfaError: if it was not.
    """
    if found.notes.get("experts") != list(hashes):
        raise AfaError(
            "AFA-TRAIN-099",
            f"The checkpoint of step {found.step} in '{run}' was trained with other models than "
            "those that the run names. Restore the models and the files of the run.",
        )


def lines_about(run: Path, recipe: dict[str, Any], step: int, *, best: bool) -> list[str]:
    """Return sentences about the weights of a checkpoint, for a model card."""
    which = "with the lowest validation loss up to step" if best else "of step"
    total, name = recipe["training"]["num_steps"], run.absolute().name
    text = f"These are the weights {which} {step} of {total} of the run '{name}'."
    return [text, *History.up_to(run, recipe, step).lines]


def read_checkpoint(run: Path, step: int | None) -> Checkpoint:
    """Read the newest checkpoint of a run, or that of a step.

    Raises:
        AfaError: if there is none; lists those that there are.
    """
    checkpoints = Checkpoints(run / CHECKPOINTS)
    try:
        found = checkpoints.read(step)
    except AfaError:
        if step is None or step in checkpoints.steps():
            raise
        found = None  # the training has deleted it meanwhile
    if found is None:
        known = ", ".join(map(str, checkpoints.steps()))
        wanted = "no checkpoint yet" if step is None else f"no checkpoint of step {step}"
        raise AfaError(
            "AFA-TRAIN-094",
            f"'{run}' has {wanted}; it has {f'those of steps {known}' if known else 'none'}. Pass "
            "one of these as --step; training.checkpoint_every and training.keep_checkpoints "
            "determine which are kept.",
        )
    return found


def _recipe(run: Path) -> dict[str, Any]:
    recipe = read_json(run / RECIPE) if (run / RECIPE).is_file() else {}
    if not isinstance(recipe.get("training"), dict) or not isinstance(recipe.get("experts"), list):
        raise AfaError(
            "AFA-TRAIN-100",
            f"'{run}' is not the folder of a run of `afa train`, since it has no {RECIPE} of one. "
            "Pass the folder that was given to `afa train` as --output.",
        )
    return recipe


def weights_of(
    found: Checkpoint, part: str, parameters: Sequence[str], *, best: bool
) -> dict[str, Tensor]:
    """Return the trained tensors of a checkpoint; the averaged ones if there are any.

    Args:
        found: the checkpoint.
        part: prefix of the trained tensors.
        parameters: their names, in the order of the optimizer.
        best: return those with the lowest validation loss.

    Raises:
        AfaError: if `best` is set and the checkpoint has none.
        KeyError: if the averaged tensors are of other parameters.
    """
    if best and not found.part("best"):
        raise AfaError(
            "AFA-TRAIN-098",
            f"The checkpoint of step {found.step} has no best weights: these are kept with "
            "training.early_stopping, from the first validation on. Remove --best.",
        )
    if best:
        return found.part("best")
    tensors, average = found.part(part), found.part("average")
    if average and len(average) != len(parameters):
        raise KeyError("average")
    return tensors | {parameters[int(number)]: tensor for number, tensor in average.items()}


def _moved(config: dict[str, Any], run: Path, output: Path) -> dict[str, Any]:
    """Return a configuration whose sources are relative to another folder."""

    def moved(reference: Any) -> Any:
        if isinstance(reference, str):
            return relative_source(absolute_source(reference, run), output)
        if not isinstance(reference, dict):
            return reference
        keys = ("source", "config", "lora")
        return {k: moved(v) if k in keys else v for k, v in reference.items()}

    changed = dict(config)
    for key in ("vae", "config", "judge", "experts", "parts"):
        if key in config:
            value = config[key]
            changed[key] = [moved(r) for r in value] if isinstance(value, list) else moved(value)
    return changed
