"""Llama/eval.sh: lm-eval's scores against transformers' own answers, and its prompts against those of training."""

import json
import os
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkouts import copy_checkout
from transformers import AutoTokenizer, LlamaForCausalLM

pytest.importorskip("lm_eval")

import datasets
import lm_eval.tasks
from lm_eval.models.huggingface import HFLM

from common import UserError
from Llama import evaluate, weights
from Llama.model import FLAVORS, Llama, Shape
from Llama.prepare import Prepare, prepare
from Llama.tasks import problems
from Llama.templates import TEMPLATES
from Llama.tokenizer import Tokenizer, encode

ROOT = Path(__file__).resolve().parents[1]
SHAPE = Shape(dim=32, n_layers=1, n_heads=4, vocab_size=300, max_seq_len=2048, multiple_of=16)
QUESTION = TEMPLATES["question"]


@pytest.fixture(scope="module")
def assets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    (folder / "text").mkdir()
    for i in range(4):
        (folder / f"text/{i}.txt").write_text(f"question {i} has an answer\n" * 20)
    return prepare(Prepare(str(folder / "text"), folder / "tokenizer", vocab_size=280))


@pytest.fixture(scope="module")
def model() -> Llama:
    torch.manual_seed(0)
    model = Llama(SHAPE)
    model.init_weights()
    for param in model.parameters():  # larger than at the start of training, so that answers differ
        param.data = torch.randn_like(param) * 0.5 if param.ndim > 1 else torch.ones_like(param)
    return model


@pytest.fixture
def base(assets, model, tmp_path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    weights.write_hf(folder, model.state_dict(), SHAPE, assets)
    return folder


@pytest.fixture
def tuned(base, tmp_path) -> Path:
    shutil.copytree(base, tmp_path / "tuned")
    (tmp_path / "tuned/chat_template.jinja").write_text(QUESTION.jinja())
    return tmp_path / "tuned"


@pytest.fixture
def only_ours(monkeypatch):
    """Leave out lm-eval's own tasks, whose 10,000 files take seconds to read."""
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))


@pytest.fixture
def sent(monkeypatch) -> list[list[int]]:
    """The tokens of every prompt that a model is given."""
    prompts, generate = [], HFLM._model_generate

    def record(self, context, *args, attention_mask, **settings):
        prompts.extend(row[mask.bool()].tolist() for row, mask in zip(context, attention_mask, strict=True))
        return generate(self, context, *args, attention_mask=attention_mask, **settings)

    monkeypatch.setattr(HFLM, "_model_generate", record)
    return prompts


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def scores_of(monkeypatch, capsys, models: list[Path], tasks: list[str], *more: str) -> dict[str, dict[str, str]]:
    """Run Llama.evaluate and read the table that it ends with."""
    arguments = ["--models", *map(str, models), "--tasks", *tasks, *more]
    monkeypatch.setattr("sys.argv", ["evaluate", *arguments])
    evaluate.main()
    lines = capsys.readouterr().out.splitlines()[-2 - len(models) :]
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {name: dict(zip(header[1:], cells, strict=True)) for name, *cells in rows}


def prompt_tokens(assets: Path, *messages: dict[str, str]) -> list[int]:
    """The tokens before the last response, which Llama.instructions trains a model to continue."""
    conversation = [*messages, {"role": "assistant", "content": "x"}]
    (example,) = encode([conversation], Tokenizer(assets), QUESTION)
    end = (~example.trained).nonzero()[0][-1] + 1
    return example.tokens[:end].tolist()


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


# ---- Scores and prompts


