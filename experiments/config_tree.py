"""Frozen nested dataclasses as a typed tree: text in, JSON out and back, differences named. Nothing is executed."""

import dataclasses
import decimal
import difflib
import functools
import math
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any

from experiments.errors import UserError


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Name to type of every field that the constructor takes."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def config_classes(hint: Any) -> dict[str, type]:
    """The dataclasses among the members of a type, by class name."""
    return {
        member.__name__: member
        for member in options(hint)
        if isinstance(member, type) and dataclasses.is_dataclass(member)
    }


def describe(hint: Any) -> str:
    """A type as `--help` and error lines show it."""
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return f"tuple[{', '.join('...' if arg is ... else describe(arg) for arg in typing.get_args(hint))}]"
    if len(options(hint)) > 1:
        return " | ".join(map(describe, options(hint)))
    return "none" if hint is types.NoneType else getattr(hint, "__name__", str(hint))


def show(value: Any) -> str:
    """A value in the spelling that the command line takes."""
    if isinstance(value, tuple | list):
        return f"({', '.join(map(show, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, dict):
        return value["class"]
    if dataclasses.is_dataclass(value):
        return type(value).__name__
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def did_you_mean(text: str, choices: Iterable[str]) -> str:
    close = difflib.get_close_matches(text, list(choices), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


# ---- text to value


def parse_value(hint: Any, text: str, path: str) -> Any:
    """Reads one value of the given type; raises UserError naming the field, the text and the expected type."""
    try:
        return _parse(hint, text)
    except ValueError:
        choices = [describe(option) for option in options(hint)]
        for option in options(hint):
            choices += map(str, typing.get_args(option)) if typing.get_origin(option) is typing.Literal else ()
        expected = "true or false" if hint is bool else describe(hint)
        raise UserError(f"{path}={text}: expected {expected}{did_you_mean(text, choices)}") from None


def _parse(hint: Any, text: str) -> Any:
    # "none" is text too, and of a tuple of texts: what is narrow is tried before what takes anything.
    for option in sorted(options(hint), key=lambda option: (option is str, option is not types.NoneType)):
        try:
            return _parse_option(option, text)
        except ValueError:
            continue
    raise ValueError(text)


def _parse_option(option: Any, text: str) -> Any:
    if option is str:
        return text
    if option is float and math.isfinite(value := float(text)):
        return value
    if option is int:
        return _parse_int(text)
    if option is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if option is types.NoneType and text.lower() == "none":
        return None
    if typing.get_origin(option) is typing.Literal:
        for value in typing.get_args(option):
            if str(value) == text:
                return value
    if typing.get_origin(option) is tuple:
        is_numeric = set(typing.get_args(option)) <= {int, float, ...}
        items = _split_tuple(text.replace(":", ",") if is_numeric else text)
        hints = _element_types(option, len(items))
        return tuple(_parse(hint, item) for hint, item in zip(hints, items, strict=True))
    raise ValueError(text)


def _parse_int(text: str) -> int:
    try:
        value = decimal.Decimal(text)
    except decimal.InvalidOperation:
        raise ValueError(text) from None
    if not value.is_finite() or value.adjusted() > 30 or value != value.to_integral_value():
        raise ValueError(text)
    return int(value)


def _split_tuple(text: str) -> list[str]:
    """`2,4`, `(2,4)`, `[2,4]`, `2:4` (numbers only) or `((0,1),(2,3))` into the texts of its items."""
    items, depth = [""], 0
    for char in text.strip():
        depth += (char in "([") - (char in ")]")
        if char == "," and depth == 0:
            items.append("")
        else:
            items[-1] += char
    if depth:
        raise ValueError(text)
    items = [item.strip() for item in items]
    if len(items) == 1 and items[0][:1] in ("(", "["):
        return _split_tuple(items[0][1:-1])
    return items[:-1] if items[-1] == "" else items


def _element_types(hint: Any, length: int) -> tuple[Any, ...]:
    args = typing.get_args(hint)
    if args[-1:] == (...,):
        return (args[0],) * length
    if len(args) != length:
        raise ValueError(f"{length} entries for {describe(hint)}")
    return args


# ---- overrides


@dataclasses.dataclass(kw_only=True)
class _Node:
    text: str | None = None
    children: dict[str, "_Node"] = dataclasses.field(default_factory=dict)


def apply_overrides(config: Any, overrides: dict[str, str], path: str = "--config") -> Any:
    """The config with `{"model.attention.num_heads": "8", ...}` applied, in whatever order the entries come.

    Raises UserError: one line naming the field, the text, the expected type and, where one is near, what was meant.
    """
    root = _Node()
    for dotted, text in overrides.items():
        node = root
        for name in dotted.split("."):
            node = node.children.setdefault(name, _Node())
        node.text = text
    return _override(type(config), config, root, path)


def _override(hint: Any, current: Any, node: _Node, path: str) -> Any:
    classes = config_classes(hint)
    if node.text in classes:
        return _construct(classes[node.text], _defaults(classes[node.text]), hint, node, path)
    if node.text is not None:
        for option in options(hint):
            if typing.get_origin(option) is tuple and any(map(config_classes, typing.get_args(option))):
                return _new_items(option, node, path)
        value = parse_value(hint, node.text, path)
        if node.children:
            raise UserError(f"{path}.{next(iter(node.children))}: {path} is {node.text} and has no fields")
        return value
    if dataclasses.is_dataclass(current):
        values = {name: getattr(current, name) for name in field_types(type(current))}
        return _construct(type(current), values, hint, node, path)
    if isinstance(current, tuple):
        return _override_items(hint, current, node, path)
    name = next(iter(node.children), "")
    owners = [owner for owner, cls in classes.items() if name in field_types(cls)] or list(classes)
    fix = f" (switch it on with {path}={owners[0]})" if owners else ""
    raise UserError(f"{path}.{name}: {path} is {show(current)} and has no fields{fix}")


def _new_items(hint: Any, node: _Node, path: str) -> tuple:
    """A tuple of configs, given as their class names; `path.0.field` and so on set their fields."""
    try:
        names = _split_tuple(node.text or "")
        hints, children, items = _element_types(hint, len(names)), dict(node.children), []
    except ValueError:
        raise UserError(f"{path}={node.text}: expected {describe(hint)}") from None
    for i, name in enumerate(names):
        child = children.pop(str(i), _Node())
        items.append(_override(hints[i], None, _Node(text=name, children=child.children), f"{path}.{i}"))
    if children:
        raise UserError(f"{path}.{next(iter(children))}: no such entry; {path} has {len(items)}, counted from 0")
    return tuple(items)


def _override_items(hint: Any, current: tuple, node: _Node, path: str) -> tuple:
    tuple_hint = next(option for option in options(hint) if typing.get_origin(option) is tuple)
    hints, items = _element_types(tuple_hint, len(current)), list(current)
    for key, child in node.children.items():
        if not key.isdecimal() or int(key) >= len(items):
            raise UserError(f"{path}.{key}: no such entry; {path} has {len(items)}, counted from 0")
        items[int(key)] = _override(hints[int(key)], items[int(key)], child, f"{path}.{key}")
    return tuple(items)


def _defaults(cls: type) -> dict[str, Any]:
    values = {}
    for f in dataclasses.fields(cls):
        if f.init and f.default is not dataclasses.MISSING:
            values[f.name] = f.default
        elif f.init and f.default_factory is not dataclasses.MISSING:
            values[f.name] = f.default_factory()
    return values


def _construct(cls: type, values: dict[str, Any], hint: Any, node: _Node, path: str) -> Any:
    hints = field_types(cls)
    for name, child in node.children.items():
        if name not in hints:
            raise UserError(_unknown_field(cls, values, hint, name, path))
        values[name] = _override(hints[name], values.get(name), child, f"{path}.{name}")
    return _build(cls, values, path)


def _build(cls: type, values: dict[str, Any], path: str) -> Any:
    for name, hint in field_types(cls).items():
        if name not in values and name not in _defaults(cls):
            raise UserError(f"{path}.{name}: {cls.__name__} needs it ({describe(hint)}) and it has no default")
    try:
        return cls(**values)
    except (ValueError, UserError) as error:  # raised by the class's own check of its values
        raise UserError(f"{path}: {error}") from error


def _unknown_field(cls: type, values: dict[str, Any], hint: Any, name: str, path: str) -> str:
    line = f"{path}.{name}: {cls.__name__} has no field {name!r}"
    owners = [other for other, member in config_classes(hint).items() if name in field_types(member)]
    if owners:
        return f"{line}; {owners[0]} has it (switch with {path}={owners[0]})"
    if near := did_you_mean(name, field_types(cls)):
        return line + near
    below = [pair for key, value in values.items() for pair in nodes(value, key)]
    elsewhere = [inner for inner, node in below if name in field_types(type(node))]
    return f"{line} (did you mean {path}.{elsewhere[0]}.{name}?)" if elsewhere else f"{line}; see --help"


def nodes(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, config) of a config and of every config below it, parents first."""
    prefix = f"{path}." if path else ""
    if dataclasses.is_dataclass(value):
        yield path, value
        for name in field_types(type(value)):  # pyright: ignore[reportArgumentType]
            yield from nodes(getattr(value, name), prefix + name)
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from nodes(item, f"{prefix}{index}")


# ---- JSON


def to_json(config: Any) -> Any:
    """The config as JSON types; each dataclass becomes an object whose "class" is its name."""
    if dataclasses.is_dataclass(config):
        fields = {name: to_json(getattr(config, name)) for name in field_types(type(config))}  # pyright: ignore
        return {"class": type(config).__name__, **fields}
    return [to_json(item) for item in config] if isinstance(config, tuple) else config


def from_json(hint: Any, data: Any, path: str = "config") -> Any:
    """Rebuilds a value of the given type from `to_json`; a field that is absent takes its default.

    Only classes that the type itself names are built. Raises UserError for an unknown field, class or type.
    """
    classes = config_classes(hint)
    if isinstance(data, dict) and data.get("class") in classes:
        cls = classes[data["class"]]
        hints, values = field_types(cls), {}
        for name, item in data.items():
            if name == "class":
                continue
            if name not in hints:
                near = did_you_mean(name, hints)
                raise UserError(f"{path}.{name}: {cls.__name__} of this version has no field {name!r}{near}")
            values[name] = from_json(hints[name], item, f"{path}.{name}")
        return _build(cls, values, path)
    for option in options(hint):
        if isinstance(data, list) and typing.get_origin(option) is tuple:
            try:
                hints = _element_types(option, len(data))
            except ValueError as error:
                raise UserError(f"{path}: {error}") from None
            return tuple(from_json(h, item, f"{path}.{i}") for i, (h, item) in enumerate(zip(hints, data, strict=True)))
        if typing.get_origin(option) is typing.Literal and any(data == v for v in typing.get_args(option)):
            return data
        if option is float and isinstance(data, int | float) and not isinstance(data, bool):
            return float(data)
        if option in (int, str, bool, types.NoneType) and type(data) is option:
            return data
    found = data.get("class", "an object") if isinstance(data, dict) else repr(data)
    raise UserError(f"{path}: expected {describe(hint)}, found {found}")


def diff(old: Any, new: Any) -> list[str]:
    """`path: old → new` for each field that differs; takes configs or their JSON, of other versions too."""
    old, new = (to_json(side) if dataclasses.is_dataclass(side) else side for side in (old, new))
    return [f"{path}: {before} → {after}" for path, before, after in _differences(old, new, "")]


def _differences(old: Any, new: Any, path: str) -> Iterator[tuple[str, str, str]]:
    prefix = f"{path}." if path else ""
    if isinstance(old, dict) and isinstance(new, dict) and old["class"] == new["class"]:
        for name in dict.fromkeys((*old, *new)):
            if name not in old or name not in new:
                yield (
                    prefix + name,
                    show(old[name]) if name in old else "absent",
                    show(new[name]) if name in new else "absent",
                )
            else:
                yield from _differences(old[name], new[name], prefix + name)
    elif (
        isinstance(old, list)
        and isinstance(new, list)
        and len(old) == len(new)
        and any(isinstance(x, dict) for x in old)
    ):
        for index, pair in enumerate(zip(old, new, strict=True)):
            yield from _differences(*pair, f"{prefix}{index}")
    elif old != new:
        yield path, show(old), show(new)
