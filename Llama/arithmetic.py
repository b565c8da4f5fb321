"""Generate arithmetic word problems with answers: small instruction data to fine-tune the small Llama on.

    python -m Llama.arithmetic --out data/llama_arithmetic

No validation problem is in the training set, but its numbers may be, with another name, thing or wording: a model of
this size does not learn in minutes to compute with unseen numbers. The folder holds train.jsonl and val.jsonl, with
{"instruction": ..., "output": ...} per line; the output is the equation: "7 + 12 = 19".
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from common import BadValue
from common.guard import main_guard
from common.options import parse_options
from common.whole import locked, written_aside

FOLDER = Path("data/llama_arithmetic")
MOST = 1_000_000  # problems per file
NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo")
THINGS = ("books", "cards", "coins", "files", "keys", "lines", "maps", "pages")


@dataclass(frozen=True)
class Kind:
    """A kind of problem: its numbers, alternative questions, and the equation that answers them."""

    numbers: list[tuple[int, int]]
    questions: tuple[str, ...]
    answer: Callable[[int, int], str]


SMALL, LARGE = range(2, 10), range(2, 13)
KINDS = (
    Kind(
        [*product(LARGE, LARGE)],
        (
            "{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?",
            "There are {a} {things} in one box and {b} in another. How many {things} are there?",
        ),
        lambda a, b: f"{a} + {b} = {a + b}",
    ),
    Kind(
        [(a, b) for a, b in product(LARGE, LARGE) if a >= b],
        (
            "{name} has {a} {things} and loses {b}. How many {things} are left?",
            "{name} has {a} {things} and {other} has {b}. How many more {things} does {name} have?",
        ),
        lambda a, b: f"{a} - {b} = {a - b}",
    ),
    Kind(
        [*product(SMALL, SMALL)],
        (
            "{name} has {a} boxes with {b} {things} in each. How many {things} are there?",
            "Each of {a} days {name} makes {b} {things}. How many {things} does {name} make?",
        ),
        lambda a, b: f"{a} * {b} = {a * b}",
    ),
)


@dataclass(frozen=True)
class Options:
    out: Path = FOLDER
    """Folder to write; an existing one is kept."""
    train: int = 8192
    """Number of training problems."""
    val: int = 512
    """Number of validation problems."""
    seed: int = 0


def problems(count: int, seed: int) -> list[dict[str, str]]:
    """Draw distinct problems."""
    draw = random.Random(seed)
    found: dict[str, str] = {}
    repeated = 0  # draws since the last new problem
    while repeated < 1000:
        kind = draw.choice(KINDS)
        a, b = draw.choice(kind.numbers)
        name, other = draw.sample(NAMES, 2)
        question = draw.choice(kind.questions).format(name=name, other=other, things=draw.choice(THINGS), a=a, b=b)
        repeated = repeated + 1 if question in found else 0
        found[question] = kind.answer(a, b)
        if len(found) == count:
            return [{"instruction": question, "output": answer} for question, answer in found.items()]
    raise BadValue(f"need {count} different problems, there are about {len(found)}: lower --train or --val")


def make(options: Options) -> Path:
    """Write the two files unless the folder exists; returns it. Raises ValueError for counts out of range."""
    for name in ("train", "val"):
        if not 1 <= (count := getattr(options, name)) <= MOST:
            raise BadValue(f"--{name} must be 1 to {MOST} problems, got {count}")
    if options.seed < 0:
        raise BadValue(f"--seed must be 0 or more, got {options.seed}")
    with locked(options.out):
        if options.out.exists():
            print(f"{options.out} exists")
            return options.out
        drawn = problems(options.train + options.val, options.seed)
        with written_aside(options.out) as partial:
            for name, part in (("train", drawn[: options.train]), ("val", drawn[options.train :])):
                (partial / f"{name}.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in part))
    print(f"{options.out}: {options.train:,} problems for training, {options.val:,} for validation")
    return options.out


def main() -> None:
    make(parse_options(Options, "python -m Llama.arithmetic", __doc__))


if __name__ == "__main__":
    main_guard(main)