def test_accuracy_matches_the_share_of_answers_that_transformers_gives(
    tuned, assets, tmp_path, monkeypatch, capsys, only_ours, sent
):
    questions = [f"Ada has {i} keys and gets {i + 1} more. How many?" for i in range(6)]
    prompts = [prompt_tokens(assets, user(question)) for question in questions]
    network, tokenizer = LlamaForCausalLM.from_pretrained(tuned), AutoTokenizer.from_pretrained(tuned)
    answers = []
    for prompt in prompts:
        tokens = network.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0]
        answers.append(tokenizer.decode(tokens[len(prompt) :], skip_special_tokens=True))
    assert len(set(answers)) > 1 and all(answer.strip() for answer in answers)
    expected = answers[:3] + [f"{answer} not" for answer in answers[3:]]
    rows = [{"instruction": q, "output": answer} for q, answer in zip(questions, expected, strict=True)]
    write_lines(tmp_path / "data/arithmetic_problems.jsonl", rows)
    write_lines(tmp_path / "data/numglue.jsonl", [{"question": q, "answer": 1234567} for q in questions])
    tasks = ["arithmetic_problems-0", "numglue-0"]
    more = ("--data", str(tmp_path / "data"), "--tokens", "8", "--", "--batch_size", "4")
    found = scores_of(monkeypatch, capsys, [tuned], tasks, *more)
    assert found == {"tuned": {"arithmetic_problems-0": "50.00", "numglue-0": "0.00"}}
    assert sorted(sent) == sorted(prompts * 2)
    (written,) = (tuned / "eval").glob("0-shot_*.json")
    assert json.loads(written.read_text())["results"]["arithmetic_problems"]["exact_match,none"] == 0.5


def test_prompts_with_worked_examples_match_the_conversation_that_training_encodes(
    tuned, base, assets, tmp_path, monkeypatch, capsys, only_ours, sent
):
    write_lines(tmp_path / "data/numglue.jsonl", [{"question": "How much is 2 + 3?", "answer": 5}])
    more = ("--data", str(tmp_path / "data"), "--tokens", "1")
    found = scores_of(monkeypatch, capsys, [tuned, base], ["numglue-4", "numglue-0"], *more)
    assert list(found) == ["tuned", "base"]
    examples = problems.read_lines(problems.EXAMPLES)
    messages, text = [], ""
    for each in examples:
        messages += [user(each["question"]), {"role": "assistant", "content": each["solution"]}]
        text += f"Question: {each['question']}\nAnswer: {each['solution']}\n\n"
    last = "Question: How much is 2 + 3?\nAnswer:"
    tokenizer = Tokenizer(assets)
    assert sent == [
        prompt_tokens(assets, *messages, user("How much is 2 + 3?")),
        prompt_tokens(assets, user("How much is 2 + 3?")),
        tokenizer.encode(text + last, add_bos=True, add_eos=False),
        tokenizer.encode(last, add_bos=True, add_eos=False),
    ]


def test_arithmetic_problems_with_examples_match_a_conversation_about_other_problems(
    tuned, assets, tmp_path, monkeypatch, capsys, only_ours, sent
):
    rows = [{"instruction": f"{i} and 1?", "output": f"{i} + 1 = {i + 1}"} for i in range(2)]
    write_lines(tmp_path / "data/arithmetic_problems.jsonl", rows)
    more = ("--data", str(tmp_path / "data"), "--tokens", "1")
    scores_of(monkeypatch, capsys, [tuned], ["arithmetic_problems-1"], *more)
    turns = [(user(row["instruction"]), {"role": "assistant", "content": row["output"]}) for row in rows]
    expected = [prompt_tokens(assets, *turns[1 - i], turns[i][0]) for i in range(2)]
    assert sorted(sent) == sorted(expected)


