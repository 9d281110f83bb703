"""`--help`: every field with its type, value and the comment that documents it, grouped by section."""

import ast
import dataclasses
import functools
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator
from typing import Any

from experiments.config_tree import config_classes, describe, field_types, options, show

_WIDTHS = (72, 42, 24)  # of the columns path, type and value, at most


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """Name to documentation: the comment at the end of the field's line, or the comment lines right above it."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            try:
                docs |= _docs_in_source(textwrap.dedent(inspect.getsource(base)))
            except OSError:  # a class typed at a prompt has no source
                continue
    return docs


def _docs_in_source(source: str) -> dict[str, str]:
    trailing, alone = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            whole_line = token.line.strip().startswith("#")
            (alone if whole_line else trailing)[token.start[0]] = token.string.lstrip("#").strip()
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for node in body.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        above = []
        while (line := node.lineno - 1 - len(above)) in alone:
            above.insert(0, alone[line])
        inline = [
            trailing[line] for line in range(node.lineno, (node.end_lineno or node.lineno) + 1) if line in trailing
        ]
        docs[node.target.id] = " ".join(inline or above)
    return docs


def flag_name(field: str) -> str:
    """How a field of program flags is spelt: `from_` is `--from`, which Python keeps for itself."""
    return field.rstrip("_")


def help_text(program: str, about: str, flags_class: type, config: Any) -> str:
    """The whole text. `config`: an instance (its values are shown), a class (its defaults are), or None (no config).

    `about`: what the program does, with examples.
    """
    lines = [
        f"usage: python -m {program} "
        + ("--config=FILE.py[:ARG] " if config is not None else "")
        + "[--FLAG=VALUE ...]"
    ]
    if config is not None:
        lines[0] += " [--config.SECTION.FIELD=VALUE ...]"
    lines += ["", about] if about else []
    rows = [(f"--{flag_name(name)}", *columns) for name, *columns in _rows(flags_class, None)]
    lines += ["", "flags:", *_table(rows)] if rows else []
    if config is not None:
        cls = config if isinstance(config, type) else type(config)
        instance = None if isinstance(config, type) else config
        # By title: two members of a union may hold the same alternatives at the same path.
        for title, section in dict(_sections(cls, instance, "--config", ())).items():
            lines += ["", title, *_table(section)]
    return "\n".join(lines)


def _rows(cls: type, instance: Any) -> Iterator[tuple[str, str, str, str]]:
    for f in dataclasses.fields(cls):
        if f.init:
            value = _value(f, instance)
            text = "required" if value is dataclasses.MISSING else show(value)
            kind = describe(field_types(cls)[f.name])
            # A long union of classes may be cut: a section of its own follows for each of them.
            kind = kind if len(kind) <= _WIDTHS[1] or "Config" not in kind else f"{kind[: _WIDTHS[1] - 3]}..."
            yield f.name, kind, text, field_docs(cls).get(f.name, "")


def _value(f: dataclasses.Field, instance: Any) -> Any:
    if instance is not None:
        return getattr(instance, f.name)
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def _sections(cls: type, instance: Any, path: str, above: tuple[type, ...]) -> Iterator[tuple[str, list]]:
    """A (title, rows) for this dataclass and, below it, for each dataclass that a field holds or could hold."""
    rows = [(f"{path}.{name}", *columns) for name, *columns in _rows(cls, instance)]
    yield f"{path}: {cls.__name__}", rows
    for f in dataclasses.fields(cls):
        value, hint = _value(f, instance), field_types(cls).get(f.name)
        inner = f"{path}.{f.name}"
        items = [(inner, value)] if dataclasses.is_dataclass(value) else []
        if isinstance(value, tuple):
            items = [(f"{inner}.{i}", item) for i, item in enumerate(value) if dataclasses.is_dataclass(item)]
        for item_path, item in items:
            yield from _sections(type(item), item, item_path, (*above, cls))
        held = {type(item) for _, item in items}
        for name, member in config_classes(hint).items():
            if member not in held and member not in above and (len(options(hint)) > 1 or value is dataclasses.MISSING):
                (_, other), *deeper = _sections(member, None, inner, (*above, cls))
                yield f"{inner}={name} has{' instead' if held else ''}:", other
                yield from deeper


def _table(rows: list) -> list[str]:
    if not rows:
        return ["  (no fields)"]
    widths = [min(max(len(row[i]) for row in rows), _WIDTHS[i]) for i in range(3)]
    return ["  " + "  ".join([*(row[i].ljust(widths[i]) for i in range(3)), row[3]]).rstrip() for row in rows]
