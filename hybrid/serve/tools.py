"""Reads the tools that a request offers, and which of them have to be called."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from hybrid.serve.constraints import check_schema
from hybrid.serve.fields import Fields
from hybrid.serve.refusals import Refusal, wrong_value

_MOST_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
NONE, AUTO, REQUIRED = "none", "auto", "required"


@dataclass(frozen=True)
class Tools:
    """What may be called, and what has to be.

    Attributes
    ----------
    offered
        The tools, in the form that chat templates take.
    needed
        Those of which one has to be called; empty where the model chooses.
    several
        Whether more than one call may come.
    field
        The request's field that asks for the calls.
    """

    offered: list[dict[str, Any]] = field(default_factory=list)
    needed: list[dict[str, Any]] = field(default_factory=list)
    several: bool = True
    field: str = "tool_choice"


def tool(name: str | None, described: str | None, schema: Any, within: Fields, at: str) -> Any:
    """Return a tool in the form that chat templates take.

    Parameters
    ----------
    name, described, schema
        What it is called, what it does, and the schema of its arguments.
    within
        Where its name was read.
    at
        The field of the schema.

    Raises
    ------
    Refusal
        When it has no proper name, or no schema of an object.
    """
    if name is None or not _NAME.fullmatch(name):
        wanted = "1 to 64 letters, digits, dots, dashes or underscores"
        raise wrong_value(within.name("name"), name, wanted)
    if schema is None:
        schema = {"type": "object", "properties": {}}
    check_schema(schema, at)
    if schema.get("type", "object") != "object":
        raise wrong_value(f"{at}.type", schema["type"], "object, as arguments have names")
    function = {"name": name, "description": described or "", "parameters": schema}
    return {"type": "function", "function": function}


def read_tools(fields: Fields, *, flat: bool) -> list[dict[str, Any]]:
    """Read ``tools``, whose functions stand apart, or ``flat`` in the tool itself.

    Raises
    ------
    Refusal
        Naming the field; also when two have the same name.
    """
    given = fields.any("tools")
    if given is None:
        return []
    check_count(given)
    found = []
    for at, each in enumerate(given):
        one = Fields(each, f"tools[{at}].")
        kind = one.text("type")
        if kind != "function":
            raise wrong_value(
                one.name("type"), kind, "function: this server has no tools of its own"
            )
        inner = one if flat else Fields(one.any("function"), f"tools[{at}].function.")
        found.append(
            tool(
                inner.text("name"),
                inner.text("description"),
                inner.any("parameters"),
                inner,
                inner.name("parameters"),
            )
        )
        inner.flag("strict")
        inner.finish()
        one.finish()
    check_names(found)
    return found


def check_count(given: Any) -> None:
    """Refuse what is no list of tools, or too many of them."""
    if not isinstance(given, list):
        raise wrong_value("tools", given, "a list of tools")
    if len(given) > _MOST_TOOLS:
        raise Refusal(
            f"tools: {len(given)} are given, the most is {_MOST_TOOLS}",
            param="tools",
            code="invalid_value",
        )


def check_names(tools: list[dict[str, Any]]) -> None:
    """Refuse tools of which two have the same name."""
    known: dict[str, int] = {}
    for at, each in enumerate(tools):
        name = each["function"]["name"]
        if name in known:
            raise Refusal(
                f"tools[{known[name]}] and tools[{at}] are both called {name!r}: give each a name "
                "of its own",
                param=f"tools[{at}]",
                code="invalid_value",
            )
        known[name] = at


def chosen(
    offered: list[dict[str, Any]], choice: Any, several: bool, *, flat: bool = False
) -> Tools:
    """Read ``tool_choice``: none, auto, required, or one by its name.

    Raises
    ------
    Refusal
        When it names what is not offered.
    """
    if choice in (None, AUTO):
        return Tools(offered, several=several)
    if choice == NONE:
        return Tools()
    if choice == REQUIRED:
        if not offered:
            raise wrong_value("tool_choice", choice, "none or auto, as no tools are offered")
        return Tools(offered, offered, several)
    if not isinstance(choice, dict):
        raise wrong_value("tool_choice", choice, "none, auto, required, or a function")
    fields = Fields(choice, "tool_choice.")
    if fields.text("type") != "function":
        raise wrong_value("tool_choice.type", choice.get("type"), "function")
    inner = fields if flat else Fields(fields.any("function"), "tool_choice.function.")
    needed = named(offered, inner.text("name"), inner.name("name"))
    inner.finish()
    fields.finish()
    return Tools(offered, needed, several=False)


def named(offered: list[dict[str, Any]], name: str | None, field: str) -> list[dict[str, Any]]:
    """Return the tool of a name, alone.

    Raises
    ------
    Refusal
        When none has it.
    """
    needed = [each for each in offered if each["function"]["name"] == name]
    if not needed:
        known = ", ".join(each["function"]["name"] for each in offered) or "none at all"
        raise wrong_value(field, name, f"the name of a tool, of which there are {known}")
    return needed
