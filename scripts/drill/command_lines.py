"""bad command lines: one line, and a status that is not 0

Invalid values, unknown options and invalid files, for the main function of every program.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from scripts.drill.harness import Cases, forked, program, refusal, thinned
from scripts.drill.runs import EXPERIMENTS, Runs

COUNT = ("-1", "1.5", "nan", "x", "", "1e400", "9" * 5000)  # invalid numbers of steps, windows or images
POSITIVE = ("-1e-3", "nan", "inf", "x", "")  # invalid rates
# Of each experiment's training: option -> invalid values.
TRAINING = {
    "--steps": ("0", *COUNT),
    "--clip": POSITIVE,
    "--seed": ("-1", "x", "1.5", str(2**70)),
    "--log_every": ("0", "-1", "x"),
    "--device": ("gpu", "cuda:99"),
    "--dtype": ("int8", ""),
    "--group": ("../../..", "/etc", ""),
    "--wandb": ("yes",),
    "--optimizer.name": ("adam", "", "oilon"),
    "--optimizer.lr": POSITIVE,
    "--optimizer.adamw_lr": POSITIVE,
    "--optimizer.weight_decay": POSITIVE,
    "--optimizer.ns_steps": ("-1", "x"),
    "--schedule.warmup": ("-1", "x", "nan"),
    "--schedule.decay": ("steep",),
    "--schedule.floor": ("-1", "2", "nan", "x"),
    "--checkpoint.every": ("-1", "x"),
    "--checkpoint.keep": ("0", "-1", "x"),
    "--eval.every": ("0", "-1", "x"),
    "--parallel.mode": ("magic",),
    "--nosuch.flag": ("1",),
    "--optimizer.tuned_lr.oilon": ("1e-3",),
}
GPT = {
    "--model.n_layer": ("0", "-1", "x"),
    "--model.n_head": ("0", "3", "-2"),
    "--model.n_embd": ("0", "1000000000", "-4"),
    "--model.context": ("0", "1000000000", "x"),
    "--model.vocab_size": ("-1", "5", "x"),
    "--model.dropout": ("-1", "2", "nan"),
    "--data.folder": ("/nonexistent", "/dev/null"),
    "--data.batch_size": ("0", "-1", "x"),
    "--data.micro_batch": ("0", "-1"),
    "--eval.windows": ("0", "-1"),
    "--init_from": ("gpt5",),
}
SIT = {
    "--model.size": ("SiT-Q/2", "x"),
    "--model.depth": ("-1", "x"),
    "--model.n_head": ("3", "-1"),
    "--model.width": ("1000000000", "-16"),
    "--model.patch_size": ("3", "-1"),
    "--model.n_class": ("0", "5", "-1"),
    "--ema": ("-1", "1.5", "nan"),
    "--data.kind": ("cats",),
    "--data.batch_size": ("0", "x"),
    "--objective.path": ("round",),
    "--objective.prediction": ("future",),
    "--objective.times": ("never",),
    "--objective.encoder": ("clip",),
    "--objective.encoder_folder": ("/nonexistent",),
    "--objective.projection_weight": POSITIVE,
    "--objective.label_dropout": ("-1", "1", "nan"),
    "--eval.images": ("0", "-1"),
    "--eval.preview": ("-1",),
}
LLAMA = {
    "--training.steps": ("0", "-1", "x", "1.5"),
    "--training.seq_len": ("0", "-1", "x"),
    "--training.lanes": ("0", "-1", "x"),
    "--training.local_batch_size": ("0", "-1"),
    "--training.global_batch_size": ("0", "-1", "x"),
    "--training.max_norm": ("-1", "nan", "x"),
    "--training.dataset": ("novels",),
    "--training.dataset_path": ("/nonexistent",),
    "--training.mixed_precision_param": ("int4",),
    "--model.name": ("gpt", ""),
    "--model.flavor": ("8T", ""),
    "--model.hf_assets_path": ("/nonexistent",),
    "--optimizer.name": ("adam", ""),
    "--optimizer.lr": POSITIVE,
    "--optimizer.weight_decay": ("-1", "nan"),
    "--optimizer.tuned_lr.oilon": ("1e-3",),
    "--lr_scheduler.warmup_steps": ("-1", "x"),
    "--lr_scheduler.decay_ratio": ("5", "-1", "nan"),
    "--lr_scheduler.min_lr_factor": ("nan", "-1", "2"),
    "--lr_scheduler.decay_type": ("steep",),
    "--checkpoint.interval": ("0", "-1", "x"),
    "--checkpoint.keep_latest_k": ("-1", "x"),
    "--checkpoint.initial_load_path": ("/nonexistent",),
    "--checkpoint.load_step": ("99",),
    "--validation.freq": ("0", "-1"),
    "--validation.windows": ("0", "-1"),
    "--debug.seed": ("-1", str(2**70), "x"),
    "--job.group": ("../..", "/etc", ""),
    "--parallelism.tensor_parallel_degree": ("0", "3", "-7"),
    "--parallelism.pipeline_parallel_degree": ("0", "2"),
    "--nosuch.flag": ("1",),
}
FILES = {  # invalid configs: name -> content
    "loop.toml": 'extends = "loop.toml"',
    "other.toml": "no_such_key = 1",
    "broken.toml": "[model\n",
    "integer.toml": "steps = " + "9" * 5000,
    "deep.toml": "steps = " + "[" * 10_000 + "]" * 10_000,
    "type.toml": 'steps = "many"',
    "section.toml": "model = 3",
    "parent.toml": 'extends = "nonexistent.toml"',
    "binary.toml": "\x00\x01",
    "nul.toml": 'group = "a\\u0000b"',
    "latin.toml": b"# \xfc\n",
}


def cases(runs: Runs, quick: bool) -> Cases:
    """Yield every bad command line."""
    for words in thinned(list(_all(runs)), quick, keep=12):
        yield _shown(words, runs), partial(_attempt, words)


def _attempt(words: list[str]) -> str | None:
    return refusal(forked(program(*words)))


def _shown(words: list[str], runs: Runs) -> str:
    known = {*map(str, runs.llama_flags)} if words[0] == "Llama.train" else set()
    rest = [word if len(word) < 60 else f"{word[:20]}..." for word in words[1:] if word not in known]
    return " ".join([words[0], *map(repr, rest)]).replace(str(runs.folder), "DRILL")


def _all(runs: Runs) -> Iterator[list[str]]:
    out = runs.folder / "bad"
    for experiment, own in zip(EXPERIMENTS, (TRAINING | GPT, TRAINING | SIT, LLAMA), strict=True):
        for option, values in own.items():
            for value in values:
                yield runs.command(experiment, out, option, value)
    for experiment in ("nanoGPT", "SIT"):
        for path in _files(runs.folder):
            yield [f"{experiment}.train", str(path)]
        for words in (["nonexistent.toml"], [str(runs.folder)], ["--steps"], ["--config"], ["a.toml", "b.toml"]):
            yield [f"{experiment}.train", *words]
    yield from _other_programs(runs)


def _files(folder: Path) -> Iterator[Path]:
    for name, content in FILES.items():
        path = folder / "configs" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        yield path
    link = folder / "configs/link.toml"
    link.unlink(missing_ok=True)
    link.symlink_to(link)
    yield link


def _other_programs(runs: Runs) -> Iterator[list[str]]:
    text, empty, folder = runs.folder / "text.txt", runs.folder / "empty.txt", runs.folder / "empty"
    empty.write_text("")
    folder.mkdir(exist_ok=True)
    gpt, sit, llama = (str(runs.finished(experiment)) for experiment in EXPERIMENTS)
    out = str(runs.folder / "bad/out")
    programs: dict[str, list[list[object]]] = {
        "nanoGPT.prepare": [
            [],
            ["/nonexistent"],
            [empty, "--out", out],
            [folder, "--out", out],
            *([text, "--out", out, "--val-fraction", value] for value in ("0", "1", "-1", "nan", "x")),
            *([text, "--out", out, "--workers", value] for value in ("0", "-1", "x", "1000000000")),
            [text, "--tokenizer", "gpt9"],
            [text, "--out", gpt],
            [text, "--out", out, "--nosuch"],
        ],
        "nanoGPT.sample": [
            [],
            ["--run", "/nonexistent"],
            ["--run", sit],
            ["--run", llama],
            ["--run", text],
            *(["--run", gpt, "--temperature", value] for value in ("nan", "inf", "-1", "x")),
            *(["--run", gpt, "--tokens", value] for value in ("-1", "x", "1.5")),
            *(["--run", gpt, "--top-k", value] for value in ("-1", "x")),
            *(["--run", gpt, "--seed", value] for value in ("-1", str(2**70), "x")),
            ["--run", gpt, "--device", "abacus"],
        ],
        "SIT.prepare": [
            [],
            ["bake"],
            ["convert", "/nonexistent", "--out", out],
            ["convert", folder, "--out", out],
            ["convert", text, "--out", out],
            ["encode", folder],
            ["encode", "/nonexistent"],
            ["digits", "--nosuch"],
            *(["convert", runs.folder, "--out", out, "--size", value] for value in ("0", "-1", "x")),
        ],
        "SIT.sample": [
            [],
            ["/nonexistent"],
            [text],
            [gpt],
            [llama],
            [folder],
            *([sit, "--count", value] for value in ("0", "-1", "x", "1000000000000")),
            *([sit, "--steps", value] for value in ("0", "-1", "x")),
            *([sit, "--guidance", value] for value in ("nan", "1e38", "inf", "x")),
            *([sit, "--seed", value] for value in ("-1", "x")),
            [sit, "--method", "rk99"],
            [sit, "--out", "/dev/null/x.png"],
            [sit, "--out", "x.txt"],
            [sit, "--interval", "x", "y"],
            [sit, "--vae", "/nonexistent", "--batch-size", "0"],
            [sit, "--guided-channels", "-1"],
        ],
        "SIT.evaluate": [
            [],
            ["/nonexistent"],
            [gpt],
            [folder],
            [runs.folder / "no.npz"],
            *([sit, "--count", value] for value in ("0", "-1", "x", "1000000000000")),
            *([sit, "--steps", value] for value in ("0", "x")),
        ],
        "Llama.prepare": [
            [],
            ["/nonexistent"],
            [empty, "--out", out],
            [folder, "--out", out],
            *([text, "--out", out, "--vocab-size", value] for value in ("0", "10", "-1", "x")),
            *([text, "--out", out, "--val-fraction", value] for value in ("0", "1", "nan", "x")),
            *([text, "--out", out, "--document-length", value] for value in ("0", "-1", "x")),
            [text, "--out", llama],
        ],
        "Llama.weights": [
            [],
            ["/nonexistent", "--out", out],
            [gpt, "--out", out],
            [llama, "--out", folder],
            [llama, "--out", out, "--step", "99"],
            [llama, "--out", out, "--step", "x"],
            [llama, "--out", out, "--dtype", "int4"],
        ],
        "Llama.arithmetic": [["--train", "-1"], ["--val", "x"], ["--seed", "x"], ["--train", "100000000"]],
        "Llama.evaluate": [
            [],
            ["--models", "/nonexistent", "--tasks", "arithmetic-0"],
            ["--models", llama, "--tasks", "nosuch"],
        ],
        "scripts.figures": [
            ["/nonexistent"],
            [folder],
            [text],
            *([gpt, "--ylim", *value] for value in (("nan", "1"), ("2", "1"), ("x", "1"), ("1", "inf"))),
            [gpt, "--metric", "nosuch"],
            [gpt, "--x", "nosuch"],
            [gpt, "--out", "/dev/null/x.png"],
            ["nonexistent.json"],
        ],
        "scripts.plan": [
            [],
            ["--model", "llama2_7b"],
            ["--model", "gpt9", "--mesh", "ddp=2"],
            *(
                ["--model", "gpt2_small", "--mesh", value]
                for value in ("", "ddp", "ddp=0", "ddp=x", "fsdp=5000", "hsdp=2")
            ),
            *(["--model", "gpt2_small", "--mesh", "ddp=2", "--gpu-tflops", value] for value in ("nan", "0", "-1", "x")),
            *(["--model", "gpt2_small", "--mesh", "ddp=2", "--rank", value] for value in ("2", "-1", "x")),
            *(["--model", "gpt2_small", "--mesh", "ddp=2", "--efficiency", value] for value in ("0", "nan", "2")),
            *(["--model", "gpt2_small", "--mesh", "ddp=2", "--link-gbs", value] for value in ("0", "nan")),
        ],
        "scripts.sweep": [
            [],
            ["/nonexistent.toml"],
            [runs.gpt_config, "--optimizers", "adam"],
            [runs.gpt_config, "--lrs", "x"],
            [runs.gpt_config, "--lrs", "nan"],
            [runs.gpt_config, "--jobs", "0"],
            [runs.gpt_config, "--module", "os"],
            [runs.gpt_config, "--set", "nosuch"],
            [runs.gpt_config, "--draw-only", "--out", runs.folder / "none.json"],
        ],
        "scripts.bench_optimizers": [["--shapes", "x"], ["--repeats", "0"], ["--layers", "-1"], ["--device", "abacus"]],
        "scripts.bench_signs": [["--entries", "-1"], ["--repeats", "0"], ["--threads", "0"], ["--dtypes", "int1"]],
        "scripts.bench_communication": [["--ranks", "0"], ["--layers", "0"], ["--repeats", "0"], ["--threads", "x"]],
    }
    for module, lines in programs.items():
        for words in lines:
            yield [module, *map(str, words)]
