"""payloads in files that are read: none executed

Pickles that create a folder, and code of a folder, in every file that a program reads and another may have written. A
payload is handled if it is not executed and leaves no traceback, whether the file is refused or skipped.
"""

import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from scripts.drill.harness import Cases, crashed, forked, program, thinned
from scripts.drill.runs import EXPERIMENTS, Runs
from scripts.drill.states import numbered


class Payload:
    """An object whose pickle creates a folder when it is read."""

    def __init__(self, mark: Path):
        self._mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self._mark),)


def cases(runs: Runs, quick: bool) -> Cases:
    """Yield every payload."""
    mark = runs.folder / "executed"
    for name, make in thinned(list(_all(runs, mark)), quick):
        yield name, partial(_attempt, make, mark)


def _attempt(make: Callable[[], list[str]], mark: Path) -> str | None:
    """Write a payload and run the program whose words `make` returns."""
    outcome = forked(program(*make()))
    if mark.exists():
        mark.rmdir()
        return "executed"
    return crashed(outcome)


def _all(runs: Runs, mark: Path) -> Iterator[tuple[str, Callable[[], list[str]]]]:
    payload = Payload(mark)
    for experiment in EXPERIMENTS:
        for manifest in (True, False):
            about = "with a matching manifest" if manifest else "without the manifest's knowledge"
            for file in (".metadata", "__0_0.distcp"):
                words = partial(_resumed, runs, experiment, file, payload, manifest)
                yield f"{experiment}: {file} of a checkpoint, {about}, training", words
    yield "nanoGPT.sample: .metadata", partial(_sampled, runs, "nanoGPT", payload)
    yield "SIT.sample: .metadata", partial(_sampled, runs, "SIT", payload)
    yield "SIT.evaluate: .metadata", partial(_evaluated, runs, payload)
    yield "Llama.weights: .metadata", partial(_exported, runs, payload)
    yield "Llama.train: --checkpoint.initial_load_path", partial(_loaded, runs, payload)
    yield "SIT.sample: a published checkpoint", partial(_published, runs, payload)
    yield "SIT.train: the encoder of the digits", partial(_encoder, runs, payload)
    yield "SIT.train: DINOv2's pytorch_model.bin", partial(_encoder_of_hub, runs, payload)
    yield "SIT.prepare encode: a VAE's .bin", partial(_autoencoder, runs, payload)
    yield "nanoGPT.train: init_from a folder of pickles", partial(_init_from, runs, payload)
    yield "Llama.train: a tokenizer's own code", partial(_tokenizer_code, runs, mark)
    yield "SIT.evaluate: an .npz of objects", partial(_archive, runs, payload)


def _resumed(runs: Runs, experiment: str, file: str, payload: Payload, manifest: bool) -> list[str]:
    run = runs.copy(experiment, "payload")
    newest = numbered(run)[4]
    (newest / file).write_bytes(pickle.dumps(payload) if file == ".metadata" else _saved(payload))
    if manifest:
        _sign(newest)
    return runs.command(experiment, runs.folder / "payload", "--job.resume" if experiment == "Llama" else "--resume")


def _sign(folder: Path) -> None:
    """Write a matching manifest, as anyone could."""
    from common.manifest import MANIFEST, write_manifest

    contents = json.loads((folder / MANIFEST).read_text())["manifest"]
    write_manifest(folder, {key: value for key, value in contents.items() if key not in ("files", "format")})


def _saved(payload: Payload) -> bytes:
    """Return the bytes of torch.save for an object."""
    import torch

    buffer = io.BytesIO()
    torch.save({"model": payload}, buffer)
    return buffer.getvalue()


def _with_metadata(runs: Runs, experiment: str, payload: Payload) -> Path:
    run = runs.copy(experiment, "payload")
    for folder in numbered(run).values():
        (folder / ".metadata").write_bytes(pickle.dumps(payload))
        _sign(folder)
    return run


