"""The one torch.optim.Optimizer that runs every rule, param group by param group."""

import warnings
from collections import defaultdict
from collections.abc import Callable
from copy import deepcopy
from difflib import get_close_matches

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim.optimizer import ParamsT

from . import owned
from .checks import BadValue, closest, name_of
from .exchange import finish_all
from .layout import local_of
from .line_search import Search, Trial, backtrack, gradients_aside
from .matrices import blocks_in
from .options import checked, outline
from .plan import Plan, make_plan
from .quantized import SCALE
from .rounding import LEAST_CHANGE, REMAINDER
from .rule import RULES, UpdateRule, rule_named, rule_now, rule_of
from .state import fill, fingerprint, new_state, refitted, refuse_resized, refuse_unfit, saved_buffers
from .update import Update

# Group keys that belong to the engine or to torch and its schedulers, not to a rule.
_COMMON_KEYS = {"params", "param_names", "rule", "name", "initial_lr", "steps"}
_OF_ALL_RULES = ("lr", "weight_decay", "weight_rounding")  # options that a group of another rule inherits
_IDENTITY = ("params", "param_names")  # keys that a loaded group does not change
# Keys of schedulers and model libraries that are near an option's name: OneCycleLR, CyclicLR, SWALR, timm.
_FOREIGN_KEYS = {"max_lr", "min_lr", "base_lr", "swa_lr", "lr_scale", "max_momentum", "base_momentum"}


