"""docs/benchmarks.json, and docs/benchmarks.md from it."""

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

Written by `make bench`; the figures are in [benchmarks.json](benchmarks.json). Everything that is
compared took turns within one run; ratios are medians over the rounds of the ratio within a round,
with the middle half of the rounds in brackets. Seconds are the named machine's. Ratios differ
between machines, too: compare [a step](#a-step) with [the same on a GPU](#on-a-gpu).
"""


def committed() -> dict[str, Any]:
    """What was measured before, by part."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def record(part: str, results: Any) -> None:
    """Put what was measured just now in the place of what was before, and write the page anew."""
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
    """Write the page of what was measured."""
    write_atomic(DOCS / "benchmarks.md", as_page(committed()))


def as_page(kept: dict[str, Any]) -> str:
    """The whole page."""
    sections = [
        _INTRO,
        _section("A step", _STEP, kept.get("step"), _step),
        _section("A picture", _PICTURE, kept.get("picture"), _picture),
        _section("Speed against quality", _STUDY, kept.get("study"), _speeds),
        _section("The shape of the aggregators", _SHAPES, kept.get("aggregators"), _study),
        _section("Streamed experts", _STREAMING, kept.get("streaming"), _streaming),
        _section("Experts spread over processes", _SCALING, kept.get("scaling"), _scaling),
        _section("Training", _TRAINING, kept.get("training"), _training),
        _section("Starting", _STARTUP, kept.get("startup"), _startup),
        _section("Hashes of the experts", _HASHING, kept.get("hashing"), _hashing),
        _section("Installing", _SIZE, kept.get("size"), _size),
        _section("The page", _APP, kept.get("app"), _app),
        _section("On a GPU", _GPU, kept.get("gpu"), _gpu),
    ]
    return "\n".join(sections)


_STEP = """One call of the denoiser on a batch of 2, against its experts one after another, each by
the library's own forward pass. *Mean* fuses with the uniform mean: what the shell itself costs. The
*floor* is the ratio of operation counts (convolutions, matrix products, attention) with the keys
and values of the prompt at hand, as they are from the second step on; the experts alone compute
theirs. It is a ratio of counts, not of times: a step lies below it where the operations of the
aggregators are the quicker ones, above it where what is not counted, such as exponentials, weighs
more. *Share* is the aggregators' part of the step's time. Random weights; one thing at a time is
changed from three experts, 32x32 latents, float32. *Compiled*: experts and ensemble both,
`compile_repeated_blocks()`."""
_PICTURE = """The zoo's models, 20 DDIM steps, guidance 3, in batches of 16 with one thread: text
encoder and autoencoder included. Ratios are to one model at the exact speed."""
_STUDY = """`python -m benchmarks.acceleration_study WORK`: the zoo, 96 mixed prompts, three seeds
of training. Prompts are of held-out pairs, by another seed than the test of
[results.md](results.md), but they are not apart from it: 9 of the 96 are the same, and 35 of their
53 pairs of objects. The presets were chosen on these prompts. *Minus exact AFA* has a paired 95 %
interval. No model tuned on the aggregators' data is among the rows. For the time, each took turns
with the exact base in drawing a batch of 8 on one thread. The settings *threshold*, *line* and
*guidance until* no longer exist; their rows are why."""
_SHAPES = """`python -m benchmarks.aggregator_study WORK`: the same prompts and seeds."""
_STREAMING = """Pictures of 256 pixels by models of Stable Diffusion 1.5's size with random weights,
four steps with guidance, a process each; peaks are without the imports'. `stream_experts` keeps
the experts' layers in a file and reads the next while one runs; the system's cache of that file is
nobody's memory, and on this machine the file fits into it."""
_SCALING = """Every process computes experts of its own and all exchange features at every site
(`spread_experts`): one thread each, gloo, batches of 2 at 32x32 latents, the default aggregators.
The model adds up what was measured by itself in these processes: the forward passes of the experts
of one, the aggregators, which all run, and sending the features. *Sent* is what a process sends for
one expert in a step; a link of 25 GB/s would take 1 ms for 25 MB."""
_TRAINING = """Batches of 16 on the zoo; see docs/training.md for what the switches are for."""
_STARTUP = """Each start is a process of its own, with the files in the system's cache."""
_HASHING = """Three sparse files of 2 GB each are described as by `afa inspect`; each start is a
process of its own, with an empty cache before the first. *Read*: bytes by system calls."""
_SIZE = """The files of each distribution on disk, compiled modules included; an extra is what it
adds to the core, and to the extras that it includes. [Licences](licences.md) names them all."""
_APP = """`afa app` with the shipped ensemble, in a process of its own, with Chromium beside it on
the same cores; 20 steps. The imports of torch and the libraries are most of the first row."""
_GPU = """`python -m benchmarks.gpu OUT.json`: the widths of Stable Diffusion 1.5, XL and Flux in
bfloat16, random weights; batches of 2 (Flux: 1), the latents of the pictures' size. *plain*: as
they are. *graphs*: a step of the ensemble (`afa.accelerate(pipeline, cuda_graphs=True)`), and the
forward pass of every expert, are CUDA graphs, so that nothing waits for Python. Ratios are to the
experts' forward passes in the same way, one after another. Pictures: 20 steps, guidance 7.5 (Flux:
3.5), the autoencoder included, text encoders not; *peak* is the pipeline's own weights and what a
call adds. A merge costs what one model does."""


def quality_cells(report: dict[str, Any], subject: str) -> dict[str, list[str]]:
    """By method of a report: its right mixed pictures, and the difference to a subject's.

    The difference is empty where it is the subject itself.
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
    """Rows of text as Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _spread(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f} [{spread['low']:.2f}, {spread['high']:.2f}]"


def _step(results: list[dict[str, Any]]) -> str:
    shapes = list(results[0]["floors"])
    head = ["widths", "experts", "latents", "type", "experts' seconds", "mean"]
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
    return as_table(["drawn by", "speed", "seconds a picture", "by one model's", "peak, GB"], rows)


def _study(results: dict[str, Any]) -> str:
    return results["table"]


def _speeds(results: dict[str, Any]) -> str:
    return f"""{results["table"]}

{_not_told_apart(results)}

With other numbers of steps, on a third of the prompts: right pictures, and the time by that of the
exact ensemble. The presets go by how far the latent has moved; an interval that does for 20 steps
is too long for few.

{results["curve"]}

![Right pictures against time: how far each setting goes.](images/benchmarks-speed.png)

The same prompts and noise at several speeds:

![Pictures at several speeds, by row.](images/benchmarks-pictures.png)"""


def _not_told_apart(results: dict[str, Any]) -> str:
    """The quickest row that is not told apart from the exact ensemble, of it and of the rivals."""
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
        f"of the others it is *{rivals[0]}*, {seconds[rivals[0]]:.2f} times."
        if rivals
        else "none of the others comes as near at any of these speeds. The closest of them is "
        f"*{closest}*: {gap['mean']:.2f} [{gap['low']:.2f}, {gap['high']:.2f}] below in "
        f"{seconds[closest]:.2f} of the time."
    )
    least = -below[ours[0]]["high"]
    return (
        "**Not told apart**: the quickest row that is not told apart from exact AFA is "
        f"*{ours[0]}*, {seconds[ours[0]]:.2f} times one model's time; {of_rivals} That is not "
        f"equality: *{ours[0]}* was picked from {len(below)} rows after the fact, and its interval "
        f"reaches to {least:+.3f}."
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
    head = ["widths", "pixels", "experts", "way", "experts' ms", "mean"]
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
    drawn = ["widths", "pixels", "drawn by", "seconds a picture", "by one model's", "peak, GB"]
    return f"{as_table(head, steps)}\n\n{as_table(drawn, pictures)}"


def record_gpu(file: Path) -> None:
    """Put what `benchmarks.gpu` measured on the page; every entry says where and when."""
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
    head = ["mode", "seconds a step", "by the plain loop's", "peak, GB", "above what is loaded, GB"]
    return as_table(head, rows)


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
    head = ["", "peak, GB", "by one model's", "seconds a picture", "by that of experts in memory"]
    return as_table(head, rows)


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
    head = ["widths", "experts", "processes", "seconds by one", "by all", "faster", "by the model"]
    head += ["of it experts", "aggregators", "exchange", "sent, MB"]
    return as_table(head, rows)


def _startup(results: list[dict[str, Any]]) -> str:
    rows = [[row["start"], f"{row['seconds']:.2f}", _spread(row["ratio"])] for row in results]
    return as_table(["until", "seconds", "by the libraries' alone"], rows)


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
