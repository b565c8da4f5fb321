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
    described: dict[tuple[str, str], list[str]] = {}
    for name, (options, _) in sorted(_classes().items()):
        for option in options:
            described.setdefault((option, _doc(name, option)), []).append(name)
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
    """Return {rule: (options, {option: documentation})} of the classes that declare a rule's options.

    A rule's name is its class's attribute `rule`.
    """
    found = {}
    for path in FOLDER.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        for node in ast.parse(text).body if "declared_by(" in text else ():
            if isinstance(node, ast.ClassDef) and [ast.unparse(base) for base in node.bases] == ["RuleOptimizer"]:
                (start,) = (each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__")
                options = [each.arg for each in start.args.args[1:] if each.arg not in SET_ELSEWHERE]
                found[_rule_in(node)] = options, _docs_in(ast.get_docstring(node) or "")
    return found


def _rule_in(node: ast.ClassDef) -> str:
    """Return the string that a class assigns to `rule`."""
    assigned = (each for each in node.body if isinstance(each, ast.Assign) and ast.unparse(each.targets[0]) == "rule")
    return next(ast.literal_eval(each.value) for each in assigned)


def _doc(rule: str, option: str) -> str:
    """Return an option's line in the docstring of its class, or of the class named by "Others: as in `OLion`."."""
    _, docs = _classes()[rule]
    if option in docs or "Others" not in docs:
        return docs.get(option, "")
    return _doc(docs["Others"].split("`")[1].lower(), option)


def _docs_in(docstring: str) -> dict[str, str]:
    """Return the text of each argument under "Args:"; "a, b: text" documents both."""
    section = re.search(r"^Args:\n(.*?)(?=\n\S|\Z)", docstring, re.S | re.M)
    docs: dict[str, str] = {}
    for entry in re.findall(r"^ {4}(\S.*(?:\n {5,}.*)*)", section[1] if section else "", re.M):
        names, _, text = entry.partition(":")
        docs |= {name.strip(): " ".join(text.split()) for name in names.split(",")}
    return docs
