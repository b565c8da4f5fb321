"""A corpus and a GPT that train in seconds."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """
log_every = 1
wandb = "disabled"
device = "cpu"
[model]
n_layer = 2
n_head = 2
n_embd = 32
context = 32
vocab_size = 0
[data]
folder = "{corpus}"
[optimizer]
lr = 4e-3
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
    text, corpus = folder / "text.txt", folder / "tokens"
    text.write_text("\n".join(f"def f{i}(x): return x * {i} + {i * i % 97}" for i in range(2000)))
    command = [sys.executable, "-m", "nanoGPT.prepare", str(text), "--out", str(corpus)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return corpus


def write_config(folder: Path, corpus: Path, differing: str) -> Path:
    """Write a config in this folder: the one above, and what a test has otherwise (TOML); returns its path."""
    (folder / "base.toml").write_text(CONFIG.format(corpus=corpus))
    path = folder / "tiny.toml"
    path.write_text(f'extends = "base.toml"\n{differing}')
    return path
