"""The documents: their Python runs; the commands, options, links and files that they name exist."""

import dataclasses
import importlib
import importlib.util
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import optimizers
from optimizers.rule import RULES

ROOT = Path(__file__).resolve().parents[1]
HOMES = {"examples", "scripts", "tests", "optimizers", "common", "nanoGPT", "Llama", "SIT", "images"}
PATHS = [*ROOT.glob("*.md"), *(path for path in ROOT.glob("*/*.md") if path.parent.name in HOMES)]
DOCUMENTS = {str(path.relative_to(ROOT)): path.read_text() for path in PATHS}


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.blocks = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
        self.head = nn.Linear(8, 16, bias=False)

    def forward(self, tokens):
        return self.head(self.blocks(self.embedding(tokens)))


@pytest.fixture
def group(tmp_path):
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def blocks(language, text):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_every_python_block_of_every_document_trains_a_model(group):
    ran = 0
    before = set(RULES)
    try:
        for document, text in DOCUMENTS.items():
            for block in blocks("python", text):
                torch.manual_seed(0)
                model = Tiny()
                scope = {"model": model, "matrices": list(model.blocks.parameters()), "group": group}
                exec(compile(block, document, "exec"), scope)
                losses = []
                for _ in range(20):
                    loss = nn.functional.cross_entropy(model(torch.arange(16)), torch.arange(16))
                    loss.backward()
                    scope["optimizer"].step()
                    model.zero_grad()
                    losses.append(loss.item())
                assert losses[-1] < losses[0], (document, block)
                ran += 1
    finally:
        for added in set(RULES) - before:
            RULES.pop(added)
    assert ran >= 3


def commands(text):
    """Command lines of the bash blocks and of inline code, as words without comments and settings before them."""
    inline = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    lines = [line for block in blocks("bash", text) for line in block.splitlines()] + inline
    for line in lines:
        settings = r"([A-Z_]+=\S+ |[A-Z_]+=\"[^\"]*\" )*"
        if re.match(settings + "(bash|python -m|torchrun|accelerate launch) ", " ".join(line.split())):
            words = shlex.split(line, comments=True)
            while re.match(r"[A-Z_]+=", words[0]):
                words.pop(0)
            yield words


def options_of(module):
    """The dotted options of a module's command line, by its dataclass of that purpose; None where it has another."""
    for name in ("Options", "Config"):
        if dataclasses.is_dataclass(held := getattr(importlib.import_module(module), name, None)):
            return set(names_of(held))
    return None


def names_of(config, prefix=""):
    for field in dataclasses.fields(config):
        yield prefix + {"settings": "set"}.get(field.name, field.name)
        if dataclasses.is_dataclass(held := field.type):  # inherited fields too
            yield from names_of(held, f"{prefix}{field.name}.")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_names_existing_programs_options_and_files(document):
    for words in commands(DOCUMENTS[document]):
        line = " ".join(words)
        if words[0] == "bash":
            assert (ROOT / words[1]).is_file(), line
        for module in (after for word, after in pairwise(words) if word == "-m" and after.split(".")[0] in HOMES):
            assert importlib.util.find_spec(module), line
        for word in words[1:]:
            if word.endswith(".toml"):
                assert (ROOT / word).is_file(), line
        given = [word[2:].replace("-", "_") for word in words if word.startswith("--") and word != "--help"]
        if words[0] == "python" and words[2].startswith(("scripts.", "nanoGPT.train", "SIT.train")) and given:
            known = options_of(words[2])
            of_rules = {f"optimizer.options.{name}" for rule in RULES.values() for name in rule.defaults}
            assert known is None or set(given) <= known | of_rules, line


def anchor(heading):
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_and_path_exists(document):
    text, folder = DOCUMENTS[document], (ROOT / document).parent
    for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
        path, _, part = target.partition("#")
        file = (folder / path).resolve() if path else ROOT / document
        assert file.exists(), target
        if part:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert part in map(anchor, headings), target
    for path in re.findall(r"`([\w./-]+/[\w./-]+\.(?:py|sh|toml|png|json|md))`", text):
        if path.split("/")[0] in HOMES:
            assert (ROOT / path).exists(), path


def test_front_page_is_short_and_stands_alone():
    assert len(DOCUMENTS["README.md"].splitlines()) <= 200
    for document, text in DOCUMENTS.items():
        assert "../shared" not in text and "/work/" not in text, document


def test_every_public_name_exists_and_is_documented():
    for name in optimizers.__all__:
        assert getattr(optimizers, name).__doc__, name
