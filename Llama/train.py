"""Train a Llama with one of the optimizers through torchtitan, on text or on instructions.

    torchrun --standalone --nproc-per-node 8 -m Llama.train Llama/train_configs/llama2_7b.toml
    torchrun --standalone --nproc-per-node 2 -m Llama.train Llama/train_configs/stdlib.toml --optimizer.name muon
    python -m Llama.train Llama/train_configs/stdlib.toml --job.resume

Ctrl-C or SIGTERM saves a checkpoint and exits. The run's folder, runs/llama/GROUP/NAME, holds metrics.jsonl,
config.json, checkpoint/ and wandb/. The options are torchtitan 0.2.2's, except those that Llama/options.py replaces;
--help lists them.
"""

import hashlib
import json
import logging
import math
import os
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

from common.guard import main_guard
from Llama import help

if __name__ == "__main__":  # --help before the imports below, which take seconds
    main_guard(help.show)

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torchtitan import train as titan
from torchtitan.distributed import ParallelDims
from torchtitan.tools.logging import init_logger

import Llama.spec  # noqa: F401  (registers the TrainSpec)
from common import UserError, gpu, launch
from common.config import refuse_changes, to_dict
from common.rendezvous import read_environment, refuse_taken_port
from common.runlog import END, move_aside
from Llama.checkpoints import Checkpointer
from Llama.checks import fit_precision
from Llama.config import JobConfig, parse_config
from Llama.cpu import on_cpu
from Llama.metrics import name_of, record_of
from Llama.weights import recorded
from optimizers import Probe

titan.CheckpointManager = Checkpointer  # a TrainSpec cannot replace it


class Trainer(titan.Trainer):
    """torchtitan's trainer, with a validation at step 0, timing, probes and stop requests."""

    def __init__(self, job_config: JobConfig, stop_request: launch.StopRequest):
        super().__init__(job_config)
        self.stop_request = stop_request
        if not job_config.training.max_norm:  # torchtitan would scale gradients to 0
            self.job_config = replace(job_config, training=replace(job_config.training, max_norm=math.inf))
        self._micro_batch = 0
        self.timer = self.metrics_processor.timer
        self.watch = Probe(self.optimizers.optimizers[0], model=self.model_parts[0], **job_config.probe.options())
        self.optimizers.register_step_pre_hook(self.before_update)
        self.optimizers.register_step_post_hook(lambda *_: self.timer.stop())

    def init_distributed(self) -> ParallelDims:
        """Join the process group; raises UserError if the ranks' settings differ: they would wait for each other."""
        settings = self.job_config
        join = torch.distributed.init_process_group
        if self.device.type == "cuda" and settings.comm.mode == "default":
            join = partial(join, device_id=self.device)  # as in common/launch.py
        with mock.patch.object(torch.distributed, "init_process_group", join):
            dims = super().init_distributed()
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.process = launch.Process(rank, int(os.environ["LOCAL_RANK"]), world_size, self.device)
        if settings.comm.mode == "default":
            config = to_dict(settings)
            folder = config["job"].pop("dump_folder")  # derived from other settings, so compared last
            launch.refuse_differences({"config": config, "files": files_of(settings), "folder": folder}, self.process)
        return dims

    def batch_generator(self, data_iterable):
        """Open the log and validate; torchtitan calls this once, after loading and before the first step."""
        self.metrics_processor.open(self.step)
        unfinished = not Path(self.job_config.job.dump_folder, END).exists()
        killed_before_its_end = self.step == self.job_config.training.steps and unfinished
        if self.job_config.validation.enable and (self.step == 0 or killed_before_its_end):
            self.validator.validate(self.model_parts, self.step)
        return super().batch_generator(data_iterable)

    def forward_backward_step(self, *, global_valid_tokens: torch.Tensor, **batch) -> torch.Tensor:
        """Turn DDP's mean over ranks into a sum, like FSDP's: torchtitan's losses are shares of the global mean."""
        self._micro_batch = self._micro_batch % self.gradient_accumulation_steps + 1
        last = self._micro_batch == self.gradient_accumulation_steps
        for part in self.model_parts:
            set_gradient_sync(part, last, self.job_config.training.gradient_sync)
        dims = self.parallel_dims
        ranks = dims.dp_replicate if dims.dp_replicate_enabled and not dims.fsdp_enabled else 1
        return super().forward_backward_step(global_valid_tokens=global_valid_tokens / ranks, **batch) / ranks

    def train_step(self, data_iterator) -> None:
        self.timer.start()
        super().train_step(data_iterator)

    def before_update(self, *_) -> None:
        """Run due probes, then start the optimizer's timer."""
        self.metrics_processor.probed = self.watch(self.step)
        self.timer.optimizer()

    def should_continue_training(self) -> bool:
        if not super().should_continue_training():
            return False
        if not self.stop_request.agreed(self.process):
            return True
        settings = self.job_config.checkpoint
        if self.step % settings.interval:  # otherwise already saved
            self.checkpointer.save(self.step, last_step=True)
        saved = settings.enable and not settings.load_only
        after = "the same command with --job.resume continues" if saved else "checkpoints are off"
        titan.logger.info(f"stopped after step {self.step}; {after}")
        return False


