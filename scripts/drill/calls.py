"""bad calls in code: refused in one line by this repository

Invalid options, tensors, groups, states, models and folders, passed to the public functions. A fault is handled by a
one-line exception that this repository raises for it, not by a later KeyError or ZeroDivisionError; optimizers also
take a step.
"""

import copy
import math
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from scripts.drill.harness import Cases, Outcome, crashed, forked, thinned
from scripts.drill.runs import ROOT, Runs

ACCIDENTS = (KeyError, IndexError, AttributeError, ZeroDivisionError, AssertionError, RecursionError, OverflowError)
NUMBERS = (-1.0, math.nan, math.inf, "1e-3", [1e-3], 1j)
OPTIONS: dict[str, tuple] = {  # option of an optimizer -> invalid values
    "lr": NUMBERS,
    "weight_decay": NUMBERS,
    "momentum": (-0.1, 1.0, 2.0, math.nan, "0.9"),
    "betas": ((0.9,), (0.9, 1.0), (-0.1, 0.9), (math.nan, 0.9), 0.9, "ab", None),
    "eps": (-1e-8, math.nan, math.inf, "x"),
    "scale": (-1.0, math.nan, math.inf, "x"),
    "ns_steps": (-1, 1.5, "5", True, 1000),
    "ns_coefficients": ("newton", (1.0, 2.0), (math.nan, 1.0, 1.0), 3, ()),
    "ns_dtype": ("float7", "int8", 5),
    "ns_form": ("round", 3),
    "state_dtype": ("float7", "int4", 5),
    "wire_dtype": ("float7", 5),
    "to_owner_dtype": ("int4", "float32", 5),
    "weight_rounding": ("up", 5),
    "nesterov": ("no", 1.5),
    "adjust_lr_fn": ("guess", 5),
    "qkv_split": (0, -1, 1.5, 3, "x", (), (3,), (0, 1), (1, 1.5), (5, 2)),
    "qkv_dim": (2, -1, 1.5, "x"),
    "as_matrices": ("guess", 5),
    "process_group": ("gloo", 5),
    "nosuch": (1,),
}
CONSTRUCTORS = ("OLion", "Muon", "AdaMuon", "Lion", "AdamW")


def cases(runs: Runs, quick: bool) -> Cases:
    """Yield every bad call."""
    for name, call in thinned(list(_all(runs.folder)), quick, keep=20):
        yield name, partial(_attempt, call)


def _attempt(call: Callable[[], Any]) -> str | None:
    return _judge(forked(partial(_called, call)))


def _called(call: Callable[[], Any]) -> None:
    """Call, and print the exception's type, whether it was raised in this repository, and its message."""
    try:
        call()
    except Exception as error:
        here = Path(traceback.extract_tb(error.__traceback__)[-1].filename).is_relative_to(ROOT)
        here = here or isinstance(error, OSError)  # names its file and reason
        accident = isinstance(error, ACCIDENTS)
        print(f"{type(error).__name__}{' by accident' * accident}{' elsewhere' * (not here)}\n{error}")


def _judge(outcome: Outcome) -> str | None:
    if crash := crashed(outcome):
        return crash
    kind, *lines = outcome.out.strip().splitlines() or ["accepted"]
    if len(lines) != 1 or " " in kind:
        return f"{kind}: {' | '.join(lines)[:200]}"
    return None


def _all(folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    for constructor in CONSTRUCTORS:
        for option, values in OPTIONS.items():
            if not _ignored(constructor, option):
                for value in values:
                    yield f"{constructor}({option}={value!r})", partial(_stepped, constructor, {option: value})
        for name, params in _bad_params().items():
            yield f"{constructor}({name})", partial(_stepped, constructor, {}, params)
    yield from _builds()
    yield from _states()
    yield from _functions(folder)


def _ignored(constructor: str, option: str) -> bool:
    """Return whether an optimizer does not have an option; of these only "nosuch" is tried."""
    import inspect

    import optimizers

    return option not in inspect.signature(getattr(optimizers, constructor)).parameters and option != "nosuch"


def _stepped(constructor: str, options: dict[str, Any], params: Callable[[], Any] | None = None) -> None:
    import torch

    import optimizers

    torch.manual_seed(0)
    given = params() if params else [torch.nn.Parameter(torch.randn(4, 8))]
    optimizer = getattr(optimizers, constructor)(given, **options)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def _bad_params() -> dict[str, Callable[[], Any]]:
    import torch

    def matrix(*shape: int, **options: Any) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.zeros(*shape or (4, 8), **options))

    same = matrix()
    return {
        "no params": list,
        "None": lambda: None,
        "a single tensor": matrix,
        "a number": lambda: [5],
        "text": lambda: "weights",
        "the same tensor twice": lambda: [same, same],
        "the same tensor in two groups": lambda: [{"params": [same]}, {"params": [same]}],
        "a group without params": lambda: [{"lr": 1e-3}],
        "a group with an option of another rule": lambda: [{"params": [matrix()], "adjust_lr_fn": 1, "ns_step": 1}],
        "a group with a negative lr": lambda: [{"params": [matrix()], "lr": -1.0}],
        "a group of an unknown rule": lambda: [{"params": [matrix()], "rule": "adam"}],
        "a complex tensor": lambda: [matrix(dtype=torch.complex64)],
        "a float8 tensor": lambda: [torch.nn.Parameter(torch.zeros(4, 8).to(torch.float8_e4m3fn))],
        "an integer tensor": lambda: [torch.nn.Parameter(torch.zeros(4, 8, dtype=torch.int32), requires_grad=False)],
        "a non-leaf tensor": lambda: [matrix() * 2],
    }