def test_each_task_of_the_paper_matches_half_of_the_answers_being_right(tuned, tmp_path, monkeypatch, capsys):
    """lm-eval's own tasks and ours, on rows as the sources have them, and a model that answers as MathInstruct does."""
    answers = {
        "eggs": "She sells 9 eggs for 2 dollars each, 9 * 2 = 18 dollars.\nThe answer is 18.",
        "hens": "There are 3 hens and the answer is 4.",
        "half": r"Since $x=3$, half of it follows. The answer is $\frac{1}{2}$.",
        "third": r"We find $\frac{1}{2}$. The answer is $\frac{1}{4}$.",
        "coins": "2,000 + 300 = 2,300. The answer is $2,300.00.",
        "paths": "The answer is (B).",
        "boats": "x + y = 10 and x - y = 2, so 2x = 12. The answer is x = 6.",
        "trees": "The answer is 7.",
        "speed": "A car needs 2 hours. So the answer is C) 21",
        "price": "The answer is E.",
    }
    of_hub = {
        "openai/gsm8k": [{"question": "eggs?", "answer": "#### 18"}, {"question": "hens?", "answer": "#### 3"}],
        "EleutherAI/hendrycks_math": [
            {"problem": "half?", "solution": r"So $\boxed{\frac12}$."},
            {"problem": "third?", "solution": r"So $\boxed{\frac13}$."},
        ],
        "deepmind/aqua_rat": [
            {"question": "speed?", "options": ["A)19", "B)20", "C)21"], "rationale": "", "correct": "C"},
            {"question": "price?", "options": ["A)1", "B)2", "E)3"], "rationale": "", "correct": "A"},
        ],
    }
    of_mammoth = {
        "numglue": [{"question": "coins?", "answer": 2300, "id": 0}, {"question": "paths?", "answer": "A", "id": 1}],
        "simuleq": [{"question": "boats?", "answer": "6.0", "id": 0}, {"question": "trees?", "answer": 8.5, "id": 1}],
    }

    def load_dataset(path, name=None, split=None, **_):
        rows = datasets.Dataset.from_list(of_hub[path])
        shots = datasets.Dataset.from_list([{**of_hub[path][0], "question": f"{i}"} for i in range(9)])
        return datasets.DatasetDict({"train": shots, "test": rows})[split] if split else {"train": shots, "test": rows}

    def download(self, url):
        name = re.fullmatch(r"https://raw\.githubusercontent\.com/.*/dataset/(\w+)/\1\.json", url)[1]
        (tmp_path / "download").write_text(json.dumps(of_mammoth[name]))
        return str(tmp_path / "download")

    def generate_until(self, requests, **_):
        asked = [max(answers, key=lambda word: request.args[0].rfind(f"{word}?")) for request in requests]
        return [answers[word] for word in asked]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.DownloadManager, "download", download)
    monkeypatch.setattr(HFLM, "generate_until", generate_until)
    index = lm_eval.tasks.TaskManager(include_path=str(evaluate.TASKS))._index  # once, not for each of two runs
    monkeypatch.setattr("lm_eval.tasks._index.TaskIndex.build", lambda *_, **__: index)
    tasks = re.search(r"TASKS:-([^}]+)", (ROOT / "Llama/eval.sh").read_text())[1].split()
    found = scores_of(monkeypatch, capsys, [tuned], tasks)
    paper = ["gsm8k-0", "gsm8k-4", "minerva_math-0", "numglue-0", "numglue-4", "simuleq-0", "aqua-0"]
    assert found == {"tuned": dict.fromkeys(paper, "50.00")}


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("The answer is $1,234.50.", "1234.5", True),
        ("The answer is $1,234.50.", "1234", False),
        ("18", "18", True),
        (" 18.", "18.0", True),
        ("3 and 4, so 12 - 5 = 7", "7", True),
        ("8-3", "3", True),  # 3, not -3
        ("The answer is -3.", "-3", True),
        ("The answer is -3.", "3", False),
        ("The answer is 2 + 3 = 5.", "5", True),
        ("The answer is 5.\nCheck: 5 + 1 = 6", "5", True),
        ("First the answer is 4, but the final answer is: 6", "6", True),
        (r"The answer is \boxed{\frac{3}{4}}.", "0.75", True),
        ("The answer is 3/4", "0.75", True),
        ("It is .5", "1/2", True),
        ("4.3", "4.300000000000001", True),
        ("1234567", "1234568", False),
        ("12 of 1,000,000", "1000000", True),
        ("The answer is", "18", False),
        ("", "18", False),
        ("1" * 5000, "18", False),  # more digits than Python reads
        ("The answer is 3/0", "3", True),
        ("A", "A", True),
        ("A train is late. The answer is (C) 25.", "C", True),
        ("A train is late. The answer is (C) 25.", "A", False),
        ("Not A, and not B; it must be D", "D", True),
        ("The answer is 5", "A", False),
        (" 7 + 12 = 19\n", "7 + 12 = 19", True),
        ("7 + 12 = 19 = 19", "7 + 12 = 19", False),
        ("19", "7 + 12 = 19", False),
    ],
)
def test_is_answer_matches_a_readers_judgement(response, answer, right):
    assert problems.is_answer(response, answer) is right


