"""The TrainSpecs "llama2", "llama3.1" and "qwen2.5": the replacements of parts of torchtitan's training."""

from torch import nn
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import build_cross_entropy_loss
from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama3 import parallelize_llama
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec

from common.optimizer_config import OptimizerConfig
from Llama import data, instructions
from Llama.checks import is_fine_tuning
from Llama.config import JobConfig
from Llama.cpu import adapt_model
from Llama.hf import Adapter
from Llama.metrics import MetricsProcessor
from Llama.model import FLAVORS, Llama
from Llama.validate import FixedSequences
from optimizers import build_optimizer


class Optimizers(OptimizersContainer):
    """This repository's optimizer, for a model in one part (checks.py refuses pipelines)."""

    def __init__(self, model_parts: list[nn.Module], settings: OptimizerConfig, parallel_dims: ParallelDims):
        # Under FSDP and tensor parallelism parameters are DTensors with a layout; plain ones need DDP's group.
        group = None
        if parallel_dims.dp_replicate_enabled and not parallel_dims.fsdp_enabled:
            group = parallel_dims.get_mesh("dp_replicate").get_group()
        self.model_parts = model_parts
        self.optimizers = [
            build_optimizer(part, settings.name, process_group=group, **settings.arguments()) for part in model_parts
        ]
        params = [param for part in model_parts for param in part.parameters() if param.requires_grad]
        self._post_init(params, {"lr": settings.peak_lr()})  # torch.optim's, for hooks


def parallelize(model: nn.Module, parallel_dims: ParallelDims, settings: JobConfig) -> nn.Module:
    """Apply torchtitan's parallelisms for Llama."""
    model = parallelize_llama(model, parallel_dims, settings)
    adapt_model(model)
    return model


def build_loader(job_config: JobConfig, **parts) -> BaseDataLoader:
    """Return the training batches of one data-parallel rank, of text or of instructions."""
    kind = instructions if is_fine_tuning(job_config) else data
    return kind.build_loader(job_config=job_config, **parts)


for name, flavors in FLAVORS.items():
    register_train_spec(
        name,
        TrainSpec(
            model_cls=Llama,
            model_args=flavors,
            parallelize_fn=parallelize,
            pipelining_fn=None,
            build_optimizers_fn=Optimizers,
            build_lr_schedulers_fn=build_lr_schedulers,
            build_dataloader_fn=build_loader,
            build_tokenizer_fn=data.build_tokenizer,
            build_loss_fn=build_cross_entropy_loss,
            build_validator_fn=FixedSequences,
            build_metrics_processor_fn=MetricsProcessor,
            state_dict_adapter=Adapter,
        ),
    )