def _builds() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield calls of build_optimizer and roles_of."""
    import torch
    from torch import nn

    from optimizers import Probe, build_optimizer, orthogonalize, probe, roles_of

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 4))

    for name, given in {"a list": [], "None": None, "parameters": list(model().parameters()), "text": "gpt"}.items():
        yield f"build_optimizer({name})", partial(build_optimizer, given, lr=1e-3)
    for name in ("adam", "", "oilon", None, 5):
        yield f"build_optimizer(name={name!r})", partial(build_optimizer, model(), name, lr=1e-3)
    for option in ("lr", "adamw_lr", "weight_decay", "adamw_eps"):
        for value in (-1.0, math.nan, math.inf, "x"):
            yield (
                f"build_optimizer({option}={value!r})",
                partial(build_optimizer, model(), **{"lr": 1e-3, option: value}),
            )
    for option, value in {
        "adamw_betas": (0.9, 1.5),
        "qkv_split": {"*.nowhere": 3},
        "as_matrices": {"*.nowhere": "flatten"},
        "roles": {"0.weight": "queen"},
        "nosuch": 1,
        "momentum": 0.9,
        "process_group": "gloo",
    }.items():
        yield f"build_optimizer({option}={value!r})", partial(build_optimizer, model(), lr=1e-3, **{option: value})
    yield "build_optimizer(no parameters)", lambda: build_optimizer(nn.Identity(), lr=1e-3)
    yield "roles_of(None)", lambda: roles_of(None)
    yield "roles_of(an unknown role)", lambda: roles_of(model(), {"0.weight": "queen"})
    yield "roles_of(a name that is none)", lambda: roles_of(model(), {"nowhere": "matrix"})
    for name, value in {
        "None": None,
        "a vector": torch.ones(3),
        "integers": torch.ones(2, 2).int(),
        "a list": [[1.0]],
    }.items():
        yield f"orthogonalize({name})", partial(orthogonalize, value)
    for option, value in {"ns_steps": -1, "ns_coefficients": "newton", "form": "round", "eps": math.nan}.items():
        yield f"orthogonalize({option}={value!r})", partial(orthogonalize, torch.ones(2, 2), **{option: value})
    yield "Probe(None)", lambda: Probe(None)
    yield "Probe(every=0)", lambda: Probe(build_optimizer(model(), lr=1e-3), every=0)
    yield "probe(of torch's SGD)", lambda: probe(torch.optim.SGD(model().parameters(), lr=0.1))


def _states() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield states that an optimizer cannot load, and parameters that change shape."""
    import torch

    import optimizers

    def built(constructor: str) -> tuple[torch.nn.Parameter, Any]:
        parameter = torch.nn.Parameter(torch.randn(4, 8))
        optimizer = getattr(optimizers, constructor)([parameter])
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return parameter, optimizer

    def load(constructor: str, change: Callable[[dict], Any]) -> None:
        _, optimizer = built(constructor)
        state = copy.deepcopy(optimizer.state_dict())
        changed = change(state)
        optimizer.load_state_dict(state if changed is None else changed)

    def resized(constructor: str) -> None:
        parameter, optimizer = built(constructor)
        parameter.data = torch.zeros(2, 3)
        parameter.grad = torch.ones(2, 3)
        optimizer.step()

    def other_gradient(constructor: str) -> None:
        parameter, optimizer = built(constructor)
        parameter.grad = None
        parameter.data = torch.zeros(8, 8)
        parameter.grad = torch.ones(8, 8)
        optimizer.step()

    def first(state: dict) -> dict:
        return next(iter(state["state"].values()))

    def of_nan(state: dict) -> None:
        for key, value in first(state).items():
            first(state)[key] = value * math.nan

    changes = {
        "an empty state": lambda state: {},
        "no groups": lambda state: state | {"param_groups": []},
        "None": lambda state: "state",
        "a group more": lambda state: state["param_groups"].append(dict(state["param_groups"][0])),
        "buffers of another shape": lambda state: first(state).update({key: torch.ones(3, 3) for key in first(state)}),
        "NaN": of_nan,
        "text for a buffer": lambda state: first(state).update(dict.fromkeys(first(state), "x")),
        "a negative lr": lambda state: state["param_groups"][0].update(lr=-1.0),
    }
    for constructor in CONSTRUCTORS:
        for name, change in changes.items():
            yield f"{constructor}.load_state_dict({name})", partial(load, constructor, change)
        yield f"{constructor}: a resized parameter", partial(resized, constructor)
        yield f"{constructor}: a larger parameter", partial(other_gradient, constructor)


