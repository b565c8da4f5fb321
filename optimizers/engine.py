"""The one torch.optim.Optimizer that runs every rule, param group by param group."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim.optimizer import ParamsT

from .checks import closest, name_of
from .layout import local_of
from .matrices import shape_in
from .plan import make_plan
from .precision import state_dtype
from .rule import UpdateRule, rule_named
from .update import ParamsUpdate

# Group keys that belong to the engine or to torch and its schedulers, not to a rule.
_COMMON_KEYS = {"params", "param_names", "rule", "name", "initial_lr"}


class RuleOptimizer(torch.optim.Optimizer):
    """Runs update rules; `OLion(...)`, `Muon(...)` and the others build one.

    Args:
        params: tensors, (name, tensor) pairs or param groups, as for any torch optimizer. A group may name its own
            `rule`; it then takes that rule's defaults, but the optimizer's lr and weight_decay.
        rule: the name of a registered rule, for the groups that name none.
        process_group: the ranks that hold the same plain tensors and gradients (DDP), and share the work. Without it
            each process works by itself. DTensors say themselves where they are.
        options: the rule's options, by name.

    Building under a process group or with DTensors is a collective: all of their ranks must do it.

    Raises ValueError, when built, for an unknown rule or option, a value out of range, a tensor or layout the rule
    cannot do, and ranks that disagree on the parameters.

    Attributes:
        plan: what `step` will do: routes, owners, bytes; print it.

    Example:
        >>> groups = [{"params": matrices}, {"params": others, "rule": "adamw", "lr": 3e-4}]
        >>> optimizer = RuleOptimizer(groups, "olion", lr=1e-3)
    """

    def __init__(self, params: ParamsT, rule: str, *, process_group: ProcessGroup | None = None, **options):
        known = rule_named(rule).defaults
        _refuse_unknown(options, known, rule)
        super().__init__(params, {**known, **options, "rule": rule})
        self._process_group = process_group
        self.plan = make_plan(self.param_groups, process_group)

    def add_param_group(self, param_group: dict) -> None:
        """Add a group, complete its options from its rule's defaults, check it, and make its state."""
        rule = rule_named(param_group.get("rule", self.defaults["rule"]))
        _refuse_unknown(param_group, rule.defaults.keys() | _COMMON_KEYS, rule.name)
        inherited = self.defaults
        if rule.name != self.defaults["rule"]:
            inherited = {name: self.defaults[name] for name in ("lr", "weight_decay")}
        super().add_param_group({**rule.defaults, **inherited, "rule": rule.name, **param_group})
        group = self.param_groups[-1]
        for foreign in self.defaults.keys() - rule.defaults.keys() - _COMMON_KEYS:
            del group[foreign]  # torch hands every group the optimizer's defaults, also a group of another rule
        try:
            _check(group, rule)
            if hasattr(self, "plan"):  # not while the first groups are added
                self.plan = make_plan(self.param_groups, self._process_group)
        except ValueError:
            self.param_groups.pop()
            raise
        for param in group["params"]:
            self.state[param] = _new_state(param, group, rule)

    def __setstate__(self, state: dict) -> None:
        """Restore a copy or a pickle; of plain tensors it steps by itself, in no process group.

        torch calls this after loading a state, too.
        """
        super().__setstate__(state)
        if not hasattr(self, "plan"):
            self._process_group = None
            self.plan = make_plan(self.param_groups, None, ask=False)

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """Update every parameter that has a gradient; returns the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, routed in zip(self.param_groups, self.plan.routed, strict=True):
            for part in routed:
                params = [group["params"][i] for i in part.indices]
                update = ParamsUpdate(params, group, self.state, part.route.matrix_shapes)
                update.whole_step() if update.rule.whole_step else part.route.run(update)
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        """Load a state dict of the same rules over the same tensors; ValueError, changing nothing, for another one.

        State keeps the dtype, device and memory that it was built with.
        """
        saved_ids = [each for group in state_dict["param_groups"] for each in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        saved = dict(zip(params, (state_dict["state"].get(each, {}) for each in saved_ids), strict=False))
        self._refuse_other(state_dict["param_groups"], saved)
        state = self.state
        super().load_state_dict({**state_dict, "state": {}})  # the groups; torch would cast state to the weights' dtype
        self.state = state
        self.plan = make_plan(self.param_groups, self._process_group, ask=False)  # for the loaded options
        for param, buffers in saved.items():
            for name, buffer in buffers.items():
                self.state[param][name].copy_(buffer)

    def _refuse_other(self, saved_groups: list[dict], saved: dict[Tensor, dict[str, Tensor]]) -> None:
        required, got = _outline(self.param_groups), _outline(saved_groups)
        if required != got:
            raise ValueError(
                f"the state must be of param groups (rule, parameters) {required}; got {got}; "
                "build the optimizer that the state was saved from"
            )
        for group, saved_group in zip(self.param_groups, saved_groups, strict=True):
            _check({**group, **saved_group, "params": group["params"]}, rule_named(group["rule"]))
        named = ((name_of(group, i), param) for group in self.param_groups for i, param in enumerate(group["params"]))
        differences = [
            f"{name} needs {required}, got {got}"
            for name, param in named
            if (required := _shapes(self.state[param])) != (got := _shapes(saved[param]))
            and (got or param.requires_grad)  # torch saves the state of frozen parameters, and does not hand it back
        ]
        if differences:
            raise ValueError(
                f"the state must fit the parameters; of {len(differences)} that do not: {'; '.join(differences[:3])}; "
                "load it into the model and layout that it is of, or through torch.distributed.checkpoint.state_dict"
            )

    def state_size(self) -> int:
        """Return the bytes of state that this process holds."""
        buffers = [local_of(value) for state in self.state.values() for value in state.values()]
        return sum(buffer.numel() * buffer.element_size() for buffer in buffers)


def _outline(groups: list[dict]) -> list[tuple[str | None, int]]:
    return [(group.get("rule"), len(group["params"])) for group in groups]


def _shapes(buffers: dict[str, Tensor]) -> dict[str, tuple]:
    """Describe what can be copied into what: shapes and, of DTensors, placements."""
    return {
        name: (*getattr(buffer, "shape", [type(buffer).__name__]), *getattr(buffer, "placements", ()))
        for name, buffer in buffers.items()
    }


def _new_state(param: Tensor, group: dict, rule: UpdateRule) -> dict[str, Tensor]:
    state = {name: torch.zeros_like(param, dtype=state_dtype(param, group)) for name in rule.state}
    scalars = {name: torch.zeros((), dtype=torch.float32, device=param.device) for name in rule.scalars}
    return {name: buffer.detach() for name, buffer in {**state, **scalars}.items()}


def _check(group: dict, rule: UpdateRule) -> None:
    for name in ("lr", "weight_decay", "eps", "scale"):
        value = group.get(name, 0.0)
        _require(isinstance(value, int | float | Tensor) and value >= 0, name, "a number, 0 or more", value)
    for name in ("ns_dtype", "state_dtype", "wire_dtype"):
        value = group.get(name)
        real = isinstance(value, torch.dtype) and value.is_floating_point
        _require(value is None or real, name, "a floating-point torch.dtype or None", value)
    betas = group.get("betas", (0.0, 0.0))
    _require(isinstance(betas, tuple | list) and len(betas) == 2, "betas", "two numbers in [0, 1)", betas)
    for name, value in [("betas", betas[0]), ("betas", betas[1]), ("momentum", group.get("momentum", 0.0))]:
        _require(isinstance(value, int | float) and 0 <= value < 1, name, "in [0, 1)", value)
    if rule.check:
        rule.check(group)
    for position, param in enumerate(group["params"]):
        name = name_of(group, position)
        if not param.is_floating_point():
            raise ValueError(f"{name}: parameters must be real floating-point tensors, got {param.dtype}; convert it")
        if rule.direct:
            try:
                shape_in(group, param)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None


def _require(holds: bool, name: str, wanted: str, got) -> None:
    if not holds:
        raise ValueError(f"{name} must be {wanted}; got {got!r}")


def _refuse_unknown(options, known, rule: str) -> None:
    for option in options:
        if option not in known:
            names = sorted(set(known) - _COMMON_KEYS)
            raise ValueError(
                f"{rule} has no option {option!r}{closest(option, names)}; its options are {', '.join(names)}"
            )