class RuleOptimizer(torch.optim.Optimizer):
    """Runs update rules; OLion, Muon and the others are this class with the options of their rule.

    Args:
        params: tensors, (name, tensor) pairs or param groups, as for any torch optimizer. A group may name its own
            `rule`; it then takes that rule's defaults, but the optimizer's lr, weight_decay and weight_rounding.
        rule: the name of a registered rule, for the groups that name none.
        process_group: the ranks that hold the same plain tensors and gradients (DDP), and share the work. Without it
            each process works alone. DTensors carry their layout.
        options: the rule's options, by name.

    Building under a process group or with DTensors is a collective: all of their ranks must do it.

    Raises ValueError, when built, for an unknown rule or option, a value out of range, a tensor or layout the rule
    cannot do, and ranks that disagree on the parameters.

    Example:
        >>> groups = [{"params": matrices}, {"params": others, "rule": "adamw", "lr": 3e-4}]
        >>> optimizer = RuleOptimizer(groups, "olion", lr=1e-3)
    """

    _stepped = False  # the first step checks that signs are signs
    _to_owners = False  # whether the gradients of matrices reach their owners only
    line_search: Search | None = None  # of the last step

    rule: str | None = None  # a subclass's own

    def __init__(
        self, params: ParamsT, rule: str | None = None, *, process_group: ProcessGroup | None = None, **options
    ):
        rule = rule or self.rule
        if rule is None:
            raise BadValue("RuleOptimizer needs the name of a rule, got none; pass rule='olion', or use OLion")
        known = rule_named(rule).defaults
        refuse_unknown(options, known, rule)
        super().__init__(params, {**known, **options, "rule": rule})
        _check_rounding(self.param_groups, options.get("weight_rounding", "nearest"))
        self._begin(process_group)

    def _begin(self, process_group: ProcessGroup | None, ask: bool = True) -> None:
        self._process_group = process_group
        self._seen = self._fingerprints()
        self._plan = self._planned(ask)
        self._agreed = True

    def _planned(self, ask: bool = True) -> Plan:
        return make_plan(self.param_groups, self._process_group, ask, self._to_owners)

    def keep_at_owners(self) -> None:
        """Expect the gradients of plain matrices on their owners only, and keep the momenta there; see `to_owners.py`.

        A collective of the process group. Raises ValueError for a line search and for DTensors.
        """
        self._to_owners = True
        self._plan = self._planned()
        self._place_state()

    def _wholes(self, param: Tensor, buffers: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: owned.whole(param, buffer, self._process_group) for name, buffer in buffers.items()}

    def _place_state(self) -> None:
        """Keep each buffer that only `prepare` reads on the rank that prepares, where the plan says so."""
        params = [(group, param) for group in self.param_groups for param in group["params"]]
        for (group, param), entry in zip(params, self._plan.entries, strict=True):
            if entry.owner_only and entry.owner is not None:
                everywhere, buffers = {*rule_of(group).refined, REMAINDER}, self.state[param]
                for name in [each for each in buffers if each.removesuffix(SCALE) not in everywhere]:
                    buffers[name] = owned.at_owner(param, buffers[name], entry.owner, self._process_group)

    def add_param_group(self, param_group: dict) -> None:
        """Add a group, complete its options from its rule's defaults, check it, and make its state.

        Keys that are no option of any rule are kept for others to read (schedulers, `lr_scale`).
        """
        if not isinstance(param_group, dict) or "params" not in param_group:
            got = list(param_group) if isinstance(param_group, dict) else type(param_group).__name__
            raise BadValue(f"a param group must be a dict with params; got {got}")
        rule = rule_named(param_group.get("rule", self.defaults["rule"]))
        _refuse_misplaced(param_group, rule)
        inherited = self.defaults
        if rule.name != self.defaults["rule"]:
            inherited = {name: self.defaults[name] for name in _OF_ALL_RULES if name in self.defaults}
        super().add_param_group({**rule.defaults, **inherited, "rule": rule.name, **param_group})
        group = self.param_groups[-1]
        for foreign in self.defaults.keys() - rule.defaults.keys() - _COMMON_KEYS - param_group.keys():
            del group[foreign]  # torch hands every group the optimizer's defaults, also a group of another rule
        if len(set(group["params"])) < len(group["params"]):
            self.param_groups.pop()
            twice = next(i for i, param in enumerate(group["params"]) if param in set(group["params"][:i]))
            raise BadValue(f"a group must hold each parameter once, got {name_of(group, twice)} again; pass it once")
        built = hasattr(self, "_plan")  # not while the first groups are added
        try:
            _check(group, rule)
            if built:
                self._plan = self._planned()
        except ValueError:
            self.param_groups.pop()
            raise
        _count_steps(group, rule)
        for param in group["params"]:
            self.state[param] = new_state(param, group, rule)
        if built:
            self._place_state()  # other owners, perhaps
            self._seen.append([(param, fingerprint(param)) for param in group["params"]])

    def __setstate__(self, state: dict) -> None:
        """Restore a copy or a pickle; of plain tensors it steps by itself, in no process group.

        torch calls this after loading a state, too.
        """
        super().__setstate__(state)
        if not hasattr(self, "_plan"):
            if any(owned.is_held(param, each) for param, buffers in self.state.items() for each in buffers.values()):
                raise BadValue(
                    "an optimizer to copy must have its whole state, got one whose gradients go to owners; copy its "
                    "state by torch.distributed.checkpoint"
                )
            self._begin(None, ask=False)

    # --- changed parameters

    @property
    def plan(self) -> Plan:
        """The plan of `step`, which can be printed: routes, owners, bytes."""
        self._follow()
        return self._plan

    def _follow(self) -> None:
        """Refit state and plan to parameters that were moved, converted or replaced since.

        `model.to(...)` changes a parameter in place; Accelerate replaces those in the groups by FSDP2's.
        """
        seen = self._fingerprints()
        if [[mark for _, mark in group] for group in seen] == [[mark for _, mark in group] for group in self._seen]:
            return
        former = {(g, i): param for g, group in enumerate(self._seen) for i, (param, _) in enumerate(group)}
        state = defaultdict(dict)
        for g, group in enumerate(self.param_groups):
            rule = rule_named(group["rule"])
            _check(group, rule)
            for i, param in enumerate(group["params"]):
                buffers = self.state.get(param)
                if buffers:
                    refuse_resized(group, i, buffers, rule)
                else:
                    buffers = self.state.get(former[g, i], {}) if (g, i) in former else {}
                if self._to_owners:
                    buffers = self._wholes(param, buffers)
                fits = buffers and all(buffers[name].shape == param.shape for name in rule.state)
                state[param] = refitted(buffers, param, group, rule) if fits else new_state(param, group, rule)
        entries = self._plan.entries
        self.state, self._seen = state, seen
        self._plan = self._planned(ask=False)
        self._place_state()
        self._agreed = self._agreed and self._plan.entries == entries

    def _fingerprints(self) -> list[list[tuple[Tensor, tuple]]]:
        return [[(param, fingerprint(param)) for param in group["params"]] for group in self.param_groups]

    @property
    def searches(self) -> bool:
        """Whether a param group has a line search, for which `step` needs a closure."""
        return any(group.get("line_search") for group in self.param_groups)

    def state_dict(self) -> dict:
        """Return the state and the param groups, as any torch optimizer does."""
        self._follow()
        return super().state_dict()

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """Update every parameter that has a gradient; return the closure's loss, if there is a closure.

        A param group with a line search evaluates the closure again, as torch's LBFGS does.
        """
        loss = None
        if self.searches and closure is None:
            raise BadValue(
                "line_search needs a closure that evaluates the loss of the same batch again, got none; "
                "call optimizer.step(closure)"
            )
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._follow()
        if not self._agreed:  # messages have changed: all ranks must agree
            self._plan, self._agreed = self._planned(), True
        if self.searches and closure and loss is not None:
            trials, layouts = self._run(Trial)
            if trials:
                with gradients_aside([param for group in self.param_groups for param in group["params"]]):
                    self.line_search = backtrack(trials, layouts, float(loss), closure)
        self._run(Update)
        self._stepped = True
        return loss

    def _run(self, kind: type[Update]) -> tuple[list, list]:
        """Step the groups without a line search, or make the trials of the others; return updates and layouts."""
        updates, layouts, waiting = [], [], []
        for group, routes in zip(self.param_groups, self._plan.routes, strict=True):
            if bool(group.get("line_search")) != (kind is Trial):
                continue
            rule = rule_now(group)
            for route in (each.of(rule) for each in routes):
                update = kind(route.rule, group, route.indices, self.state, not self._stepped)
                waiting += route.run(update)
                updates.append(update)
                layouts.append(route.entries[0].layout)
            if "steps" in group:
                group["steps"] += 1
        finish_all(waiting)
        return updates, layouts

    def load_state_dict(self, state_dict: dict) -> None:
        """Load a state dict of the same rules and tensors; raise ValueError for another one, changing nothing.

        Parameters are matched by name where both sides have names, else by position. State keeps the dtype, device
        and memory of this optimizer's. Hooks are called as torch calls them.
        """
        self._follow()
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        if missing := {"state", "param_groups"} - state_dict.keys():
            raise BadValue(
                f"the state must be of an optimizer's state_dict(), got no {' and no '.join(sorted(missing))}"
                "; load that"
            )
        buffers_of = saved_buffers(self.param_groups, state_dict)
        loaded = [
            {**_options(group), **deepcopy(saved), **{key: group[key] for key in _IDENTITY if key in group}}
            for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True)
        ]
        for group in loaded:
            _check(group, rule_named(group["rule"]))
            _count_steps(group, rule_named(group["rule"]))
        owned.refuse_missing(buffers_of, self._process_group)
        buffers_of = {param: self._wholes(param, buffers) for param, buffers in buffers_of.items()}
        required = {param: owned.outline(param, self.state[param]) for param in buffers_of}
        refuse_unfit(self.param_groups, required, buffers_of)
        self.__setstate__({"state": self.state, "param_groups": loaded})
        self._plan = self._planned(ask=False)  # for the loaded options
        self._place_state()
        for param, buffers in buffers_of.items():
            mine = owned.here(param, self.state[param])
            fill(mine, {name: buffer for name, buffer in buffers.items() if name in mine})
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def __repr__(self) -> str:
        lines = []
        for group in self.param_groups:
            entries = sum(param.numel() for param in group["params"])
            size = f"{len(group['params'])} tensors, {entries:,} entries"
            lines.append(f"    {group['rule']}: {size}; {outline(_options(group))}")
        return "\n".join([f"{type(self).__name__} (", *lines, ")"])

    def state_size(self) -> int:
        """Return the bytes of state that this process holds."""
        buffers = [local_of(value) for state in self.state.values() for value in state.values()]
        return sum(buffer.numel() * buffer.element_size() for buffer in buffers)