def _functions(folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield calls of schedule, checkpoint, config, corpus, and the experiments' models."""
    import torch

    from common import checkpoint
    from common.config import from_dict
    from common.manifest import read_manifest, verify_manifest
    from common.optimizer_config import OptimizerConfig
    from common.runlog import read_metrics
    from common.schedule import ScheduleConfig, multiplier
    from nanoGPT import data
    from nanoGPT.model import GPT, GPTConfig
    from nanoGPT.train import Config
    from SIT.model import ModelConfig, SiT

    for option, value in {"decay": "steep", "floor": 2.0, "warmup": -1, "steps": 0}.items():
        whole = {"steps": 10, "warmup": 2}
        yield f"multiplier({option}={value!r})", partial(multiplier, 3, **whole | {option: value})
        if option != "steps":
            yield f"ScheduleConfig({option}={value!r})", partial(ScheduleConfig, **{option: value})
    linear = torch.nn.Linear(2, 2)
    sgd = torch.optim.SGD(linear.parameters(), lr=0.1)
    yield "checkpoint.save(keep=0)", lambda: checkpoint.save(folder / "c", 1, linear, sgd, {}, keep=0)
    yield "checkpoint.save(extra of a set)", lambda: checkpoint.save(folder / "c", 1, linear, sgd, {"a": {1}})
    yield "checkpoint.save(in a file)", lambda: checkpoint.save(Path("/dev/null/x"), 1, linear, sgd, {})
    for manifest in (read_manifest, verify_manifest):
        for path in ("/nonexistent", "/dev/null", "/"):
            yield f"{manifest.__name__}({path})", partial(manifest, path)
    yield "read_metrics(a folder without)", lambda: read_metrics("/nonexistent")
    for mapping in ({"stepz": 1}, {"steps": "x"}, {"steps": 0}, {"model": 3}, {"optimizer": {"lr": "x"}}, {"clip": -1}):
        yield f"from_dict({mapping})", partial(from_dict, Config, mapping)
    for option, value in {"lr": math.inf, "weight_decay": math.nan, "adamw_lr": -1.0}.items():
        yield f"OptimizerConfig({option}={value})", partial(OptimizerConfig, **{option: value})
    yield "OptimizerConfig().peak_lr()", lambda: OptimizerConfig().peak_lr()
    for name in ("gpt9", "", None):
        yield f"data.tokenizer({name!r})", partial(data.tokenizer, name)
    for path in ("/nonexistent", "/dev/null"):
        yield f"data.load({path})", partial(data.load, path, "train")
    for option, value in {
        "n_layer": 0,
        "n_head": 3,
        "n_embd": -4,
        "context": 0,
        "vocab_size": -1,
        "dropout": 2.0,
    }.items():
        shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "context": 8, "vocab_size": 32}
        yield f"GPT({option}={value})", lambda whole=shape | {option: value}: GPT(GPTConfig(**whole))
    for option, value in {"size": "SiT-Q/2", "n_head": 3, "depth": -1, "patch_size": 3, "n_class": 0}.items():
        shape = {"size": "", "patch_size": 2, "depth": 1, "width": 16, "n_head": 2, "input_size": 8, "channels": 1}
        yield f"SiT({option}={value!r})", lambda whole=shape | {option: value}: SiT(ModelConfig(**whole))
