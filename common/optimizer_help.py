"""The options of every rule for --help, read from the source of `optimizers`: importing it would import torch."""

import ast
import re
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "optimizers"
SET_ELSEWHERE = ("params", "lr", "weight_decay", "qkv_split", "qkv_dim", "as_matrices", "process_group")


@cache
def options_help() -> str:
    """Return every option of the optimizer classes with its line of documentation, one paragraph each."""
    classes = dict(sorted(_classes().items()))
    described: dict[tuple[str, str], list[str]] = {}
    for name, (options, docs) in classes.items():
        for option in options:
            # "Others: as in `OLion`"
            doc = docs.get(option) or next((d[option] for _, d in classes.values() if option in d), "")
            described.setdefault((option, doc), []).append(name)
    lines = [f"{option} ({', '.join(names)}): {doc}" for (option, doc), names in sorted(described.items())]
    return "\n\n".join(["Options of the rule, each as --optimizer.options.NAME VALUE, written as in TOML:", *lines])


def option_names() -> list[str]:
    """Return the name of every option of the optimizer classes."""
    return sorted({option for options, _ in _classes().values() for option in options})


def rule_names() -> tuple[str, ...]:
    """Return the names of the rules that a class of `optimizers` declares the options of."""
    return tuple(sorted(_classes()))


@cache
def _classes() -> dict[str, tuple[list[str], dict[str, str]]]:
    """Return {rule: (options, {option: documentation})} of the classes that declare a rule's options."""
    found = {}
    for path in FOLDER.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        for node in ast.parse(text).body if "declared_by(" in text else ():
            if isinstance(node, ast.ClassDef) and [ast.unparse(base) for base in node.bases] == ["RuleOptimizer"]:
                (start,) = (each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__")
                options = [each.arg for each in start.args.args[1:] if each.arg not in SET_ELSEWHERE]
                found[node.name.lower()] = options, _docs_in(ast.get_docstring(node) or "")
    return found


def _docs_in(docstring: str) -> dict[str, str]:
    """Return the text of each argument under "Args:"; "a, b: text" documents both."""
    section = re.search(r"^Args:\n(.*?)(?=\n\S|\Z)", docstring, re.S | re.M)
    docs: dict[str, str] = {}
    for entry in re.findall(r"^ {4}(\S.*(?:\n {5,}.*)*)", section[1] if section else "", re.M):
        names, _, text = entry.partition(":")
        docs |= {name.strip(): " ".join(text.split()) for name in names.split(",")}
    return docs
