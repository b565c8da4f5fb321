"""damaged and exchanged files: named and skipped, or refused in one line

Checkpoints: flipped bits; truncated, lengthened, missing and exchanged files and manifests. Reading must return the
previous checkpoint, bit for bit, with a warning, or fail in one line, without blaming the model. All other files that
the programs write: other JSON, missing keys and wrong types.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from scripts.drill.harness import Cases, Outcome, crashed, forked, output_lines, program, refusal, thinned
from scripts.drill.runs import EXPERIMENTS, Runs
from scripts.drill.states import numbered, tensors_digest

FLIPS = {"manifest.json": 20, ".metadata": 10, "__0_0.distcp": 20}  # per experiment
OLDER, NEWER = 2, 4  # steps of the checkpoints
CONTENTS = {
    "nothing": "",
    "half an object": '{"manifest": ',
    "an array": "[]",
    "null": "null",
    "a number": "5",
    "no keys": "{}",
    "a deep array": "[" * 100_000,
    "a long number": "9" * 5000,
    "bytes": b"\xff\xfe\x00",
}


def cases(runs: Runs, quick: bool) -> Cases:
    """Yield every damage, to checkpoints and then to other files."""
    draw = random.Random(0)
    for experiment in EXPERIMENTS[:1] if quick else EXPERIMENTS:
        reader = Reader(runs, experiment)
        for name, damage in thinned(list(_damages(draw)), quick):
            yield f"{experiment} checkpoint: {name}", partial(reader.attempt, damage)
    for name, attempt in thinned(list(_other_files(runs)), quick):
        yield name, attempt


# ---- Checkpoints


class Reader:
    """Reads the newest checkpoint of an experiment's run, as resuming does."""

    def __init__(self, runs: Runs, experiment: str):
        self._runs, self._experiment = runs, experiment
        self._known: dict[str, int] = {}

    def attempt(self, damage: Callable[[Path, Path], None]) -> str | None:
        """Damage a copy of the finished run's newest checkpoint, and read it; returns the reason if it falls short."""
        run = self._runs.copy(self._experiment, "damaged")
        if not self._known:
            self._known[self._digest(run)] = NEWER
            shutil.rmtree(numbered(run)[NEWER])
            self._known[self._digest(run)] = OLDER
            run = self._runs.copy(self._experiment, "damaged")
        folders = numbered(run)
        damage(folders[NEWER], folders[OLDER])
        outcome = forked(partial(self._read, run))
        return self._judge(outcome)

    def _judge(self, outcome: Outcome) -> str | None:
        if reason := crashed(outcome):
            return reason
        if "of another" in outcome.err:
            return f"blames the user: {outcome.err.strip()[:300]}"
        if outcome.status != 0:
            return refusal(outcome)
        step = self._known.get(outcome.out.strip())
        if step is None:
            return "accepted, with other tensors"
        if step == OLDER and "is damaged and skipped" not in outcome.err:
            return "skipped without a warning"
        return None

    def _digest(self, run: Path) -> str:
        outcome = forked(partial(self._read, run))
        if outcome.status != 0:
            raise RuntimeError(f"{run} must be undamaged: {outcome.err[-500:]}")
        return outcome.out.strip()

    def _read(self, run: Path) -> None:
        from common.guard import main_guard

        main_guard(lambda: print(READERS[self._experiment](run)))


def _read_gpt(run: Path) -> str:
    from dataclasses import replace

    from common import checkpoint
    from common.config import from_dict
    from nanoGPT.train import GPT, Config, build, fit_vocabulary

    settings = from_dict(Config, json.loads((run / "config.json").read_text())["config"])
    settings = fit_vocabulary(replace(settings, seed=7))
    model = GPT(settings.model)
    optimizer = build(settings.optimizer, model)
    checkpoint.load(run / "checkpoints", model, optimizer)
    state = {f"{i}.{key}": value for i, each in enumerate(optimizer.state.values()) for key, value in each.items()}
    return tensors_digest(dict(model.named_parameters()) | state)


