"""The log of a run: metrics.jsonl in its folder, and Weights & Biases where available."""

import contextlib
import itertools
import json
import math
import netrc
import os
import platform
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import urlsplit

from common import BadValue, UserError, one_line, warn
from common.json_files import is_json, parse_object
from common.whole import write_json, write_text

METRICS_FILE = "metrics.jsonl"
END = "finished.json"
WANDB_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")  # the cloud's, before wandb 0.31 and since
WANDB_TIMEOUT_S = 30  # wandb waits 90 s for its server, which is most of a short run


def run_name(optimizer: str, lr: float, seed: int, adamw_lr: float | None = None) -> str:
    """Return a run's name: "olion-lr6e-4-s1337", or "olion-lr6e-4-adamw2e-3-s1337".

    `adamw_lr`, the rate of the AdamW part (embeddings, head, vectors), is included if it differs from `lr`.
    """
    rest = "" if adamw_lr is None or adamw_lr == lr else f"-adamw{shortest(adamw_lr)}"
    return f"{optimizer}-lr{shortest(lr)}{rest}-s{seed}"


def shortest(value: float) -> str:
    """Format 0.016 as 1.6e-2: one short spelling per rate, the same on every machine."""
    if not value:
        return "0"
    number = Decimal(repr(float(value)))
    exponent = number.adjusted()
    return f"{number.scaleb(-exponent).normalize()}e{exponent}"


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """Return the metrics of a run, one dict per logged step; a half-written last line of a killed run is dropped.

    Raises UserError for any other line that is not an object with a step, FileNotFoundError without a file.
    """
    path = Path(folder) / METRICS_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} must be UTF-8 ({one_line(error)}): restore it, or remove it") from None
    if lines and not is_json(lines[-1]):
        lines.pop()
    return [
        parse_object(line, f"{path}, line {number}", {"step": int}, "remove the line or the file")
        for number, line in enumerate(lines, start=1)
    ]


def move_aside(folder: Path) -> None:
    """Rename the folder of an earlier run of this name to GROUP.old/NAME.1, .2 and so on."""
    if not (folder / METRICS_FILE).exists():
        return
    old = folder.parent.with_name(folder.parent.name + ".old")
    target = next(path for i in itertools.count(1) if not (path := old / f"{folder.name}.{i}").exists())
    old.mkdir(parents=True, exist_ok=True)
    folder.rename(target)
    print(f"an earlier run of this name is now {target}")


def write_end(folder: Path, step: int, metrics: dict[str, float]) -> None:
    """Mark a run as finished, with its last validation; as diverged if that is missing or not finite."""
    loss, bits = (_number(metrics.get(key)) for key in ("val/loss", "val/bits_per_byte"))
    write_json(folder / END, {"step": step, "val_loss": loss, "bits_per_byte": bits, "diverged": loss is None})