def _options(group: dict) -> dict:
    return {name: group[name] for name in rule_named(group["rule"]).defaults}


def _check_rounding(groups: list[dict], wanted: str) -> None:
    """Refuse a rounding of bfloat16 weights where none are; warn if decay is rounded away."""
    narrow = [group for group in groups if any(param.dtype == torch.bfloat16 for param in group["params"])]
    if wanted != "nearest" and not narrow:
        raise BadValue(
            f"weight_rounding={wanted!r} needs bfloat16 weights, got none; convert the model before, or leave it out"
        )
    for group in narrow:
        shrink = float(group["lr"]) * float(group["weight_decay"])
        if 0 < shrink < LEAST_CHANGE and group.get("weight_rounding", "nearest") == "nearest":
            warnings.warn(
                f"bfloat16 weights do not decay: lr x weight_decay = {shrink:.2g} is rounded away below 2^-9; set "
                "weight_rounding='compensated' or 'stochastic', or keep the weights in float32",
                stacklevel=4,
            )
            return


def _count_steps(group: dict, rule: UpdateRule) -> None:
    """Have a group count its steps if they are not alike: with a period, or with random numbers.

    In the group, not in a parameter's state: the count must be the same on all ranks, whoever has a gradient.
    """
    if rule.period or group.get("state_dtype") == "int8_stochastic" or group.get("weight_rounding") == "stochastic":
        group.setdefault("steps", 0)