# ---- Folders


def test_run_is_exported_once_and_again_when_its_checkpoint_is_newer(assets, model, tmp_path, monkeypatch):
    monkeypatch.setitem(FLAVORS["llama2"], "tiny", SHAPE)
    settings = {"model": {"name": "llama2", "flavor": "tiny", "hf_assets_path": str(assets)}}
    settings["training"] = {"dataset": "instructions", "mixed_precision_param": "float32"}
    settings["fine_tuning"] = {"template": "alpaca"}
    run = tmp_path / "olion-lr1e-3-s1"
    dcp.save(model.state_dict(), checkpoint_id=run / "checkpoint/step-3")
    (run / "config.json").write_text(json.dumps({"config": settings}))
    folder = evaluate.hf_folder(run)
    assert folder == run / "exported-step-3" and evaluate.has_template(folder)
    (folder / "mark").touch()
    assert evaluate.hf_folder(run) == folder and (folder / "mark").exists()
    dcp.save({name: weight + 1 for name, weight in model.state_dict().items()}, checkpoint_id=run / "checkpoint/step-4")
    head = LlamaForCausalLM.from_pretrained(evaluate.hf_folder(run)).lm_head.weight
    torch.testing.assert_close(head, model.output.weight + 1, atol=0, rtol=0)  # in the precision of training
    assert evaluate.hf_folder(folder) == folder


