"""Whether lmms-eval gets the answers that `sparsight eval` gets: the same folders, the same samples, three roads.

Both demo models, 70 % of zeros by Wanda, 50 samples of digit scenes, questions and captions. The commands are those of
docs/guides/other-benchmarks.md, in its order. lmms-eval and `transformers serve` lie in environments of their own, as that
guide says; `--lmms` and `--serve` are the folders with their commands. Where torchvision does not fit torch's build for the
CPU, the schemas of its missing operators are declared first. Bar: all answers equal.

    python benchmarks/peers/lmms_eval.py --lmms lmms/bin --serve serve/bin
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from sparsight.reporting.runs import read_runs

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "other-benchmarks.md"
SCHEMAS = """import torch
for name in ("nms", "qnms"):
    torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
SECONDS = 600


def commands(kind: str) -> list[list[str]]:
    """The commands of the guide's blocks of a kind, without the prompt of a console."""
    blocks = re.findall(rf"^```{kind}\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [shlex.split(line.removeprefix("$ ")) for block in blocks for line in block.splitlines()]


def call(words: list[str], folder: Path, environment: Mapping[str, str]) -> tuple[float, str]:
    """Run a command to its end; give its seconds, and the end of what it said."""
    began = time.perf_counter()
    done = subprocess.run(words, cwd=folder, env=dict(environment), capture_output=True, text=True, timeout=SECONDS)
    print(shlex.join(words), flush=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return time.perf_counter() - began, done.stderr[-3000:]


def wait_for(url: str, server: subprocess.Popen) -> None:
    """Wait until a server answers."""
    for _ in range(SECONDS):
        if server.poll() is not None:
            sys.exit(f"the server ended with exit code {server.returncode}")
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(1)
    sys.exit("the server does not answer")


def schemas_for(lmms: Path, folder: Path) -> dict[str, str]:
    """Settings of the environment in which torchvision can be imported there."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub"), "PYTHONPATH": ""}
    probe = [str(lmms / "python"), "-c", "import torchvision"]
    if subprocess.run(probe, env=environment, capture_output=True).returncode:
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(SCHEMAS)
        environment["PYTHONPATH"] = str(folder / "site")
    return environment


def row_of(folder: Path, model: str, log: Path, road: str, seconds: float) -> dict[str, object]:
    """Compare the answers of a log with those on record in the folder of its model."""
    ours, theirs = read_runs([folder / model, log])
    if ours.samples_key != theirs.samples_key:
        sys.exit(f"{log}: holds other samples than {model}")
    pairs = list(zip(ours.predictions, theirs.predictions, strict=True))
    facts = json.loads(log.with_name(log.name.partition("_samples_")[0] + "_results.json").read_text())
    value = next(iter(facts["results"].values()))["exact_match,none"]
    equal = sum(a["prediction"] == b["prediction"] for a, b in pairs)
    return {
        "road": road, "model": model, "samples": len(pairs), "equal": equal,
        "exact_match": sum(a["scores"]["exact_match"] for a, _ in pairs) / len(pairs), "exact_match_lmms_eval": value,
        "seconds_lmms_eval": round(seconds, 1),
    }  # fmt: skip


def main() -> None:
    """Run every command of the guide, and write how many answers are equal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lmms", type=Path, required=True, help="folder with lmms-eval's commands")
    parser.add_argument("--serve", type=Path, help="folder with the command transformers; without it nothing is served")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--machine", default=f"{os.cpu_count()} CPU cores")
    settings = parser.parse_args()
    lmms, serve = (None if path is None else Path.cwd() / path for path in (settings.lmms, settings.serve))
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        environment = schemas_for(lmms, folder)
        for words in commands("bash"):
            call([sys.executable, "-m", *words, "--quiet"], folder, os.environ)
        server = None
        try:
            for words in commands("console"):
                if words[:2] == ["transformers", "serve"] and serve:
                    server = subprocess.Popen(
                        [str(serve / words[0]), *words[1:]], cwd=folder, env={**environment, "PYTHONPATH": ""},
                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                    )  # fmt: skip
                    wait_for(f"http://127.0.0.1:{words[words.index('--port') + 1]}/health", server)
                elif words[0] == "lmms-eval" and (server or "openai" not in words):
                    seconds, said = call([str(lmms / words[0]), *words[1:]], folder, environment)
                    logs = folder / words[words.index("--output_path") + 1]
                    model = re.search(r"(?:pretrained|model_version)=([^,\s]+)", " ".join(words))[1]
                    log = next(logs.glob(f"*{model}/*_samples_*.jsonl"), None)
                    if log is None:
                        sys.exit(f"{shlex.join(words)}: wrote no log of samples\n{said}")
                    road = words[words.index("--model") + 1]
                    rows.append(row_of(folder, model, log, road, seconds))
                    print(rows[-1], flush=True)
        finally:
            if server is not None:
                server.terminate()
                server.wait()
    date = datetime.date.today().isoformat()
    with settings.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=["date", "machine", *rows[0]], lineterminator="\n")
        writer.writeheader()
        writer.writerows({"date": date, "machine": settings.machine, **row} for row in rows)
    if any(row["equal"] != row["samples"] for row in rows):
        sys.exit("some answers differ")


if __name__ == "__main__":
    main()
