"""A corpus and a GPT that train in seconds."""

import subprocess
from pathlib import Path

from scripts.drill import tiny
from tests import warm

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """
[optimizer]
adamw_lr = 2e-3
[schedule]
warmup = 3
[eval]
windows = 10
[checkpoint]
every = 4
"""


def write_corpus(folder: Path) -> Path:
    """Prepare a text below this folder; returns the folder of its tokens."""
    text, corpus = tiny.write_text(folder / "text.txt", functions=2000), folder / "tokens"
    command = [warm.python(), "-m", "nanoGPT.prepare", str(text), "--out", str(corpus)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return corpus


def write_config(folder: Path, corpus: Path, differing: str) -> Path:
    """Write a config in this folder: the one above, and what a test has otherwise (TOML); returns its path."""
    return tiny.write_config(folder, "tiny", tiny.GPT.format(corpus=corpus), CONFIG, differing)