# ---- Refusals


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "2?", "answer": 2}\n{"question": "3?"}', r'problem 2 must have "question" and "answer".*got'),
        ("2?", r"numglue.jsonl, row 1 must be JSON, is not"),
        ("", "numglue.jsonl must hold problems, one per line; it is empty"),
        (None, "needs its problems in .*numglue.jsonl, which does not exist: add it, or unset EVAL_DATA"),
    ],
)
def test_problems_refuse_local_files_in_one_line(line, message, tmp_path):
    if line is not None:
        (tmp_path / "numglue.jsonl").write_text(line)
    with pytest.raises(UserError, match=message) as refused:
        problems.load("numglue", str(tmp_path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["numglue", "simuleq", "aqua"])
def test_problems_refuse_a_source_that_cannot_be_reached(name, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/nonexistent")
    with pytest.raises(UserError, match=rf"{name} are not reachable .*set EVAL_DATA to a folder with {name}.jsonl"):
        problems.load(name)


def test_arithmetic_problems_refuse_to_be_read_before_they_are_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"val.jsonl, which does not exist: run python -m Llama.arithmetic"):
        problems.load("arithmetic_problems")


def test_evaluate_refuses_tasks_shots_and_unreachable_data_in_one_line(tuned, tmp_path, monkeypatch, capsys, only_ours):
    write_lines(tmp_path / "data/numglue.jsonl", [{"question": "2?", "answer": 2}])
    data = ("--data", str(tmp_path / "data"))
    for tasks, message in (
        (["numglue"], "TASKS must be like gsm8k-4, a task and its number of worked examples; got 'numglue'"),
        (["nothing-0"], "lm-eval cannot run nothing with 0 shots: Tasks not found: nothing"),
        (["numglue-5"], "lm-eval cannot run numglue with 5 shots: .*exceeds the 4 that are available"),
        (["simuleq-0"], "simuleq needs its problems in .*simuleq.jsonl"),
    ):
        with pytest.raises(UserError, match=message) as refused:
            scores_of(monkeypatch, capsys, [tuned], tasks, *data)
        assert "\n" not in str(refused.value)

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach it\non the Hub")

    monkeypatch.setattr(problems, "load", unreachable)
    monkeypatch.setattr("lm_eval.tasks._yaml_loader._import_func_in_yml", lambda *_: unreachable)
    with pytest.raises(
        UserError, match=r"data of numglue .* must be readable \(Couldn't reach it on the Hub\): connect"
    ):
        scores_of(monkeypatch, capsys, [tuned], ["numglue-0"], *data)
    with pytest.raises(UserError, match=r"weights are \*.safetensors files.*nowhere does not exist"):
        scores_of(monkeypatch, capsys, [tuned, tmp_path / "nowhere"], ["numglue-0"], *data)


# ---- The script


@pytest.fixture
def checkout(tmp_path) -> Path:
    return copy_checkout(tmp_path, "Llama", "scripts")


def fake_python(path: Path, asked: Path) -> Path:
    """An interpreter that records its arguments, and has lm-eval if LM_EVAL is set, or after a pip install."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'#!/bin/sh\necho "$*" >> {asked}\n'
        f'case "$*" in *math_verify*) [ -n "$LM_EVAL" ] || grep -q "pip install" {asked} ;; esac\n'
    )
    path.chmod(0o755)
    return path


def bash(checkout: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    settings = {key: value for key, value in os.environ.items() if key != "PYTHON"} | environment
    command = ["bash", str(checkout / "Llama/eval.sh"), *arguments]
    return subprocess.run(command, cwd="/", env=settings, capture_output=True, text=True)


def test_script_passes_models_tasks_and_flags_on(checkout):
    asked = checkout / "asked"
    python = str(fake_python(checkout / "python", asked))
    knobs = {"TASKS": "numglue-0 gsm8k-4", "LIMIT": "7", "BATCH": "3", "TOKENS": "9", "EVAL_DATA": "my data"}
    done = bash(checkout, "runs/a", "b c", "--seed", "1", PYTHON=python, LM_EVAL="yes", **knobs)
    assert done.returncode == 0, done.stderr
    assert asked.read_text().splitlines()[-1] == (
        "-m Llama.evaluate --models runs/a b c --tasks numglue-0 gsm8k-4 --tokens 9 --data my data "
        "-- --batch_size 3 --limit 7 --seed 1"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a"], "error: PYTHON=.* must have lm-eval; run: .* -m pip install -r Llama/requirements-eval.txt -c req"),
        ([], "error: name the models to score, before any flag: .* got none"),
        (["a", "--tasks", "gsm8k"], "error: set TASKS instead of --tasks, as in TASKS='gsm8k-0 gsm8k-4'"),
        (["a", "--output_path=x"], "error: results are written to the model's folder; leave out --output_path=x"),
    ],
)
def test_script_refuses_in_one_line(arguments, message, checkout):
    done = bash(checkout, *arguments, PYTHON=str(fake_python(checkout / "python", checkout / "asked")), LM_EVAL="")
    assert done.returncode == 1
    assert re.fullmatch(f"{message}.*\n", done.stderr)


def test_script_installs_lm_eval_once_into_its_own_environment(checkout):
    asked = checkout / "asked"
    fake_python(checkout / ".venv/bin/python", asked)
    shutil.copy(checkout / "requirements.txt", checkout / ".venv/requirements.installed")
    for _ in range(2):
        done = bash(checkout, "a", LM_EVAL="")
        assert done.returncode == 0, done.stderr
    installs = [line for line in asked.read_text().splitlines() if "pip" in line]
    assert installs == ["-m pip install -r Llama/requirements-eval.txt -c requirements.txt --quiet"]