def _check(group: dict, rule: UpdateRule) -> None:
    """Convert a group's options to their kinds; ValueError for values and parameters that the rule cannot take."""
    for option in rule.defaults:
        group[option] = checked(option, group[option], rule.kind(option))
    if rule.check:
        rule.check(group)
    for position, param in enumerate(group["params"]):
        name = name_of(group, position)
        if not param.is_floating_point() or param.element_size() == 1:
            raise BadValue(
                f"{name}: parameters must be float64, float32, bfloat16 or float16, got {param.dtype}; convert it"
            )
        if rule.direct:
            try:
                blocks_in(group, param.shape)
            except ValueError as error:
                raise BadValue(f"{name}: {error}") from None


def refuse_unknown(options, known, rule: str) -> None:
    """Raise ValueError for an unknown option, naming the nearest one."""
    for option in options:
        if option not in known:
            raise BadValue(_unknown(option, known, rule))


def _refuse_misplaced(group: dict, rule: UpdateRule) -> None:
    """Refuse a group's key that is another rule's option, or nearly one of this rule's; others are not the engine's."""
    for key in group.keys() - rule.defaults.keys() - _COMMON_KEYS - _FOREIGN_KEYS:
        near = get_close_matches(key, rule.defaults, n=1, cutoff=0.75)
        if near or any(key in other.defaults for other in RULES.values()):
            raise BadValue(_unknown(key, rule.defaults, rule.name))


def _unknown(option: str, known, rule: str) -> str:
    names = sorted(set(known) - _COMMON_KEYS)
    return f"{rule} has no option {option!r}{closest(option, names)}; its options are {', '.join(names)}"
