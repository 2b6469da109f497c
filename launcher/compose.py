"""Compose a configuration from everything that was given, and say all that is wrong with it.

A value comes from, later wins: the defaults of the schema, `configs/peft/<method>.yaml`, the run's own YAML, the make
variables, the `section.option=value` overrides.
"""

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from launcher.config import Config
from launcher.errors import UserError, nearest
from launcher.variables import CONFIGS, DEFAULT_PEFT, Variables, check_data, check_model, shipped


def load(variables: Variables) -> Config:
    """Compose and check the configuration; raises `UserError` with one line a fault."""
    given: dict[str, Any] = _read_yaml(Path(variables.config_file)) if variables.config_file else {}
    for section, option, value in (
        ("model", "name", variables.model),
        ("data", "source", variables.data),
        ("adapter", "method", variables.peft),
        ("parallel", "strategy", variables.strategy),
        ("run", "dir", _run_dir(variables.run)),
    ):
        if value is not None:
            _set(given, [section, option], value)
    for override in variables.overrides:
        path, _, text = override.partition("=")
        _set(given, path.split("."), _parse_value(text))
    method = _method(given)
    tuned = _read_yaml(CONFIGS / "peft" / f"{method}.yaml") if method in shipped("peft") else {}
    config = check(_merge(tuned, given))
    named = {"model.name": check_model(config.model.name), "data.source": check_data(config.data.source)}
    if faults := [f"{path}: {fault}" for path, fault in named.items() if fault]:
        raise UserError(*faults)
    return config


def check(values: dict[str, Any]) -> Config:
    """A `Config` from nested values; raises `UserError` with one line a fault, each with its dotted path."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        # A union tells one fault for each of its members.
        raise UserError(*dict.fromkeys(_fault(e) for e in error.errors())) from None


def options() -> dict[str, Any]:
    """Every option by its dotted path, with its `FieldInfo`."""
    return {
        f"{section}.{option}": info
        for section, field in Config.model_fields.items()
        for option, info in field.annotation.model_fields.items()  # type: ignore[union-attr]
    }


def _run_dir(run: str | None) -> str | None:
    return run if run is None or "/" in run else f"runs/{run}"


def _method(given: dict[str, Any]) -> str:
    adapter = given.get("adapter")
    return str(adapter.get("method", DEFAULT_PEFT)) if isinstance(adapter, dict) else DEFAULT_PEFT


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        raise UserError(f"{path}{f':{where.line + 1}' if where else ''}: not YAML; try one of configs/runs/") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold sections ({', '.join(Config.model_fields)}); try one of configs/runs/")
    return values


def _parse_value(text: str) -> Any:
    """A YAML scalar or list; YAML 1.1 reads 1e-4 as text, pydantic then makes it a number."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _set(values: dict[str, Any], path: list[str], value: Any) -> None:
    for key in path[:-1]:
        if not isinstance(values.get(key), dict):
            values[key] = {}
        values = values[key]
    values[path[-1]] = value


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _fault(error: Any) -> str:
    path = ".".join(str(part) for part in error["loc"][:2])
    if error["type"] == "extra_forbidden":
        known = [*options(), *Config.model_fields]
        return f"{path}: unknown option; {nearest(path, known)} The list is in launcher/config.py"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    default = options()[path].default if path in options() else None
    hint = f"; try {path}={default}" if default is not None else "; try without it"
    if len(error["loc"]) > 2:
        return f"{path}={error['input']}: not a valid value{hint}"
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{path}={error['input']}: {message}{hint}"
