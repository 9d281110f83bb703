"""What there is to run.

python -m experiments
"""

import ast
import pathlib

from experiments.cli import did_you_mean, run_main
from experiments.errors import UserError

# in the order in which one meets them; each says what it does in the first line of its documentation
COMMANDS = ("run", "generate", "chat", "score", "plot", "convert", "bench", "compile")


def main(argv: list[str]) -> None:
    asked = [argument for argument in argv if argument not in ("--help", "-h")]
    if asked:
        near = did_you_mean(asked[0], COMMANDS) or f"; there are {', '.join(COMMANDS)}"
        raise UserError(f"{asked[0]!r} is not run like this: python -m experiments.COMMAND{near}")
    print("usage: python -m experiments.COMMAND --FLAG=VALUE ...\n")
    width = max(map(len, COMMANDS))
    for command in COMMANDS:
        print(f"  experiments.{command:{width}}  {summary(command)}")
    print("\n--help after any of them: its flags, with examples. To begin with:\n")
    print("  python -m experiments.run --config=configs/tiny.py --workdir=runs/tiny")


def summary(command: str) -> str:
    """The first line of a command's documentation, read without importing it: that would take seconds."""
    source = pathlib.Path(__file__).with_name(f"{command}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


if __name__ == "__main__":
    run_main(main)