def _read_sit(run: Path) -> str:
    import torch

    from SIT.sampling import load_run

    return tensors_digest(dict(load_run(run, torch.device("cpu"))[0].named_parameters()))


def _read_llama(run: Path) -> str:
    from Llama.checkpoints import find_step
    from scripts.drill.states import digest_of

    step = find_step(run / "checkpoint")
    return digest_of(run / "checkpoint" / f"step-{step}")


READERS = {"nanoGPT": _read_gpt, "SIT": _read_sit, "Llama": _read_llama}


def _damages(draw: random.Random) -> Iterator[tuple[str, Callable[[Path, Path], None]]]:
    """Yield damages by name: functions of the newest checkpoint's folder and the older one's."""
    for file, count in FLIPS.items():
        for _ in range(count):
            position = draw.random()
            yield f"bit at {position:.4f} of {file} flipped", partial(_flip, file, position, draw.randrange(8))
    for file in FLIPS:
        for part in (0.0, 0.5, 0.99):
            yield f"{file} cut to {part}", partial(_cut, file, part)
        yield f"{file} lengthened", partial(_lengthen, file)
        yield f"{file} missing", lambda newer, older, file=file: (newer / file).unlink()
        yield f"{file} of the other step", lambda newer, older, file=file: shutil.copy(older / file, newer / file)
        yield f"{file} is a folder", partial(_make_folder, file)
    for name, content in CONTENTS.items():
        yield f"manifest.json of {name}", partial(_write, "manifest.json", content)
    for name, change in {"step 10^9": {"step": 10**9}, "no files": {"files": {}}, "format 9": {"format": 9}}.items():
        yield f"manifest.json of {name}", partial(_change_manifest, change)
    yield "all but the manifest of the other step", _exchange_all
    yield "the folder of the other step under this one's name", _exchange_folder


def _flip(file: str, position: float, bit: int, newer: Path, older: Path) -> None:
    data = bytearray((newer / file).read_bytes())
    data[int(position * len(data))] ^= 1 << bit
    (newer / file).write_bytes(data)


def _cut(file: str, part: float, newer: Path, older: Path) -> None:
    data = (newer / file).read_bytes()
    (newer / file).write_bytes(data[: int(part * len(data))])


def _lengthen(file: str, newer: Path, older: Path) -> None:
    with open(newer / file, "ab") as opened:
        opened.write(b"\0" * 7)


def _make_folder(file: str, newer: Path, older: Path) -> None:
    (newer / file).unlink()
    (newer / file).mkdir()


def _write(file: str, content: str | bytes, newer: Path, older: Path) -> None:
    (newer / file).write_bytes(content if isinstance(content, bytes) else content.encode())


def _change_manifest(change: dict[str, Any], newer: Path, older: Path) -> None:
    written = json.loads((newer / "manifest.json").read_text())
    written["manifest"] |= change
    (newer / "manifest.json").write_text(json.dumps(written))


def _exchange_all(newer: Path, older: Path) -> None:
    for path in older.iterdir():
        if path.name != "manifest.json":
            shutil.copy(path, newer / path.name)


def _exchange_folder(newer: Path, older: Path) -> None:
    shutil.rmtree(newer)
    shutil.copytree(older, newer)


# ---- Other files


def _other_files(runs: Runs) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """Yield damages of JSON files, each with a program that reads the file."""
    for experiment, (module, flag) in {
        "nanoGPT": ("nanoGPT.sample", ["--run"]),
        "SIT": ("SIT.sample", []),
        "Llama": ("Llama.weights", ["--out", str(runs.folder / "exported")]),
    }.items():
        for name, content in CONTENTS.items():
            yield (
                f"config.json of {name}: {module}",
                partial(_try, runs, experiment, "config.json", content, [module, *flag]),
            )
    for file, name, content in _misshapen():
        experiment = "nanoGPT"
        yield f"{file} of {name}: scripts.figures", partial(_try, runs, experiment, file, content, ["scripts.figures"])
    for name, content in CONTENTS.items():
        yield f"finished.json of {name}: SIT.evaluate", partial(_try, runs, "SIT", "finished.json", content, EVALUATE)
        yield f"meta.json of {name}: nanoGPT.train", partial(_try_corpus, runs, content)
        yield f"a record of {name}: scripts.sweep", partial(_try_record, runs, content, "scripts.sweep")
        yield f"a record of {name}: scripts.figures", partial(_try_record, runs, content, "scripts.figures")
    for key, value in (("vocab_size", "257"), ("dtype", 5), ("files", []), ("tokenizer", None), ("vocab_size", -1)):
        yield f"meta.json with {key} {value!r}: nanoGPT.train", partial(_try_corpus, runs, {key: value})
    for experiment in EXPERIMENTS:
        for name, content in METRICS.items():
            yield f"metrics.jsonl with {name}: resuming {experiment}", partial(_resume, runs, experiment, name, content)


