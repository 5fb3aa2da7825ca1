"""An environment for each peer, made from the package index once and kept."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = ROOT / "constraints.txt"
_MARK = "made-of.json"
"""File that says of what an environment was made; it is written last."""


@dataclass(frozen=True)
class Peer:
    """A library beside hedgerow, and the script that does the same work with it."""

    title: str
    script: str
    requirements: tuple[str, ...]
    """What pip is to install, beside what all peers need."""
    shows: str
    """Distribution whose version stands in the table."""
    own_versions: tuple[str, ...] = ()
    """Packages of constraints.txt of which it needs another version."""


class NotInstalled(Exception):
    """A peer's environment could not be made; says why in a sentence."""


_ALL = ("torch", "transformers", "peft", "safetensors", "numpy")
"""What does the work itself, in the versions of constraints.txt, the same for all peers."""

OURS = "hedgerow"
PEERS = {
    "torch_loop": Peer("bare torch loop", "torch_loop.py", (), "torch"),
    "hf_trainer": Peer("transformers' Trainer", "hf_trainer.py", ("accelerate",), "transformers"),
    "trl_sft": Peer("TRL's SFTTrainer", "trl_sft.py", ("trl",), "trl"),
    "pfl_research": Peer(
        "pfl-research",
        "pfl_research.py",
        ("pfl[pytorch]==0.6.*",),
        "pfl",
        ("dp-accounting", "absl-py"),
    ),
    "flower": Peer("Flower's FedAvg", "flower.py", ("flwr[simulation]",), "flwr"),
    "nvflare_simulator": Peer(
        "NVFlare's simulator", "nvflare_simulator.py", ("nvflare==2.9.*",), "nvflare"
    ),
}
_ALL_OF_THEM = {OURS: Peer(OURS, "", ("--editable", str(ROOT)), OURS)} | PEERS


def python_of(name: str, folder: Path) -> Path:
    """The interpreter of a peer's environment, which is made where it is missing or out of date.

    Raises:
        NotInstalled: pip cannot install the peer.
    """
    peer, place = _ALL_OF_THEM[name], folder / name
    pins = _without(CONSTRAINTS.read_text(), peer.own_versions)
    made_of = {
        "python": sys.version,
        "requirements": [*_ALL, *peer.requirements],
        "constraints": hashlib.sha256(pins.encode()).hexdigest(),
    }
    python, mark = place / "bin" / "python", place / _MARK
    if mark.is_file() and json.loads(mark.read_text()) == made_of:
        return python
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    (folder / ".gitignore").write_text("*\n")
    constraints = place / "constraints.txt"
    constraints.write_text(pins)
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    command = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(constraints)]
    done = subprocess.run(
        [*command, *made_of["requirements"]], stderr=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = errors[0].removeprefix("ERROR: ") if errors else "pip says no reason"
        raise NotInstalled(f"{peer.title} does not install here: {reason}")
    mark.write_text(json.dumps(made_of))
    return python


def version_of(name: str, folder: Path) -> str:
    """The version of a peer in its environment."""
    code = f"import importlib.metadata as m; print(m.version({_ALL_OF_THEM[name].shows!r}))"
    python = folder / name / "bin" / "python"
    return subprocess.run(
        [str(python), "-c", code], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.strip()


def _without(pins: str, names: tuple[str, ...]) -> str:
    """The text of a constraints file without the lines of some packages."""
    lines = pins.splitlines(keepends=True)
    return "".join(line for line in lines if re.split("[=<>~!]", line)[0] not in names)
