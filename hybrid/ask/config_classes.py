"""Reads a config.json as transformers' config classes do: other names, defaults for what is absent.

The classes' sources are read, not imported: importing one loads torch, which plans go without.
What the classes compute of other fields is :mod:`planner.describe.published`'s.
"""

from __future__ import annotations

import ast
import importlib.util
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from planner.describe.families import are_synonyms, text_key

#: Without these a file is damaged, whatever a class would make of it.
_ESSENTIAL = frozenset(
    (
        *("hidden_size", "d_model", "vocab_size", "num_attention_heads", "n_heads"),
        *("num_hidden_layers", "num_layers", "n_layers"),
        *("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    )
)
_SUB_CONFIGS = ("sub_configs", "sub_configs_defaults")
_OPERATIONS = {ast.Mult: operator.mul, ast.Add: operator.add, ast.Sub: operator.sub}


@dataclass(frozen=True)
class ConfigClass:
    """What the source of a config class says.

    Attributes
    ----------
    defaults
        Fields that have a value unless the file says otherwise.
    names
        Other names of fields, and the field that each stands for.
    parts
        Model types of the configs within it, by field.
    """

    defaults: dict[str, Any] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    parts: dict[str, str] = field(default_factory=dict)


def as_read(config: Mapping[str, Any], family: str | None = None) -> dict[str, Any]:
    """Return ``config`` with fields as transformers calls them, and with its defaults.

    A family that the installed transformers does not know, by ``model_type`` or, for a part of
    another config, by ``family``, is returned as it is.
    """
    given = str(config.get("model_type") or "")
    kind = next((kind for kind in (given, family or "") if config_class(kind)), given)
    known = config_class(kind) or ConfigClass()
    found: dict[str, Any] = {}
    others = {own for name, own in known.names.items() if name in config}
    for name, value in config.items():
        own = known.names.get(name, name)
        if name not in others:
            found[name if are_synonyms(name, own) else own] = value
    if kind:
        found["model_type"] = kind
    inner = text_key(found)
    part = known.parts.get(inner or "text_config")
    if inner is not None:
        text = as_read(found[inner], part)
        if "tie_word_embeddings" in config and "tie_word_embeddings" not in config[inner]:
            text.pop("tie_word_embeddings", None)
        found[inner] = text
    elif part is not None and not _ESSENTIAL.isdisjoint(found):
        # Some composite files have the text's fields among their own.
        own_text = {name: value for name, value in found.items() if name != "model_type"}
        found = {"model_type": kind, "text_config": as_read(own_text, part)}
    missing = known.defaults.keys() - found.keys() - others - _ESSENTIAL
    return found | {name: known.defaults[name] for name in sorted(missing)}


@cache
def config_class(family: str) -> ConfigClass | None:
    """Return what transformers' config class of ``family`` says; None where it has none."""
    source = _sources().get(family)
    if source is None:
        return None
    classes = {
        node.name: node
        for node in ast.parse(source.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    }
    return next(
        (
            _read(node, classes)
            for node in classes.values()
            if _attributes(node, classes).get("model_type") == family
        ),
        None,
    )


@cache
def _sources() -> dict[str, Path]:
    """Return the file of every config class of the installed transformers, by model type."""
    package = importlib.util.find_spec("transformers")
    if package is None or package.origin is None:
        return {}
    found: dict[str, Path] = {}
    for path in sorted(Path(package.origin).parent.glob("models/*/configuration_*.py")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith('    model_type = "'):
                found.setdefault(line.split('"')[1], path)
    return found


def _read(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> ConfigClass:
    values = _attributes(node, classes)
    parts = {}
    for sub_configs in (values.get(name) for name in _SUB_CONFIGS):
        for key, name in (sub_configs or {}).items():
            part = classes.get(name)
            if part is not None:
                parts[key] = str(_attributes(part, classes).get("model_type"))
    fields = _attributes(node, classes, fields=True)
    return ConfigClass(
        defaults={name: value for name, value in fields.items() if value is not None},
        names=values.get("attribute_map") or {},
        parts=parts,
    )


def _attributes(
    node: ast.ClassDef, classes: dict[str, ast.ClassDef], *, fields: bool = False
) -> dict[str, Any]:
    """Return a class's attributes whose values can be read, inherited ones included.

    ``fields`` are those that files have: with an annotation, unless it says that they are the
    class's own.
    """
    found: dict[str, Any] = {}
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in classes:
            found |= _attributes(classes[base.id], classes, fields=fields)
    for statement in node.body:
        match statement:
            case ast.AnnAssign(target=ast.Name(id=name), value=value, annotation=kind):
                if value is not None and fields and "ClassVar" not in ast.unparse(kind):
                    found[name] = _value(value)
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if not fields:
                found[name] = _value(value)
    return found


def _value(node: ast.expr) -> Any:
    """Return what an expression of literals is; a name stands for itself, all else for None."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Dict(keys=keys, values=values):
            return {_value(k): _value(v) for k, v in zip(keys, values, strict=True) if k}
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            return _OPERATIONS[type(op)](_value(left), _value(right))
        case ast.Call(args=[ast.Name(id=name), *_]):  # a class of a part, and whether it may miss
            return name
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None