EVALUATE = ["SIT.evaluate", "--count", "4", "--steps", "1"]
METRICS = {  # of a resumed run: a one-line error, or a warning if history is missing
    "nothing": "",
    "a line without a step": '{"train/loss": 1.0}\n{"step": 1}\n',
    "a cut line between others": '{"step": 1\n{"step": 2}\n',
    "NaN for a step": '{"step": NaN}\n{"step": 1}\n',
    "other encodings": '{"step": 1}\n'.encode("utf-16"),
    "no file": None,
}


def _misshapen() -> Iterator[tuple[str, str, str | bytes]]:
    for name, content in CONTENTS.items():
        yield "config.json", name, content
    yield "config.json", "config []", '{"config": []}'
    yield "config.json", "optimizer 5", '{"config": {"optimizer": 5}}'
    for name in ("a line without a step", "a cut line between others", "NaN for a step", "other encodings", "nothing"):
        yield "metrics.jsonl", name, METRICS[name]
    yield "metrics.jsonl", "text for a loss", '{"step": 1, "val/loss": "low"}\n'


def _try(runs: Runs, experiment: str, file: str, content: str | bytes, words: list[str]) -> str | None:
    """Overwrite a file of a run, and run a program on the run."""
    run = runs.copy(experiment, "damaged")
    (run / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    module, *flags = words
    line = [str(run), *flags] if module != "nanoGPT.sample" else [*flags, str(run)]
    return _refused_or_done(forked(program(module, *line)))


def _try_corpus(runs: Runs, content: str | bytes | dict[str, Any]) -> str | None:
    """Overwrite the meta.json of a copy of the corpus, or change keys of it, and train."""
    runs.finished("nanoGPT")
    corpus = runs.folder / "damaged-corpus"
    shutil.rmtree(corpus, ignore_errors=True)
    shutil.copytree(runs.folder / "corpus", corpus)
    if isinstance(content, dict):
        content = json.dumps(json.loads((corpus / "meta.json").read_text()) | content)
    (corpus / "meta.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    out = runs.folder / "damaged-out"
    return refusal(forked(program(*runs.command("nanoGPT", out, "--data.folder", corpus))))


def _try_record(runs: Runs, content: str | bytes, module: str) -> str | None:
    """Write a record, and draw it."""
    record = runs.folder / "record.json"
    record.write_bytes(content if isinstance(content, bytes) else content.encode())
    words = [runs.gpt_config, "--draw-only", "--out", record] if module == "scripts.sweep" else [record]
    return refusal(forked(program(module, *words)))


def _resume(runs: Runs, experiment: str, name: str, content: str | bytes | None) -> str | None:
    """Damage the metrics of a run, and resume it."""
    run = runs.copy(experiment, "damaged")
    path = run / "metrics.jsonl"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    resume = "--job.resume" if experiment == "Llama" else "--resume"
    outcome = forked(program(*runs.command(experiment, runs.folder / "damaged", resume)))
    if outcome.status == 0 and "metrics.jsonl" not in outcome.err and name in ("nothing", "no file"):
        return f"resumed without a warning that history is missing: {output_lines(outcome)[-1:]}"
    return _refused_or_done(outcome)


def _refused_or_done(outcome: Outcome) -> str | None:
    return crashed(outcome) or (refusal(outcome) if outcome.status else None)