def _sampled(runs: Runs, experiment: str, payload: Payload) -> list[str]:
    run = str(_with_metadata(runs, experiment, payload))
    return ["nanoGPT.sample", "--run", run] if experiment == "nanoGPT" else ["SIT.sample", run]


def _evaluated(runs: Runs, payload: Payload) -> list[str]:
    return ["SIT.evaluate", str(_with_metadata(runs, "SIT", payload)), "--count", "4", "--steps", "1"]


def _exported(runs: Runs, payload: Payload) -> list[str]:
    return ["Llama.weights", str(_with_metadata(runs, "Llama", payload)), "--out", str(runs.folder / "exported")]


def _loaded(runs: Runs, payload: Payload) -> list[str]:
    folder = numbered(_with_metadata(runs, "Llama", payload))[4]
    (folder / "manifest.json").unlink()
    return runs.command("Llama", runs.folder / "payload-out", "--checkpoint.initial_load_path", folder)


def _published(runs: Runs, payload: Payload) -> list[str]:
    path = runs.folder / "published.pt"
    path.write_bytes(_saved(payload))
    return ["SIT.sample", str(path)]


def _encoder(runs: Runs, payload: Payload) -> list[str]:
    folder = _copied(runs.folder / "digits", runs.folder / "payload-digits", runs)
    for path in folder.iterdir():
        path.write_bytes(_saved(payload))
    return runs.command("SIT", runs.folder / "payload-out", "--objective.encoder_folder", folder)


def _encoder_of_hub(runs: Runs, payload: Payload) -> list[str]:
    folder = _hub_folder(runs.folder / "dinov2", payload, {"model_type": "dinov2", "hidden_size": 16})
    more = ("--objective.encoder", "dinov2-b", "--objective.encoder_folder", folder, "--model.z_dim", 768)
    return runs.command("SIT", runs.folder / "payload-out", *more)


def _autoencoder(runs: Runs, payload: Payload) -> list[str]:
    import numpy as np
    from PIL import Image

    folder = _hub_folder(runs.folder / "vae", payload, {"_class_name": "AutoencoderKL"}, "diffusion_pytorch_model.bin")
    images = runs.folder / "images/one"
    images.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(images / "a.png")
    converted = runs.folder / "converted"
    forked(program("SIT.prepare", "convert", images.parent, "--out", converted, "--size", "32"))
    return ["SIT.prepare", "encode", str(converted), "--vae", str(folder), "--device", "cpu"]


def _init_from(runs: Runs, payload: Payload) -> list[str]:
    folder = _hub_folder(runs.folder / "gpt2", payload, {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})
    return runs.command("nanoGPT", runs.folder / "payload-out", "--init_from", folder)


def _tokenizer_code(runs: Runs, mark: Path) -> list[str]:
    runs.finished("Llama")
    folder = _copied(runs.folder / "llama_corpus", runs.folder / "payload-corpus", runs)
    (folder / "code.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Own:\n    pass\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    own = {"auto_map": {"AutoTokenizer": ["code.Own", "code.Own"], "AutoConfig": "code.Own"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | own | {"tokenizer_class": "Own"}))
    (folder / "config.json").write_text(json.dumps(own | {"model_type": "own"}))
    return runs.command("Llama", runs.folder / "payload-out", "--model.hf_assets_path", folder)


def _archive(runs: Runs, payload: Payload) -> list[str]:
    import numpy as np

    data = io.BytesIO()
    np.save(data, np.array([payload], dtype=object), allow_pickle=True)
    path = runs.folder / "payload.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", data.getvalue())
    return ["SIT.evaluate", str(path), "--reference", str(path)]


def _hub_folder(folder: Path, payload: Payload, config: dict, file: str = "pytorch_model.bin") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / file).write_bytes(_saved(payload))
    return folder


def _copied(source: Path, target: Path, runs: Runs) -> Path:
    _ = runs.sit_config  # makes the encoder
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target
