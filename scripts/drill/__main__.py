"""Inject kills, damaged files, bad command lines and calls, payloads and disagreeing ranks; count faults handled.

    python -m scripts.drill                          # everything: minutes
    python -m scripts.drill --section payloads kills
    python -m scripts.drill --quick                  # a few faults of each kind

Each fault is injected in a forked process, into runs of seconds in a temporary folder. The exit status is 1 if any was
not handled.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: forks are safe in a process of one thread

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common import UserError, one_line, progress
from common.figure import markdown
from common.guard import main_guard
from common.options import parse_options
from common.whole import write_json

NAMES = ("kills", "corruptions", "command_lines", "calls", "payloads", "ranks")


@dataclass(frozen=True)
class Options:
    section: tuple[Literal["kills", "corruptions", "command_lines", "calls", "payloads", "ranks"], ...] = NAMES
    """Kinds of faults to try."""
    quick: bool = False
    """A few faults of each kind."""
    record: Path | None = None
    """Also write the results here, as JSON; keeps sections that are not tried."""
    again: bool = False
    """Only the faults that fell short in --record, which is updated."""


def main() -> None:
    options = parse_options(Options, "python -m scripts.drill", __doc__)
    from scripts.drill import calls, command_lines, corruptions, kills, payloads, ranks
    from scripts.drill.harness import preload
    from scripts.drill.runs import Runs

    modules = dict(zip(NAMES, (kills, corruptions, command_lines, calls, payloads, ranks), strict=True))
    record = options.record and options.record.absolute()
    results = json.loads(record.read_text()) if record and record.exists() else {}
    with tempfile.TemporaryDirectory(prefix="drill-") as folder:
        os.chdir(folder)  # programs write to the current folder by default
        os.environ |= {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
        preload()
        runs = Runs(Path(folder))
        for name in options.section:
            module = modules[name]
            before = results.get(name, {}).get("short", {}) if options.again else None
            tried, short = 0, {}
            with progress(desc=name) as bar:
                for case, attempt in module.cases(runs, options.quick):
                    tried += 1
                    if before is not None and case not in before:
                        continue
                    if reason := _tried(attempt):
                        short[case] = reason
                        bar.write(f"fell short: {name}: {case}: {reason}")
                    bar.update()
            results[name] = {"about": module.__doc__.splitlines()[0], "tried": tried, "short": short}
            if record:
                write_json(record, results, indent=1)
    counts = {r["about"]: (r["tried"], r["tried"] - len(r["short"]), len(r["short"])) for r in results.values()}
    rows = [[about, *map(str, numbers)] for about, numbers in counts.items()]
    print(markdown(["faults", "tried", "held", "fell short"], rows))
    if short := sum(len(result["short"]) for result in results.values()):
        raise UserError(f"{short} of {sum(result['tried'] for result in results.values())} faults fell short")


def _tried(attempt: Callable[[], str | None]) -> str | None:
    """Try a fault; a failure of the drill itself also falls short."""
    try:
        return attempt()
    except Exception as error:
        return f"not tried: {type(error).__name__}: {one_line(error)[:200]}"


if __name__ == "__main__":
    main_guard(main)
