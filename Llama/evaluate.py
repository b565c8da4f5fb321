"""Score models with lm-eval, for Llama/eval.sh, and print a table of their accuracies.

    python -m Llama.evaluate --models data/Llama-3.1-8B runs/llama/sft_llama3_8b/RUN --tasks gsm8k-0 gsm8k-4
    python -m Llama.evaluate --models RUN --tasks arithmetic_problems-0 -- --limit 100 --log_samples

A fine-tuned model is prompted through its chat template, with the worked examples as earlier turns; any other model
continues plain text. lm-eval's results are in the model's folder, eval/SHOTS-shot_TIME.json.
"""

import gc
import json
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import tyro

from common import UserError, one_line
from common.guard import main_guard
from common.json_files import read_object
from common.options import parse_options

TASKS = Path(__file__).with_name("tasks")
# The metric of tasks that have several. gsm8k: the last number is the answer; its other metric needs the "####" of its
# own training set. minerva_math: the last expression, by sympy; likewise.
METRICS = {"gsm8k": "exact_match,flexible-extract", "minerva_math": "math_verify,none"}


@dataclass(frozen=True)
class Options:
    models: tuple[Path, ...]
    """Folders of Hugging Face weights, or of runs, whose newest checkpoint is exported to RUN/exported-step-N."""
    tasks: tuple[str, ...]
    """TASK-SHOTS: a task of lm-eval or of Llama/tasks, and its number of worked examples."""
    data: Path | None = None
    """A folder with TASK.jsonl for each task of Llama/tasks; None: their original sources."""
    tokens: int = 512
    """Longest response in tokens; at most half of the model's context."""
    flags: tyro.conf.Positional[tuple[str, ...]] = ()
    """More flags of lm_eval, after --."""


def plan(tasks: tuple[str, ...]) -> dict[int, list[str]]:
    """Group tasks by their number of shots, which lm-eval fixes per run."""
    by_shots = defaultdict(list)
    for task in tasks:
        if not (match := re.fullmatch(r"(.+)-(\d+)", task)):
            raise UserError(f"TASKS must be like gsm8k-4, a task and its number of worked examples; got {task!r}")
        by_shots[int(match[2])].append(match[1])
    return by_shots


def hf_folder(model: Path) -> Path:
    """Return a folder of Hugging Face weights: the model itself, or the export of its newest checkpoint."""
    from Llama import weights  # here: torchtitan takes seconds to import, and --help does not need it

    found, is_hf = weights.find_weights(model)
    if is_hf:
        return model
    folder, record = model / f"exported-{found.name}", model / "config.json"
    if not folder.is_dir():
        training = weights.recorded(record)["training"] if record.is_file() else {}
        # In the training precision: in bfloat16 the small Llama, trained in float32, lost 4 of 133 right answers.
        weights.export(weights.Options(model, folder, dtype=training.get("mixed_precision_param", "bfloat16")))
    return folder


def has_template(folder: Path) -> bool:
    """Return whether a tokenizer has a chat template."""
    config = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").is_file() or "chat_template" in read_object(config)


def ask(model: Path, folder: Path, shots: int, tasks: list[str], options: Options) -> dict[str, float]:
    """Run lm-eval's command line; returns the accuracy of each task, in %.

    Raises UserError for a missing task, data set or model file.
    """
    import torch
    from lm_eval.__main__ import cli_evaluate

    chat, results = has_template(folder), model / "eval" / f"{shots}-shot.json"
    context = read_object(folder / "config.json").get("max_position_embeddings")
    if not isinstance(context, int) or context < 2:
        raise UserError(f"{folder / 'config.json'} must have max_position_embeddings, a number; has {context!r:.40}")
    # An absolute path is never looked up on the Hub. Training starts every text with the begin-of-text token.
    arguments = {"pretrained": str(folder.resolve()), "add_bos_token": True}
    metadata = {"plain": not chat, "data": options.data and str(options.data)}
    flags = ["--model", "hf", "--model_args", json.dumps(arguments), "--tasks", *tasks, "--num_fewshot", str(shots)]
    flags += ["--include_path", str(TASKS), "--metadata", json.dumps(metadata), "--output_path", str(results)]
    flags += ["--gen_kwargs", f"max_gen_toks={min(options.tokens, context // 2)}"]
    flags += ["--device", "cuda" if torch.cuda.is_available() else "cpu", *["--apply_chat_template"] * chat]
    written = f"{results.stem}_*.json"
    arguments_before, results_before = sys.argv, set(results.parent.glob(written))
    sys.argv = ["lm_eval", "run", *flags, *options.flags]
    try:
        cli_evaluate()
    except OSError as error:
        raise UserError(
            f"the data of {' '.join(tasks)} and the files of {folder} must be readable ({one_line(error)[:300]}): "
            "connect to the internet, or remove tasks of the Hugging Face Hub from TASKS"
        ) from error
    except (ValueError, AssertionError) as error:  # lm-eval: unknown task or too many shots
        raise UserError(f"lm-eval cannot run {' '.join(tasks)} with {shots} shots: {one_line(error)[:300]}") from error
    finally:
        sys.argv = arguments_before
        gc.collect()  # free the model before the next one is loaded
    if not (new := set(results.parent.glob(written)) - results_before):  # lm-eval only warns about it
        raise UserError(f"{results.parent} must be writable, on a disk with room; lm-eval could not write its results")
    scores = json.loads(new.pop().read_text())["results"]
    return {f"{task}-{shots}": accuracy(task, scores[task]) for task in tasks}


def accuracy(task: str, scores: dict) -> float:
    """Return a task's accuracy, in %, from its metrics, "NAME,FILTER", each with a standard error."""
    names = [name for name in scores if "," in name and "_stderr," not in name]
    return 100 * scores[METRICS.get(task, names[0])]


def table(scores: dict[Path, dict[str, float]], tasks: tuple[str, ...]) -> str:
    """Return a Markdown table of accuracies, with a row per model and a column per task."""
    lines = [["accuracy, %", *tasks], ["---"] + ["--:"] * len(tasks)]
    lines += [[model.resolve().name] + [f"{found[task]:.2f}" for task in tasks] for model, found in scores.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    options = parse_options(Options, "python -m Llama.evaluate", __doc__)
    if options.tokens < 1:
        raise UserError(f"--tokens must be 1 or more, got {options.tokens}")
    by_shots = plan(options.tasks)
    folders = {model: hf_folder(model) for model in options.models}  # a missing one fails before any evaluation
    scores: dict[Path, dict[str, float]] = defaultdict(dict)
    for model, folder in folders.items():
        for shots, tasks in by_shots.items():
            scores[model] |= ask(model, folder, shots, tasks, options)
    print(table(scores, options.tasks))


if __name__ == "__main__":
    main_guard(main)