def set_gradient_sync(model: nn.Module, is_last: bool, sync: str) -> None:
    """Reduce gradients over ranks at the end of the next backward pass, or keep them local."""
    if isinstance(model, FSDPModule) and sync == "replicas":
        model.set_requires_all_reduce(is_last)
    elif hasattr(model, "set_requires_gradient_sync"):  # FSDP's and DDP's
        model.set_requires_gradient_sync(is_last)


def main() -> None:
    """Read the configuration and train."""
    rank, *_ = read_environment()
    gpu.count()  # raises UserError for GPUs that torch cannot use
    gpu.set_allocator()
    os.environ.setdefault("MASTER_ADDR", "localhost")
    if "RANK" in os.environ:
        refuse_taken_port(rank, timeout_s=600)
    settings = fit_precision(parse_config())
    for name, alone in [("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_PORT", "0")]:
        os.environ.setdefault(name, alone)  # torchrun's; without it this is the only process
    folder = Path(settings.job.dump_folder, settings.job.group, name_of(settings))
    plain = settings.metrics.disable_color_printing or not sys.stdout.isatty()
    settings = replace(
        settings,
        job=replace(settings.job, dump_folder=str(folder)),
        metrics=replace(settings.metrics, disable_color_printing=plain),
    )
    if settings.job.resume:
        same_experiment(folder, settings)
    start_logging()
    train(settings)
    launch.stop()


def start_logging() -> None:
    """Log everything on rank 0, and only warnings on other ranks."""
    init_logger()
    logger = logging.getLogger()
    logger.setLevel(logging.INFO if os.environ["RANK"] == "0" else logging.WARNING)
    noise = ("Building llama",)  # the shape, on twenty lines
    if on_cpu():  # without a peak to look up
        noise += ("Error running lspci", "Peak flops undefined", "Peak FLOPS used")
        warnings.filterwarnings("ignore", message="In CPU autocast, but the target dtype is not supported")
        warnings.filterwarnings("ignore", message="Set timeout is now only supported for either nccl or gloo")
    noise += ("model.safetensors.index.json not found",)  # only torchtitan's export reads it
    logger.handlers[0].addFilter(lambda entry: not entry.getMessage().startswith(noise))


def train(settings: JobConfig) -> None:
    """Train to the last step or a stop request."""
    torch.set_flush_denormal(True)  # saturated attention is subnormal: see nanoGPT/train.py
    trainer, folder = None, Path(settings.job.dump_folder)
    try:
        with launch.StopRequest() as stop_request:
            trainer = Trainer(settings, stop_request)
            if not settings.job.resume:
                launch.on_main(lambda: move_aside(folder))
            trainer.train()
    finally:
        if trainer:
            trainer.close()


def files_of(settings: JobConfig) -> dict[str, str | None]:
    """Return hashes of the names and sizes of the files that a run reads, to compare over ranks."""
    paths = {
        "training.dataset_path": settings.training.dataset_path,
        "validation.dataset_path": settings.validation.dataset_path,
        "validation.pretrain_path": settings.validation.pretrain_path,
        "model.hf_assets_path": settings.model.hf_assets_path,
        "checkpoint.initial_load_path": settings.checkpoint.initial_load_path,
    }
    return {name: digest_of_files(Path(path)) for name, path in paths.items() if path}


def digest_of_files(path: Path) -> str | None:
    """Hash the name and size of a file, or of all files below a folder; None without files."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    sizes = [(file.relative_to(path).as_posix(), file.stat().st_size) for file in files]
    return hashlib.sha256(json.dumps(sizes).encode()).hexdigest() if files else None


def same_experiment(folder: Path, settings: JobConfig) -> None:
    """Raise UserError if a resumed run's model, corpus or optimizer differ; length and logs may change."""
    if not (folder / "config.json").exists():
        return
    was, now = recorded(folder / "config.json"), record_of(settings)
    if was.get("tokenizer") != now["tokenizer"]:
        raise UserError(
            f"--job.resume needs the run's tokenizer; {settings.model.hf_assets_path} holds another: restore it, or "
            "start over without --job.resume"
        )
    training = ("dataset", "dataset_path", "global_batch_size", "lanes", "max_norm", "seq_len")
    names = ["fine_tuning.packing", "fine_tuning.template", "lr_scheduler", "model.flavor", "model.name", "optimizer"]
    names += [f"training.{key}" for key in training]
    but = ("optimizer.lr", "optimizer.tuned_lr", "lr_scheduler.total_steps")  # the rate is in the run's name
    refuse_changes(was, now, names, but, flag="--job.resume")


if __name__ == "__main__":
    launch.main_guard(main, resume="--job.resume")
