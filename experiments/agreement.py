"""What every process of a run must have in common: command, config, code and versions, and then what it finds on disk."""

import hashlib
import importlib.metadata
import json
import pathlib
import platform
from collections.abc import Mapping
from typing import Any

from experiments import peers
from experiments.config import ExperimentConfig
from experiments.config_tree import to_json
from experiments.data.pipeline import Data
from experiments.errors import UserError

# Without configs: of a config file, what it resolves to is compared.
_PACKAGES = ("experiments", "mdl", "kernels_pallas")
_DISTRIBUTIONS = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
_NAMED = 3  # differences that are named


def check_start(config: ExperimentConfig, workdir: str) -> None:
    """UserError in every process unless all were started alike; names the process and the field. Needs no device."""
    if peers.are_several():
        compare(
            {"--workdir": workdir}
            | dict(_fields(to_json(config), "config"))
            | {f"code {path}": digest for path, digest in hash_code(pathlib.Path(__file__).parents[1]).items()}
            | {"python": ".".join(platform.python_version_tuple()[:2])}
            | {name: importlib.metadata.version(name) for name in _DISTRIBUTIONS}
        )


def check_files(data: Data, saved_steps: list[int]) -> None:
    """UserError in every process unless all found the same corpus and the same checkpoints."""
    if peers.are_several():
        compare(
            {f"data.source file {name}": "there" for name in data.shards}
            | {"data.source": f"documents {data.corpus_sha256[:12]}"}
            | {"data.tokenizer": f"tokens {data.tokenizer.fingerprint[:12]}"}
            | {"checkpoints of steps": json.dumps(saved_steps)}
        )


def compare(facts: Mapping[str, str]) -> None:
    """UserError in every process unless all give the same; names what is not as on process 0."""
    theirs = peers.of_first(dict(facts))
    differences = [
        f"{name} is {facts.get(name, 'absent')}, {theirs.get(name, 'absent')} on process 0"
        for name in dict.fromkeys((*theirs, *facts))
        if theirs.get(name) != facts.get(name)
    ]
    with peers.together():
        if differences:
            more = f" and {len(differences) - _NAMED} more" if len(differences) > _NAMED else ""
            raise UserError(f"{'; '.join(differences[:_NAMED])}{more}; start all processes alike")


def hash_code(root: pathlib.Path) -> dict[str, str]:
    """A hash of every source file of the project in `root`, by its path."""
    files = sorted(file for package in _PACKAGES for file in (root / package).rglob("*.py"))
    return {str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest()[:12] for file in files}


def _fields(value: Any, path: str) -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [field for name, inner in value.items() for field in _fields(inner, f"{path}.{name}")]
    return [(path, value if isinstance(value, str) else json.dumps(value))]
