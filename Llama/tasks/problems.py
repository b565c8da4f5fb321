"""Problems of this folder's tasks, and their scoring; the .yaml files name these functions."""

import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import datasets

from common import UserError, one_line
from common.text_rows import read_rows
from Llama.arithmetic import FOLDER

EXAMPLES = Path(__file__).with_name("examples.jsonl")
MAMMOTH = "https://raw.githubusercontent.com/TIGER-AI-Lab/MAmmoTH/main/math_eval/dataset/{name}/{name}.json"

# Before a final answer; MathInstruct's responses end with "The answer is ...".
MARK = re.compile(r"answer is:?|\\boxed\{", re.IGNORECASE)
LETTER = re.compile(r"\b[A-E]\b")
NUMBER = re.compile(r"(?<![\d.)])-?(?:\d+/[1-9]\d*|\d*\.?\d+)")


# ---- Problems


def load(name: str, data: str | None = None, plain: bool = False, **_: Any) -> datasets.DatasetDict:
    """Return a task's problems, "test", and worked "examples": each with a "question" and its "solution".

    `data`: a folder with name.jsonl, instead of the source. `plain`: as text to continue, not as a message. lm-eval
    also passes other metadata, which is ignored. Raises UserError if the problems are missing or malformed.
    """
    where = f"{data}/{name}.jsonl" if data else name
    problems = [to_problem(row, f"{where}, problem {i}") for i, row in enumerate(read(name, data), start=1)]
    if not problems:
        raise UserError(f"{where} must hold problems, one per line; it is empty")
    examples = [row for _, row in read_rows(EXAMPLES)]
    if plain:
        for each in (*problems, *examples):
            each["question"] = f"Question: {each['question']}\nAnswer:"
    splits = {"test": problems, "examples": examples}
    return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in splits.items()})


def read(name: str, data: str | None) -> list[Any]:
    """Return the rows of a local file, or of the source."""
    if data or name == "arithmetic_problems":
        path = Path(data) / f"{name}.jsonl" if data else FOLDER / "val.jsonl"
        if not path.is_file():
            remedy = "add it, or unset EVAL_DATA" if data else "run python -m Llama.arithmetic"
            raise UserError(f"{name} needs its problems in {path}, which does not exist: {remedy}")
        return [row for _, row in read_rows(path)]
    try:
        if name == "aqua":
            return datasets.load_dataset("deepmind/aqua_rat", "raw", split="test").to_list()
        file = datasets.DownloadManager().download(MAMMOTH.format(name=name))
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except Exception as error:  # network errors have no narrower common class
        raise UserError(
            f"the problems of {name} are not reachable ({one_line(error)[:100]}): where there is no internet, set "
            f"EVAL_DATA to a folder with {name}.jsonl, or leave {name} out of TASKS"
        ) from error


def to_problem(row: Any, where: str) -> dict[str, str]:
    """Return the question, the answer, and the text that ends a worked example."""
    try:
        if "instruction" in row:  # Llama.arithmetic's
            return {"question": row["instruction"], "answer": row["output"], "solution": row["output"]}
        question, answer = row["question"], row["correct" if "options" in row else "answer"]
        if "options" in row:  # AQuA's "A)21"; asked as in MathInstruct
            question += "\nAnswer Choices: " + " ".join(f"({each[0]}) {each[2:]}" for each in row["options"])
        return {"question": question, "answer": str(answer), "solution": f"The answer is {answer}."}
    except (KeyError, TypeError) as error:
        raise UserError(
            f'{where} must have "question" and "answer", or "question", "options" and "correct", or "instruction" and '
            f'"output"; got {row!r:.60}'
        ) from error


# ---- Answers


def score(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """Return lm-eval's metrics of a response."""
    return {"exact_match": float(is_answer(results[0], doc["answer"]))}


def is_answer(response: str, answer: str) -> bool:
    """Compare a response with an answer: numbers and letters by value, other texts as a whole.

    Example: is_answer("He pays 2 * 617.25. The answer is $1,234.50.", "1234.5") is True.
    """
    if LETTER.fullmatch(answer):
        return final(LETTER, response) == answer
    expected = plain_numbers(answer)
    if not NUMBER.fullmatch(expected):
        return response.strip() == answer.strip()
    found = final(NUMBER, plain_numbers(response))
    if found is None or len(found) > 100:  # repetitive models write numbers too long for Python
        return False
    wanted = Fraction(expected)
    return abs(Fraction(found) - wanted) <= abs(wanted) / 10**9  # sources have 4.300000000000001 for 4.3


def final(pattern: re.Pattern[str], response: str) -> str | None:
    """Return the first match on the line after the last MARK, or without a mark the last match."""
    *before, rest = MARK.split(response)
    if not before:
        return (pattern.findall(response) or [None])[-1]
    line = rest.strip().split("\n")[0].split("=")[-1]  # "x = 3 + 2 = 5"
    return (pattern.findall(line) or [None])[0]


def plain_numbers(text: str) -> str:
    r"""Rewrite $1,234.50 as 1234.50, and \frac{1}{2} as 1/2."""
    text = re.sub(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}", r"\1/\2", text)
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.replace("$", "").replace("\\!", ""))
