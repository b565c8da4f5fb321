"""Score models with lm-eval, as Llama/eval.sh does, and print a table of their accuracies.

    python -m Llama.evaluate --models data/Llama-3.1-8B runs/llama/sft_llama3_8b/RUN --tasks gsm8k-0 gsm8k-4
    python -m Llama.evaluate --models RUN --tasks arithmetic_problems-0 -- --limit 100 --log_samples

A fine-tuned model is asked through its own chat template, the worked examples being earlier turns; another one is given
text to go on with. What lm-eval writes is below the model's folder, eval/SHOTS-shot_TIME.json.
"""

import gc
import json
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from common import UserError, one_line
from common.launch import main_guard
from common.options import parse_options
from Llama import weights
from Llama.hf import read_json

TASKS = Path(__file__).with_name("tasks")
# Which metric is a task's accuracy, where it has several. gsm8k: the last number is the answer; its other metric looks
# for the "####" that only its own training set writes. minerva_math: the last expression, by sympy; likewise.
METRICS = {"gsm8k": "exact_match,flexible-extract", "minerva_math": "math_verify,none"}


@dataclass(frozen=True)
class Options:
    models: tuple[Path, ...]
    """Folders of Hugging Face weights, or of runs, whose newest checkpoint is exported to RUN/exported-step-N."""
    tasks: tuple[str, ...]
    """TASK-SHOTS: a task of lm-eval or of Llama/tasks, and how many worked examples precede a problem."""
    data: Path | None = None
    """A folder with TASK.jsonl for each task of Llama/tasks; None: where these come from."""
    tokens: int = 512
    """Of a response, at most; and at most half of the model's context."""
    flags: tyro.conf.Positional[tuple[str, ...]] = ()
    """More flags of lm_eval, after --."""


def plan(tasks: tuple[str, ...]) -> dict[int, list[str]]:
    """Group tasks by their shots, of which lm-eval takes one number a run."""
    by_shots = defaultdict(list)
    for task in tasks:
        if not (match := re.fullmatch(r"(.+)-(\d+)", task)):
            raise UserError(f"TASKS must be like gsm8k-4, a task and its number of worked examples; got {task!r}")
        by_shots[int(match[2])].append(match[1])
    return by_shots


def hf_folder(model: Path) -> Path:
    """Return a folder of Hugging Face weights: the model's own, or what its newest checkpoint is exported to."""
    found, is_hf = weights.find_weights(model)
    if is_hf:
        return model
    folder, record = model / f"exported-{found.name}", model / "config.json"
    if not folder.is_dir():
        training = weights.recorded(record)["training"] if record.is_file() else {}
        # What it was trained in: in bfloat16, the small Llama, trained in float32, lost 4 of 133 right answers.
        weights.export(weights.Options(model, folder, dtype=training.get("mixed_precision_param", "bfloat16")))
    return folder


def has_template(folder: Path) -> bool:
    """Whether a tokenizer knows how a conversation is written."""
    config = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").is_file() or "chat_template" in read_json(config)


def ask(model: Path, folder: Path, shots: int, tasks: list[str], options: Options) -> dict[str, float]:
    """Run lm-eval, as its command line does, and return the accuracy of each task, in %.

    Raises UserError where a task or its data are missing, or the model's files are.
    """
    from lm_eval.__main__ import cli_evaluate

    chat, results = has_template(folder), model / "eval" / f"{shots}-shot.json"
    room = read_json(folder / "config.json").get("max_position_embeddings")
    if not isinstance(room, int) or room < 2:
        raise UserError(f"{folder / 'config.json'} must have max_position_embeddings, a number; has {room!r:.40}")
    # An absolute path is never looked up on the Hub. Training begins every text with the begin-of-text token.
    arguments = {"pretrained": str(folder.resolve()), "add_bos_token": True}
    metadata = {"plain": not chat, "data": options.data and str(options.data)}
    flags = ["--model", "hf", "--model_args", json.dumps(arguments), "--tasks", *tasks, "--num_fewshot", str(shots)]
    flags += ["--include_path", str(TASKS), "--metadata", json.dumps(metadata), "--output_path", str(results)]
    flags += ["--gen_kwargs", f"max_gen_toks={min(options.tokens, room // 2)}"]
    flags += ["--device", "cuda" if torch.cuda.is_available() else "cpu", *["--apply_chat_template"] * chat]
    written = f"{results.stem}_*.json"
    arguments_before, results_before = sys.argv, set(results.parent.glob(written))
    sys.argv = ["lm_eval", "run", *flags, *options.flags]
    try:
        cli_evaluate()
    except OSError as error:
        raise UserError(
            f"the data of {' '.join(tasks)} and the files of {folder} must be in reach ({one_line(error)[:300]}): "
            "connect to the internet, or leave out of TASKS what comes from the Hugging Face Hub"
        ) from error
    except (ValueError, AssertionError) as error:  # lm-eval's for an unknown task or too many shots
        raise UserError(f"lm-eval cannot run {' '.join(tasks)} with {shots} shots: {one_line(error)[:300]}") from error
    finally:
        sys.argv = arguments_before
        gc.collect()  # the model, before the next one needs its memory
    if not (new := set(results.parent.glob(written)) - results_before):  # of which lm-eval only warns
        raise UserError(f"{results.parent} must be writable, on a disk with room; lm-eval could not write its results")
    scores = json.loads(new.pop().read_text())["results"]
    return {f"{task}-{shots}": accuracy(task, scores[task]) for task in tasks}


def accuracy(task: str, scores: dict) -> float:
    """Choose a task's accuracy, in %, among its metrics: "NAME,FILTER", each with a standard error."""
    names = [name for name in scores if "," in name and "_stderr," not in name]
    return 100 * scores[METRICS.get(task, names[0])]


def table(scores: dict[Path, dict[str, float]], tasks: tuple[str, ...]) -> str:
    """Lay out accuracies as Markdown, a model a row and a task a column."""
    lines = [["accuracy, %", *tasks], ["---"] + ["--:"] * len(tasks)]
    lines += [[model.resolve().name] + [f"{found[task]:.2f}" for task in tasks] for model, found in scores.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    options = parse_options(Options, "python -m Llama.evaluate", __doc__)
    if options.tokens < 1:
        raise UserError(f"--tokens must be 1 or more, got {options.tokens}")
    by_shots = plan(options.tasks)
    folders = {model: hf_folder(model) for model in options.models}  # one that is missing is refused at once
    scores: dict[Path, dict[str, float]] = defaultdict(dict)
    for model, folder in folders.items():
        for shots, tasks in by_shots.items():
            scores[model] |= ask(model, folder, shots, tasks, options)
    print(table(scores, options.tasks))


if __name__ == "__main__":
    main_guard(main)
