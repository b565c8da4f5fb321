"""Configuration: TOML files merged into frozen nested dataclasses, then overridden on the command line by tyro.

    config = parse_config(Config)    # python -m nanoGPT.train nanoGPT/configs/stdlib.toml --optimizer.lr 1e-3

A TOML file may name a parent, `extends = "other.toml"` (relative to itself), which it overrides key by key.
"""

import contextlib
import dataclasses
import difflib
import io
import math
import sys
import tomllib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from common import BadValue, UserError, one_line
from common.options import message_in

Config = TypeVar("Config")


class ConfigError(BadValue):
    """An invalid configuration; the message is one line."""


def parse_config(config_class: type[Config], argv: list[str] | None = None) -> Config:
    """Build `config_class` from `[CONFIG.toml ...] [--section.key value ...]`; later ones win.

    `argv` defaults to the command line. Every field of `config_class`, sections included, needs a default.
    `--help` describes each option by its docstring or comment, with the value from the files as its default.

    Raises ConfigError for a missing file, an unknown key or flag (naming the nearest), or a value of a wrong type.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    values = dataclasses.asdict(cast(Any, config_class()))
    while arguments and not arguments[0].startswith("-"):
        values = _merge(values, _read_toml(config_class, Path(arguments.pop(0))))
    entries, arguments = _take_table_entries(config_class, arguments)
    return _override(_replace(config_class(), _merge(values, entries)), arguments)


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a config to JSON-serializable dicts, lists, strings and numbers."""
    return _plain(dataclasses.asdict(config))


def from_dict(config_class: type[Config], mapping: dict[str, Any]) -> Config:
    """Build a config from a dict that `to_dict` returned; absent keys keep their defaults.

    Raises ConfigError for an unknown key or a value of a wrong type.
    """
    return _replace(config_class(), _checked(config_class, mapping, source="config"))


def refuse_changes(
    was: dict[str, Any], now: dict[str, Any], names: Sequence[str], but: Sequence[str] = (), flag: str = "--resume"
) -> None:
    """Raise UserError if a resumed run's settings (`now`) differ from the checkpoint's (`was`); both from `to_dict`.

    names: settings ("clip", "eval.images") and sections ("model") to compare; but: exceptions among them.
    """
    old, new = _flat(was), _flat(now)
    for name in names:
        for key in new:
            if (key == name or key.startswith(f"{name}.")) and key not in but and old.get(key) != new[key]:
                setting, of_checkpoint, here = _differing(key, old.get(key), new[key])
                raise UserError(
                    f"{flag} needs the {setting} of the checkpoint, {of_checkpoint}; got {here}; set it back, or start "
                    f"over without {flag}"
                )


def _differing(key: str, old: Any, new: Any) -> tuple[str, Any, Any]:
    """Return the name and both values of a setting that differs; of a table, of its first entry that does."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return key, old, new
    name = next(each for each in [*old, *new] if old.get(each, "none") != new.get(each, "none"))
    return _differing(f"{key}.{name}", old.get(name, "none"), new.get(name, "none"))


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """Flatten sections: each setting is named "section.key"."""
    flat = {}
    for key, value in config.items():
        flat |= {f"{key}.{inner}": each for inner, each in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def at_least(least: float, section: Any, *names: str) -> None:
    """Raise ConfigError for a field of a config that is below `least`, infinite or NaN; called in __post_init__."""
    for name in names:
        value = getattr(section, name)
        if not least <= value < math.inf:
            wanted = "finite" if value == math.inf else f"{least} or more"
            raise ConfigError(f"{name} must be {wanted}; got {value}")


# --- TOML files


def _read_toml(config_class: type, path: Path, children: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read and check one file over the files it extends; each is checked alone so that an error names its file."""
    try:
        if path.resolve() in children:
            raise ConfigError(f"{path}: extends itself through {children[-1].name}; remove one `extends`")
        mapping = tomllib.loads(path.read_text(encoding="utf-8"))
    except ConfigError:
        raise
    except FileNotFoundError:
        raise ConfigError(f"config file not found: {path}; name an existing TOML file") from None
    except (OSError, ValueError, RuntimeError) as error:  # symlink loops and deep nesting raise RuntimeError
        raise ConfigError(f"{path}: not a readable TOML file: {one_line(error)}") from None
    parent = mapping.pop("extends", None)
    values = _checked(config_class, mapping, source=str(path))
    if parent is None:
        return values
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: key 'extends' must be a file name, got {parent!r}")
    return _merge(_read_toml(config_class, path.parent / parent, (*children, path.resolve())), values)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both_tables = isinstance(value, dict) and isinstance(below.get(key), dict)
        merged[key] = _merge(below[key], value) if both_tables else value
    return merged


# --- checking a mapping against the dataclasses


def _checked(config_class: type, mapping: dict, source: str, prefix: str = "", root: type | None = None) -> dict:
    """Return the mapping with each value converted to its field's type, or raise a ConfigError that names `source`."""
    root = root or config_class
    hints = typing.get_type_hints(config_class)
    values = {}
    for key, value in mapping.items():
        name = prefix + key
        if key not in hints:
            raise ConfigError(f"{source}: unknown key '{name}'{_nearest(name, _known_keys(root))}")
        if dataclasses.is_dataclass(hints[key]) and isinstance(value, dict):
            values[key] = _checked(hints[key], value, source, prefix=f"{name}.", root=root)
            continue
        if isinstance(value, str) and "\0" in value:
            raise ConfigError(f"{source}: key '{name}' must be text without NUL, got {value!r}")
        try:
            values[key] = _convert(value, hints[key])
        except TypeError:
            wanted, got = _type_name(hints[key]), f"{type(value).__name__} {value!r}"[:200]
            raise ConfigError(f"{source}: key '{name}' must be {wanted}, got {got}") from None
    return values


