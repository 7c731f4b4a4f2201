"""Typed sections that are read from YAML: unknown keys are errors that name the nearest known one."""

from __future__ import annotations

import difflib
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from harden.errors import HardenError

Kind = TypeVar("Kind", bound=BaseModel)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """The mapping in a YAML file. Raises HardenError for a missing file, bad YAML, or anything but a mapping."""
    try:
        text = path.read_text(encoding="utf-8")
        twice = _key_given_twice(yaml.compose(text, yaml.SafeLoader))
        data = yaml.safe_load(text)
    except FileNotFoundError:
        raise HardenError(f"no such {what}: {path}") from None
    except IsADirectoryError:
        raise HardenError(f"{path} is a folder; give a {what} file (.yaml)") from None
    except RecursionError:
        raise HardenError(f"cannot read {what} {path}: an alias (*name) stands inside what it names") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).replace('in "<unicode string>", line', "in line").split())
        raise HardenError(f"cannot read {what} {path}: {reason}") from None
    if twice:
        raise HardenError(
            f"cannot read {what} {path}: the key '{twice.value}' in line {twice.start_mark.line + 1} is given twice"
        )
    if not isinstance(data, dict):
        raise HardenError(f"{what} {path} is not a mapping of keys to values")
    return data


def _key_given_twice(node: yaml.Node | None) -> yaml.ScalarNode | None:
    """The first key that stands twice in one mapping, where YAML's own rule lets the last one win in silence."""
    inside: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for place, key in enumerate(keys):
            if key.value in [other.value for other in keys[:place]]:
                return key
        inside = [value for _, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        inside = node.value
    return next(filter(None, map(_key_given_twice, inside)), None)


def validated(kind: type[Kind], data: dict[str, Any], label: str) -> Kind:
    """`data` as a section. Raises HardenError with every problem found, each with its key."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise HardenError(f"{label}: {explain(error, kind)}") from None


def explain(error: ValidationError, kind: type[BaseModel], inside: str = "") -> str:
    """Every problem of the error, with its key. inside: what stands before the keys of `kind` in the user's file."""
    return "; ".join(_explain(problem, kind, inside) for problem in error.errors())


def merge(base: dict, over: dict) -> dict:
    """`base` with the values of `over` laid over it, section by section."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _explain(problem: dict, kind: type[BaseModel], inside: str) -> str:
    own = ".".join(map(str, problem["loc"]))
    key = inside + own
    if problem["type"] == "extra_forbidden":
        nearest = nearest_key(own, kind)
        return f"unknown key '{key}'" + (f"; did you mean '{inside}{nearest}'?" if nearest else "")
    if problem["type"] == "missing":
        return f"'{key}' is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"'{key}': {message}" if own else message
    if problem["type"] == "model_type":
        return f"'{key}': should be a section of keys, got {problem['input']!r}"
    hint = ""
    if problem["type"] == "string_type" and isinstance(problem["input"], bool):
        hint = " (YAML reads No, Yes, on and off without quotes as true or false: put it in quotes)"
    return f"'{key}': {message[0].lower()}{message[1:]}, got {problem['input']!r}{hint}"


def nearest_key(key: str, kind: type[BaseModel]) -> str | None:
    """The dotted key of a section most like `key`: part by part where that works, else the most like it of all."""
    known = _all_keys(kind)
    nearest = ""
    for part in key.split("."):
        siblings = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == nearest]
        match = difflib.get_close_matches(part, siblings, 1, 0.65)
        if not match:
            break
        nearest = f"{nearest}.{match[0]}" if nearest else match[0]
    else:
        return nearest
    leaves = {k.rpartition(".")[2]: k for k in known}
    match = difflib.get_close_matches(key.rpartition(".")[2], leaves, 1, 0.7)
    return leaves[match[0]] if match else next(iter(difflib.get_close_matches(key, known, 1)), None)


def describe_keys(
    kind: type[BaseModel], prefix: str = "", given: BaseModel | None = None, optional: bool = False
) -> Iterator[str]:
    """Every key, as an option with its default and its meaning. given: a section that holds defaults of its own.
    optional: the section need not be there."""
    for name, field in kind.model_fields.items():
        default = field.get_default(call_default_factory=True) if given is None else getattr(given, name)
        section = _section(field.annotation)
        if section is not None:
            given_inside = default if isinstance(default, BaseModel) else None
            if default is None:
                yield f"--{prefix}{name} (null)\n{_meaning(field)}"
            yield from describe_keys(section, f"{prefix}{name}.", given_inside, default is None)
            continue
        required = f"required with {prefix[:-1]}" if optional else "required"
        shown = required if default is PydanticUndefined else json.dumps(to_jsonable_python(default))
        yield f"--{prefix}{name} ({shown})\n{_meaning(field)}"


def _meaning(field: FieldInfo) -> str:
    return textwrap.fill(field.description or "", 100, initial_indent="    ", subsequent_indent="    ")


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section that a field is, or may be."""
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _all_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        inner = _section(field.annotation)
        keys += _all_keys(inner, f"{prefix}{name}.") if inner else []
    return keys