class RunLog:
    """Write a run's config.json and metrics.jsonl into `folder`, and the same to Weights & Biases.

    `experiment` "nanogpt" is the wandb project "olion-nanogpt". `wandb_mode` "auto" is online where there is a
    login and offline elsewhere (`wandb sync` uploads later); the environment's WANDB_MODE wins over "auto".
    `resume_step` k keeps the metrics up to step k and the wandb run; None starts both afresh. Where `is_main` is
    False (every rank but 0) nothing is done. A failure of wandb is a warning, never the end of a run.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        config: dict[str, Any],
        experiment: str,
        name: str,
        group: str,
        tags: list[str],
        wandb_mode: Literal["auto", "online", "offline", "disabled"] = "auto",
        resume_step: int | None = None,
        is_main: bool = True,
    ) -> None:
        self._file = self._wandb_run = None
        if not is_main:
            return
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        if resume_step is None:
            (self._folder / METRICS_FILE).unlink(missing_ok=True)
            (self._folder / "wandb_id").unlink(missing_ok=True)
        else:
            self._drop_after(resume_step)
        record = {"experiment": experiment, "name": name, "group": group, "config": config, **machine()}
        write_json(self._folder / "config.json", record, indent=2)
        self._file = open(self._folder / METRICS_FILE, "a", encoding="utf-8")
        mode = _wandb_mode(wandb_mode)
        if mode != "disabled":
            self._start_wandb(mode, project=f"olion-{experiment}", name=name, group=group, tags=tags, config=config)

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Append {"step": step, **metrics}; a value is a number, a string or a tensor of one element."""
        if self._file is None:
            return
        record = {"step": step, **{key: _number(value) for key, value in metrics.items()}}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._wandb_run is not None:
            try:
                # With an explicit step, wandb drops the steps that a resumed run repeats.
                self._wandb_run.log(record, step=step)
            except Exception as error:
                self._give_up_wandb(error)

    def finish(self) -> None:
        """Close the file and the wandb run."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._wandb_run is not None:
            try:
                self._wandb_run.finish()
                self._tell_offline_folders()
            except Exception as error:
                self._give_up_wandb(error)
            self._wandb_run = None

    def _drop_after(self, step: int) -> None:
        """Remove metrics after `step`; warn if earlier ones are missing."""
        path = self._folder / METRICS_FILE
        try:
            kept = [record for record in read_metrics(self._folder) if record["step"] <= step]
        except FileNotFoundError:
            warn(f"{path} is gone: the curves of this run begin after step {step}")
            return
        if not kept:
            warn(f"{path} has no line up to step {step}: the curves of this run begin there")
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))

    def _start_wandb(self, mode: str, **settings: Any) -> None:
        id_file = self._folder / "wandb_id"
        try:
            import wandb  # here: it takes a second, and a run can do without it

            if not id_file.exists():
                write_text(id_file, uuid.uuid4().hex[:8] + "\n")
            self._wandb_run = wandb.init(
                dir=self._folder,
                id=id_file.read_text().strip(),
                resume="allow",
                mode=cast(Any, mode),  # wandb's own Literal
                settings=wandb.Settings(silent=True, console="off", init_timeout=WANDB_TIMEOUT_S),
                **settings,
            )
            for axis in ("step", "tokens"):
                self._wandb_run.define_metric(axis)
            self._wandb_run.define_metric("*", step_metric="step")
            self._wandb_run.define_metric("val/loss", step_metric="step", summary="min")
        except Exception as error:
            if mode == "online":  # a machine with a login may still have no network
                warn(f"Weights & Biases is offline for this run; `wandb sync` uploads it later: {one_line(error)}")
                wandb.teardown()  # or the run id counts as taken
                self._start_wandb("offline", **settings)
            else:
                self._give_up_wandb(error)

    def _tell_offline_folders(self) -> None:
        """Print the command that uploads a resumed run, which has several folders."""
        folders = sorted((self._folder / "wandb").glob("offline-run-*"))
        if len(folders) > 1:
            print(f"wandb has {len(folders)} folders of this run; to upload: wandb sync {' '.join(map(str, folders))}")

    def _give_up_wandb(self, error: Exception) -> None:
        self._wandb_run = None
        warn(f"Weights & Biases is off for this run: {one_line(error)}")


def _number(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value  # torch and numpy scalars
    return None if isinstance(value, float) and not math.isfinite(value) else value  # JSON has no NaN


def _wandb_mode(mode: str) -> str:
    if mode not in ("auto", "online", "offline", "disabled"):
        raise BadValue(f"wandb mode must be auto, online, offline or disabled; got {mode!r}")
    if mode != "auto":
        return mode
    return os.environ.get("WANDB_MODE") or ("online" if _has_login() else "offline")


def _has_login() -> bool:
    """Look for the key of `wandb login` without importing wandb, which would ask for one."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    server = os.environ.get("WANDB_BASE_URL")
    hosts = (urlsplit(server).netloc,) if server else WANDB_HOSTS
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        keys = netrc.netrc(os.environ.get("NETRC"))
        return any(keys.authenticators(host) for host in hosts)
    return False


def machine() -> dict[str, Any]:
    import torch  # here: it takes a second, and reading metrics can do without it

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    # On Linux the cores available to this process, which may be fewer than the machine's.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = {"cpu": _cpu_name(), "cores": cores, "gpus": gpus}
    return {"torch": torch.__version__, "python": platform.python_version(), "machine": machine}


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