def _convert(value: Any, wanted: Any) -> Any:
    """Return `value` as the type `wanted`, or raise TypeError; only int to float and list to tuple are converted."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            with contextlib.suppress(TypeError):
                return _convert(value, option)
    elif origin is Literal:
        if any(value == option and type(value) is type(option) for option in arguments):
            return value
    elif origin is tuple and isinstance(value, list | tuple):
        repeated = len(arguments) == 2 and arguments[1] is Ellipsis
        kinds = arguments[:1] * len(value) if repeated else arguments
        if len(kinds) == len(value):
            return tuple(_convert(entry, kind) for entry, kind in zip(value, kinds, strict=True))
    elif origin is list and isinstance(value, list | tuple):
        return [_convert(entry, arguments[0]) for entry in value]
    elif origin is dict and isinstance(value, dict):
        return {key: _convert(entry, arguments[1]) for key, entry in value.items()}
    elif wanted is Any or type(value) is wanted:  # not isinstance: True is an int
        return value
    elif wanted is float and type(value) is int:
        return float(value)
    elif wanted is Path and isinstance(value, str):
        return Path(value)
    raise TypeError


def _replace(config: Config, values: dict[str, Any]) -> Config:
    """Return `config` with checked values, section by section."""
    fields = {}
    for key, value in values.items():
        section = getattr(config, key)
        fields[key] = _replace(section, value) if dataclasses.is_dataclass(section) else value
    try:
        return dataclasses.replace(cast(Any, config), **fields)
    except ValueError as error:  # a section's own __post_init__
        raise ConfigError(f"config: {error}") from error


def _type_name(wanted: Any) -> str:
    if typing.get_origin(wanted) is Literal:
        return "one of " + ", ".join(repr(option) for option in typing.get_args(wanted))
    return wanted.__name__ if isinstance(wanted, type) and not typing.get_args(wanted) else str(wanted)


def _known_keys(config_class: type, prefix: str = "") -> list[str]:
    hints = typing.get_type_hints(config_class)
    keys = []
    for field in dataclasses.fields(config_class):
        keys.append(prefix + field.name)
        if dataclasses.is_dataclass(hints[field.name]):
            keys += _known_keys(hints[field.name], f"{prefix}{field.name}.")
    entries = getattr(config_class, "known_entries", tuple)  # "table.key" of tables whose keys are known
    return keys + [prefix + entry for entry in entries()]


def _nearest(name: str, known: list[str]) -> str:
    """Return the hint that ends an unknown-key error: the same leaf in another section, else the closest spelling."""
    section, _, leaf = name.rpartition(".")
    found = [key for key in known if key.rpartition(".")[2] == leaf]
    found.sort(key=lambda key: not key.startswith(f"{section}."))  # first a table of the same section
    found = found or difflib.get_close_matches(name, known, n=1, cutoff=0.75)  # below that, an unrelated word
    if not found:
        leaves = {key.rpartition(".")[2]: key for key in known}
        found = [leaves[near] for near in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.75)]
    return f"; the nearest known key is '{found[0]}'" if found else "; see --help"


# --- the command line


def _take_table_entries(config_class: type, arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Split off each `--section.table.key VALUE` of a dict field, since tyro knows only the keys that exist already.

    VALUE has TOML syntax; anything else is a string.
    """
    entries: dict[str, Any] = {}
    rest = []
    remaining = iter(arguments)
    for argument in remaining:
        flag, has_value, text = argument.partition("=")
        path, _, key = flag.removeprefix("--").rpartition(".")
        path = path.replace("-", "_")
        if not flag.startswith("--") or not _is_table(config_class, path):
            rest.append(argument)
            continue
        text = text if has_value else next(remaining, "")
        table = entries
        for name in path.split("."):
            table = table.setdefault(name, {})
        table[key] = _toml_value(text)
    return _checked(config_class, entries, source="command line"), rest


def _is_table(config_class: type, path: str) -> bool:
    kind: Any = config_class
    for name in path.split("."):
        kind = typing.get_type_hints(kind).get(name) if dataclasses.is_dataclass(kind) else None
    return typing.get_origin(kind) is dict


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def _override(config: Config, arguments: list[str]) -> Config:
    import tyro  # here: figures read configs without it

    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            config, unknown = tyro.cli(
                type(config),
                default=config,
                args=arguments,
                prog=_program_name(),
                use_underscores=True,
                return_unknown_args=True,
            )
    except SystemExit as exit_request:
        if not exit_request.code:  # --help
            raise
        raise ConfigError(f"command line: {message_in(errors.getvalue())}") from None
    if unknown:
        if not unknown[0].startswith("--"):
            raise ConfigError(f"command line: unexpected {unknown[0]!r}; config files come before the flags")
        flag = unknown[0].removeprefix("--").partition("=")[0]
        raise ConfigError(f"command line: unknown flag '--{flag}'{_nearest(flag, _known_keys(type(config)))}")
    return config


def _program_name() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {spec.name}" if spec else Path(sys.argv[0]).name
    return f"{program} [CONFIG.toml ...]"
