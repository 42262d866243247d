"""Record measurements in docs/benchmarks.json, and write docs/benchmarks.md from them."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

from afa.files import write_atomic
from afa.provenance import commit, made_from, processor

DOCS = Path(__file__).parent.parent / "docs"
FILE = DOCS / "benchmarks.json"

_NOT = "Not measured."
_INTRO = """# Benchmarks

This page has the measured time, memory and quality of afa. To measure on your machine:

```bash
make bench          # everything except the quality studies and the GPU; an hour
make bench-check    # measure a few ratios again and compare them with this page; minutes
```

`make bench` writes this page; the figures are in [benchmarks.json](benchmarks.json). The methods
that are compared alternate within one run. A ratio is computed within each round; the tables show
the median over the rounds, with the quartiles in brackets. Each section names its machine. Ratios
differ between machines, too: compare [a step on a CPU](#a-step) with [a step on a GPU](#on-a-gpu).
"""


def committed() -> dict[str, Any]:
    """The committed measurements, by part."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def record(part: str, results: Any) -> None:
    """Replace the measurements of one part, and write the page."""
    origin = {
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "software": made_from()["software"],
    }
    kept = {**committed(), part: {**origin, "results": results}}
    write_atomic(FILE, json.dumps(kept, indent=1) + "\n")
    write_page()


def write_page() -> None:
    """Write the page from the committed measurements."""
    write_atomic(DOCS / "benchmarks.md", as_page(committed()))


def as_page(kept: dict[str, Any]) -> str:
    """The complete page as Markdown."""
    sections = [
        _INTRO,
        _section("A step", _STEP, kept.get("step"), _step),
        _section("A picture", _PICTURE, kept.get("picture"), _picture),
        _section("Speed against quality", _STUDY, kept.get("study"), _speeds),
        _section("Size of the aggregators", _SHAPES, kept.get("aggregators"), _study),
        _section("Streamed experts", _STREAMING, kept.get("streaming"), _streaming),
        _section("Experts spread over processes", _SCALING, kept.get("scaling"), _scaling),
        _section("Training", _TRAINING, kept.get("training"), _training),
        _section("Distillation", _DISTILLING, kept.get("distilling"), _distilling),
        _section("Drafts", _DRAFTING, kept.get("drafting"), _drafting),
        _section("Start-up time", _STARTUP, kept.get("startup"), _startup),
        _section("Hashing of the experts", _HASHING, kept.get("hashing"), _hashing),
        _section("Installed size", _SIZE, kept.get("size"), _size),
        _section("Browser app", _APP, kept.get("app"), _app),
        _section("On a GPU", _GPU, kept.get("gpu"), _gpu),
    ]
    return "\n".join(sections)


_STEP = """How much slower is one ensemble step than its experts alone? `python -m benchmarks.step`
calls the denoiser on a batch of 2, and compares it with the experts' diffusers forward passes, run
one after another. All weights are random. Every row changes one setting of the base case: three
experts, 32x32 latents, float32.

- *Mean*: the ensemble with the uniform mean. This is the cost of the ensemble code itself.
- *Floor*: the ratio of operation counts (convolutions, matrix products, attention). The keys and
  values of the prompt count for the experts alone only, because the ensemble reuses them from the
  second step on. It is a ratio of counts, not of times. The measured ratio can be lower if the
  aggregators' operations are faster than average, and higher if operations that are not counted,
  such as exponentials, take long.
- *Share*: the aggregators' share of the step's time.
- *Compiled*: experts and ensemble both use `compile_repeated_blocks()`."""
_PICTURE = """How long does one picture take? `python -m benchmarks.picture` uses the zoo's
models with 20 DDIM steps, guidance 3, batches of 16 and one thread. The times include text
encoder and autoencoder. Ratios are relative to one model at the exact speed."""
_STUDY = """How fast can sampling be before quality suffers? `python -m
benchmarks.acceleration_study WORK` uses the zoo, 96 mixed prompts and three training seeds.

The prompts have pairs of objects that are in no training set. The presets were chosen on them,
so they share no pair with the test of [results.md](results.md). No row is a model tuned on the
aggregators' data. *Minus exact AFA* is a paired difference with a 95 % interval. The time is that
of a batch of 8 on one thread, relative to the exact base model, which ran alternately. The settings
*threshold*, *line* and *guidance until* were removed because of the results in their rows."""
_SHAPES = """How small can the aggregators be? `python -m benchmarks.aggregator_study WORK` uses
the same prompts and seeds as the speed study."""
_STREAMING = """How much memory does `stream_experts` save? `python -m benchmarks.streaming`
draws pictures of 256 pixels with models of Stable Diffusion 1.5's size and random weights, four
steps with guidance. Each row runs in its own process, and peaks exclude the memory of the
imports. Streaming keeps the experts' layers in a file and reads the next layers while one runs.
The operating system's cache of that file is not counted. On this machine the whole file fits
into that cache."""
_SCALING = """How much faster is one picture with several processes (`spread_experts`)? Every
process computes its own experts, and all processes exchange features at every site. `python -m
benchmarks.scaling` uses one thread per process, gloo, batches of 2, 32x32 latents and the
default aggregators. The predicted speedup comes from the sum of three parts, each measured
separately in these processes: the forward passes of one process's experts, the aggregators
(which every process runs), and sending the features. *Sent* is the data that a process sends for
one expert in a step; a link of 25 GB/s would transfer 25 MB in 1 ms."""
_TRAINING = """How long does a training step take? `python -m benchmarks.training` uses the zoo
with a batch size of 16. [Train on your
data](training.md#time-and-memory-of-each-training-setting) explains the settings."""
_DISTILLING = """What does recording add to drawing, and a student's step to a plain training step?
`python -m benchmarks.distilling` alternates both in one process: a recorded and written batch of
the bundled ensemble with a drawn one, and a step of [`afa distill`](distillation.md) with a step
of a plain loop, which has the same model, optimizer, batch and loss, and all tensors in memory."""
_DRAFTING = """What do [drafts](drafts.md) add to a picture? `python -m benchmarks.drafting` draws
four pictures by the aggregators of the bundled ensemble, the same by drafts, and with one expert
alone, in turn. Each expert drafts in 5 steps, and the judge looks at 5 noise levels. Drafts do not
change training, and a drafted picture runs no aggregators. *Calls* are evaluations of one denoiser
for a picture."""
_STARTUP = """How long does a start take? In `python -m benchmarks.startup`, each start is a
separate process, with the files in the operating system's cache."""
_HASHING = """Are the experts hashed again at every start? `python -m benchmarks.hashing`
describes three sparse files of 2 GB each, as `afa inspect` does. Each start is a separate
process; the cache of hashes is empty before the first one. *Read* counts the bytes read by
system calls."""
_SIZE = """How much disk space does an installation need? The table counts the files of each
distribution, including compiled modules. The row of an extra counts only what it adds to the
core and to the extras that it includes. [Licences](licences.md) lists all distributions."""
_APP = """How fast does the browser app respond? `python -m benchmarks.app` runs `afa app` with
the bundled ensemble and 20 steps in its own process, and Chromium on the same cores. Most of the
first row's time is the import of torch and the other libraries."""
_GPU = """How much slower is an ensemble on a GPU? `python -m benchmarks.gpu OUT.json` uses the
architectures of Stable Diffusion 1.5, XL and Flux in bfloat16 with random weights, latents of the
pictures' size, and batches of 2 (Flux: 1).

- *plain*: without CUDA graphs.
- *graphs*: a step of the ensemble (`afa.accelerate(pipeline, cuda_graphs=True)`) and the forward
  pass of every expert run as CUDA graphs, so no kernel launch waits for Python.

The first table has steps: ratios are relative to the experts' forward passes in the same mode,
one after another. The second table has pictures: 20 steps, guidance 7.5 (Flux: 3.5), including
the autoencoder and without text encoders. *Peak* is the memory of the pipeline's weights and of
one call. A merge costs as much as one model."""


def quality_cells(report: dict[str, Any], subject: str) -> dict[str, list[str]]:
    """By method of a report, the share of correct mixed pictures and the difference to the subject.

    The difference is empty for the subject itself.
    """
    beyond = {
        entry["against"]: entry["difference"]
        for entry in report["paired"]
        if entry["method"] == subject and entry["score"] == "both"
    }
    cells = {}
    for row in report["rows"]:
        score, found = row["groups"]["mixed"]["scores"]["both"], beyond.get(row["method"])
        cells[row["method"]] = [
            f"{score['mean']:.3f} [{score['low']:.3f}, {score['high']:.3f}]",
            f"{-found['mean']:+.3f} [{-found['high']:+.3f}, {-found['low']:+.3f}]" if found else "",
        ]
    return cells


def _section(title: str, text: str, part: dict[str, Any] | None, body: Any) -> str:
    lines = [f"## {title}", "", text, ""]
    if part is None:
        return "\n".join([*lines, _NOT, ""])
    lines += [body(part["results"]), ""]
    lines.append(f"{part['date']}, commit {part['commit']}; {part['machine']}; {part['software']}.")
    return "\n".join([*lines, ""])


def as_table(head: list[str], rows: list[list[str]]) -> str:
    """Format rows of text as a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _spread(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f} [{spread['low']:.2f}, {spread['high']:.2f}]"


def _step(results: list[dict[str, Any]]) -> str:
    shapes = list(results[0]["floors"])
    head = ["widths", "experts", "latents", "data type", "experts' seconds", "mean"]
    for shape in shapes:
        head += [shape, "floor", "share"]
    rows = []
    for cell in results:
        latent = f"{cell['latent']}x{cell['latent']}"
        kind = cell["dtype"] + ", compiled" * cell["compiled"]
        row = [cell["size"], str(cell["num_experts"]), latent, kind]
        row += [f"{cell['seconds']['experts']:.3g}", _spread(cell["ratios"]["mean"])]
        for shape in shapes:
            row += [
                _spread(cell["ratios"][shape]),
                f"{cell['floors'][shape]:.2f}",
                f"{cell['aggregators'][shape]:.0%}",
            ]
        rows.append(row)
    threads = {cell["num_threads"] for cell in results}
    return f"{as_table(head, rows)}\n\nThreads: {', '.join(map(str, sorted(threads)))}."


def _picture(results: list[dict[str, Any]]) -> str:
    rows = [
        [
            row["way"],
            row["speed"],
            f"{row['seconds']:.3f}",
            _spread(row["ratio"]),
            f"{row['memory'] / 1e9:.2f}" if "memory" in row else "not measured",
        ]
        for row in results
    ]
    head = ["model", "speed", "seconds per picture", "relative to one model", "peak memory, GB"]
    return as_table(head, rows)


def _study(results: dict[str, Any]) -> str:
    return results["table"]


def _speeds(results: dict[str, Any]) -> str:
    return f"""{results["table"]}

{_not_told_apart(results)}

The next table has other numbers of steps, on a third of the prompts: the share of correct pictures,
and the time relative to the exact ensemble. The presets decide by how far the latent has moved. An
interval that works for 20 steps is too long for fewer steps.

{results["curve"]}

![Share of correct pictures against time, for every setting.](images/benchmarks-speed.png)

The same prompts and noise at several speeds:

![Pictures at several speeds, one speed per row.](images/benchmarks-pictures.png)"""


def _not_told_apart(results: dict[str, Any]) -> str:
    """Name the fastest rows of the ensemble and of the rivals without a significant difference."""
    seconds = {name: spread["median"] for name, spread in results["ratios"].items()}
    below = {
        pair["against"]: pair["difference"]
        for pair in results["paired"]
        if (pair["role"], pair["score"]) == ("subject", "both")
    }
    as_good = sorted((name for name in below if below[name]["low"] <= 0), key=seconds.__getitem__)
    ours = [name for name in as_good if name.startswith("AFA")]
    rivals = [name for name in as_good if name not in ours]
    others = [name for name in below if not name.startswith("AFA")]
    closest = min(others, key=lambda name: below[name]["mean"])
    gap = below[closest]
    of_rivals = (
        f"The fastest such row of another method is *{rivals[0]}*, {seconds[rivals[0]]:.2f} times."
        if rivals
        else "Every row of another method is significantly lower. The closest one is "
        f"*{closest}*: lower by {gap['mean']:.2f} [{gap['low']:.2f}, {gap['high']:.2f}], in "
        f"{seconds[closest]:.2f} times one model's time."
    )
    least = -below[ours[0]]["high"]
    return (
        "**No significant difference from exact AFA**: the fastest such row is "
        f"*{ours[0]}*, {seconds[ours[0]]:.2f} times one model's time. {of_rivals} This does not "
        f"show equality: *{ours[0]}* was selected from {len(below)} rows after the measurement, "
        f"and its interval extends to {least:+.3f}."
    )


def _app(results: list[dict[str, Any]]) -> str:
    rows = [
        [row["until"], f"{row['seconds']:.1f} [{row['low']:.1f}, {row['high']:.1f}]"]
        for row in results
    ]
    return as_table(["until", f"seconds: median and range of {results[0]['num_rounds']}"], rows)


def _gpu(results: list[dict[str, Any]]) -> str:
    rows = [row for entry in results for row in entry["results"] if "ratios" in row]
    shapes = list(rows[0]["floors"])
    head = ["model", "pixels", "experts", "mode", "experts' ms", "mean"]
    for shape in shapes:
        head += [shape, "floor"]
    steps = []
    for row in rows:
        cells = [row["size"], str(row["pixels"]), str(row["num_experts"]), row["mode"]]
        cells += [f"{1000 * row['seconds']['experts']:.1f}", _spread(row["ratios"]["mean"])]
        for shape in shapes:
            cells += [_spread(row["ratios"][shape]), f"{row['floors'][shape]:.2f}"]
        steps.append(cells)
    pictures = [
        [
            row["size"],
            str(row["pixels"]),
            row["way"],
            f"{row['seconds']:.2f}",
            _spread(row["ratio"]),
            f"{row['memory'] / 1e9:.2f}",
        ]
        for entry in results
        if entry["job"]["part"] == "pictures"
        for row in entry["results"]
    ]
    drawn = ["model", "pixels", "mode", "seconds per picture"]
    drawn += ["relative to one model", "peak memory, GB"]
    return f"{as_table(head, steps)}\n\n{as_table(drawn, pictures)}"


def record_gpu(file: Path) -> None:
    """Put the measurements of `benchmarks.gpu` on the page; each entry has its own origin."""
    entries = json.loads(file.read_text())
    origin = {
        key: "; ".join(dict.fromkeys(entry[key] for entry in entries))
        for key in ("commit", "date", "machine", "software")
    }
    kept = {**committed(), "gpu": {**origin, "results": entries}}
    write_atomic(FILE, json.dumps(kept, indent=1) + "\n")
    write_page()


def _training(results: list[dict[str, Any]]) -> str:
    rows = [
        [
            row["mode"],
            f"{row['seconds_per_step']:.3g}",
            _spread(row["ratio"]),
            f"{row['peak'] / 1e9:.2f}",
            f"{row['above_loaded'] / 1e9:.2f}",
        ]
        for row in results
    ]
    head = ["mode", "seconds per step", "relative to the plain loop", "peak memory, GB"]
    return as_table([*head, "peak minus loaded models, GB"], rows)


def _streaming(results: list[dict[str, Any]]) -> str:
    rows = [
        [
            row["way"],
            f"{row['memory'] / 1e9:.2f}",
            f"{row['memory_ratio']:.2f}",
            f"{row['seconds']:.1f}",
            f"{row['time_ratio']:.2f}",
        ]
        for row in results
    ]
    head = ["", "peak memory, GB", "relative to one model", "seconds per picture"]
    return as_table([*head, "relative to experts in memory"], rows)


def _scaling(results: list[dict[str, Any]]) -> str:
    rows = [
        [
            row["size"],
            str(row["num_experts"]),
            str(row["num_processes"]),
            f"{row['alone']:.2f}",
            f"{row['measured']:.2f}",
            f"{row['alone'] / row['measured']:.2f}",
            f"{row['alone'] / row['modelled']:.2f}",
            *(f"{row['parts'][part]:.2f}" for part in ("experts", "aggregators", "exchange")),
            f"{row['parts']['megabytes']:.0f}",
        ]
        for row in results
    ]
    head = ["widths", "experts", "processes", "seconds, one process", "seconds, all processes"]
    head += ["speedup", "predicted speedup", "experts, s", "aggregators, s", "exchange, s"]
    head += ["sent, MB"]
    return as_table(head, rows)


def _startup(results: list[dict[str, Any]]) -> str:
    rows = [[row["start"], f"{row['seconds']:.2f}", _spread(row["ratio"])] for row in results]
    return as_table(["until", "seconds", "relative to the libraries alone"], rows)


def _distilling(results: list[dict[str, Any]]) -> str:
    rows = [
        [
            row["what"],
            *(f"{v:.3f}" for k, v in row.items() if k.startswith("seconds_")),
            _spread(row["ratio"]),
        ]
        for row in results
    ]
    return as_table(["", "seconds", "seconds of the other", "ratio"], rows)


def _drafting(results: list[dict[str, Any]]) -> str:
    rows = [
        [
            row["what"],
            *(f"{row['calls'][name]:.0f}" for name in ("drafts", "aggregators", "expert")),
            _spread(row["ratio"]),
            _spread(row["to_expert"]),
        ]
        for row in results
    ]
    return as_table(
        ["", "calls", "of the other", "of one expert", "ratio", "aggregators / one expert"], rows
    )


def _hashing(results: list[dict[str, Any]]) -> str:
    rows = [
        [row["start"], f"{row['seconds']:.2f}", f"{row['bytes_read'] / 1e6:.3f}"] for row in results
    ]
    return as_table(["start", "seconds", "read, MB"], rows)


def _size(results: list[dict[str, Any]]) -> str:
    rows = [
        [row["part"], str(row["distributions"]), f"{row['bytes'] / 1e6:.1f}"] for row in results
    ]
    return as_table(["", "distributions", "MB"], rows)
