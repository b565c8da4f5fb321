"""A copy of the checkout, as a new user has it, for the tests of the run scripts."""

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def copy_checkout(to: Path, *folders: str) -> Path:
    """Copy these folders of the repository, and requirements.txt, into a folder; returns it."""
    for folder in folders:
        shutil.copytree(ROOT / folder, to / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "requirements.txt", to)
    return to
