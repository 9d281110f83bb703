"""The process that renders chat templates, run as a file: they are programs from outside, so it may do nothing and ends soon.

stdin: JSON {"template": ..., "variables": {...}}; stdout: JSON {"text": ...} or {"error": ...}.
"""

import contextlib
import datetime
import json
import sys
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes, parser

CPU_SECONDS = 3
MEMORY_BYTES = 2**30
MAX_CHARACTERS = 2**24


class Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant says, for masks in training; the text is that of its body."""

    tags = {"generation"}

    def parse(self, parser: parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def limit_resources() -> None:
    """Processor time, memory and written files; where the system knows no such limits there is the caller's timeout."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


def environment() -> jinja2.Environment:
    """What published templates are written for: whitespace control, filters and globals as transformers has them."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    made.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)  # not the class, which has methods of its own
    return made


def tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """jinja's own escapes what HTML needs escaped."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def answer(template: str, variables: dict[str, Any]) -> dict[str, str]:
    try:
        text = environment().from_string(template).render(**variables)
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: {error.message}"}
    except jinja2.TemplateError as error:  # what raise_exception says, undefined names, what the sandbox forbids
        return {"error": str(error.message)}
    except MemoryError:
        return {"error": f"needs more than {MEMORY_BYTES >> 20} MB of memory"}
    except RecursionError:
        return {"error": "calls itself without end"}
    except Exception as error:  # foreign code may raise anything
        return {"error": f"{type(error).__name__}: {error}"}
    return {"text": text} if len(text) <= MAX_CHARACTERS else {"error": f"gives more than {MAX_CHARACTERS} characters"}


if __name__ == "__main__":
    request = json.load(sys.stdin)
    limit_resources()
    json.dump(answer(request["template"], request["variables"]), sys.stdout)
