"""From the flags to a plan: what the source holds, which way to go, and whether everything fits, before anything is written."""

import dataclasses
import hashlib
import json
import pathlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import ml_dtypes
import numpy as np

from experiments.checkpoint_read import find_step, read_config, read_sizes, some
from experiments.conversion.arrays import num_bytes
from experiments.conversion.copies import find_copies
from experiments.conversion.layouts import MATRIX
from experiments.conversion.naming import NamedTensor, name_tensors
from experiments.conversion.recast import Recast
from experiments.conversion.sources import HfSource, Place, RunSource, Source
from experiments.conversion.targets import HfTarget, RunTarget, Target
from experiments.errors import UserError
from experiments.loading import find_model, is_hugging_face
from mdl import hf
from mdl.hf import fp8
from mdl.hf.load import check
from mdl.hf.load import read_config as read_hf_config
from mdl.hf.safetensors import open_tensors

SOURCE_FILES = "source files"  # key of the identity
Format = Literal["hf", "ours"]
DTYPES = {"bf16": np.dtype(ml_dtypes.bfloat16), "f32": np.dtype(np.float32), "keep": None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for; see the flags of `experiments.convert`."""

    directory: pathlib.Path
    recast: Recast
    to_format: Format | None
    ema: bool
    max_shard_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    says: str  # one line for people
    source: Source
    identity: dict[str, Any]  # of the request and the files of its source, as JSON
    largest: int  # bytes of the largest tensor in Hugging Face files on either side
    target: Target


def plan(request: Request, result: pathlib.Path) -> Plan:
    """How `request` is carried out into `result`. Reads headers and JSON; UserError for whatever does not fit."""
    try:
        if is_hugging_face(request.directory):
            return _from_hugging_face(request, result)
        if any(request.directory.glob("*.safetensors")):
            raise UserError(f"--from={request.directory}: holds safetensors files, but no config.json of their model")
        return _from_run(request, result)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error


def _from_hugging_face(request: Request, result: pathlib.Path) -> Plan:
    directory, recast = request.directory, request.recast
    if request.ema:
        raise UserError(f"--ema: {directory} is no run of ours and holds no averaged parameters")
    config_json = read_hf_config(directory)
    naming = name_tensors(hf.model_config(config_json), hf.family(config_json).TABLE)
    check(naming.bindings, open_tensors(directory), directory)
    source = HfSource(directory)
    is_fp8 = _holds_fp8(source)
    if is_fp8 and recast.quantizes:
        raise UserError(f"--fp8: {directory} holds FP8 already")
    changes = recast.quantizes or (is_fp8 and recast.dtype is not None)
    to_format = request.to_format or ("hf" if changes else "ours")
    if to_format == "ours" and recast.quantizes:
        raise UserError("--fp8 writes Hugging Face files; bring them to our format in a second step")
    if to_format == "hf" and not recast.quantizes and recast.dtype is None:
        raise UserError("--to_format=hf: from Hugging Face files this would be a copy; give --dtype or --fp8")

    written = _config_json(config_json, recast)
    buffers = {t.tensor for t in naming.tensors if t.is_buffer}
    if to_format == "hf":
        recipes = list(recast.recipes(source, buffers))
        target = HfTarget(result, recipes, written, directory, request.max_shard_bytes)
    else:
        copies = find_copies(naming.tensors, source, _warn)
        left_out = {copy.tensor for copy in copies}
        recipes = [r for r in recast.recipes(source, buffers) if left_out.isdisjoint(r.sizes)]
        own = [t for t in naming.tensors if not t.is_copy]
        target = RunTarget(result, {next(iter(r.sizes)): r for r in recipes}, own, copies, written, directory)
    return _plan(request, to_format, source, recipes, target, hf_source=True)


def _from_run(request: Request, result: pathlib.Path) -> Plan:
    directory, recast = request.directory, request.recast
    if request.to_format == "ours":
        raise UserError(f"--to_format=ours: {directory} is in our format already")
    saved, model_source = read_config(directory), find_model(directory, ema=request.ema)
    model, companions = model_source.config, model_source.tokenizer_directory
    config_json = saved.extra.get("hf_config")
    if config_json is None:
        tokenizer = model_source.tokenizer()
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id} if tokenizer else {}
        config_json = hf.config_json(model, **ids)
    naming = name_tensors(model, hf.family(config_json).TABLE)
    copies = saved.extra.get("hf_copies")
    written = [t for t in naming.tensors if (t.is_written if copies is None or not t.is_copy else t.tensor in copies)]
    step = pathlib.Path(find_step(directory, saved.step))
    source = RunSource(step / "state", *_places(step, written, ema=request.ema))
    if _holds_fp8(source) and recast.quantizes:
        raise UserError(f"--fp8: {directory} holds FP8 already")
    dtype = source.sizes[next(t.tensor for t in written if not t.is_buffer)][0]
    if "hf_config" not in saved.extra and recast.dtype is None:
        config_json = _config_json(config_json, Recast(dtype=dtype))  # averages have another than the parameters
    buffers = {t.tensor for t in written if t.is_buffer}
    recipes = list(recast.recipes(source, buffers))
    target = HfTarget(result, recipes, _config_json(config_json, recast), companions, request.max_shard_bytes)
    return _plan(request, "hf", source, recipes, target, hf_source=False)


def _places(step: pathlib.Path, tensors: Sequence[NamedTensor], *, ema: bool) -> tuple[dict, dict[str, Place]]:
    """Dtype and shape of every array, and where in them the tensors are."""
    sizes = read_sizes(step)
    places: dict[str, Place] = {}
    problems: list[str] = []
    for t in tensors:
        array = t.array.replace("params/", "ema/", 1) if ema and not t.is_buffer else t.array
        if array not in sizes or sizes[array][1] != t.array_shape:
            problems.append(array)
            continue
        places[t.tensor] = Place(array, t.index, t.layout)
        if sizes[array][0] == fp8.DTYPE:
            places[fp8.scale_name(t.tensor)] = Place(fp8.scale_name(array), t.index, MATRIX)
    problems += [place.array for place in places.values() if place.array not in sizes]
    if problems:
        raise UserError(f"{step}: {len(problems)} arrays are missing or of another shape ({some(problems)})")
    return sizes, places


def _plan(
    request: Request, to_format: Format, source: Source, recipes: Iterable, target: Target, *, hf_source: bool
) -> Plan:
    made = [size for recipe in recipes for size in recipe.sizes.values()]
    theirs = [*(source.sizes.values() if hf_source else ()), *(made if to_format == "hf" else ())]
    names = {"hf": "Hugging Face", "ours": "our format"}
    spell = {fp8.DTYPE: "FP8", DTYPES["bf16"]: "bf16", DTYPES["f32"]: "f32"}

    def dtypes(sizes: Iterable) -> str:
        return "+".join(sorted({spell.get(dtype, str(dtype)) for dtype, _ in sizes}))

    units = [[unit.name, unit.num_bytes] for unit in target.units]
    return Plan(
        says=(
            f"{names['hf' if hf_source else 'ours']} ({dtypes(source.sizes.values())}) -> "
            f"{names[to_format]} ({dtypes(made)})"
        ),
        source=source,
        identity={
            "from": str(request.directory.absolute()),
            "to_format": to_format,
            "dtype": str(request.recast.dtype),
            "fp8": [request.recast.quantizes, request.recast.ue8m0],
            "ema": request.ema,
            SOURCE_FILES: source.fingerprint(),
            "files to write": hashlib.sha256(json.dumps(units).encode()).hexdigest(),
        },
        largest=max(map(num_bytes, theirs), default=0),
        target=target,
    )


def _holds_fp8(source: Source) -> bool:
    return any(dtype == fp8.DTYPE for dtype, _ in source.sizes.values())


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr, flush=True)


def _config_json(config_json: dict[str, Any], recast: Recast) -> dict[str, Any]:
    """The config.json of what is written."""
    written = dict(config_json)
    if recast.dtype is not None:
        written.pop("quantization_config", None)
        names = [name for name in ("dtype", "torch_dtype") if written.get(name) is not None] or ["torch_dtype"]
        written |= dict.fromkeys(names, str(recast.dtype))
    if recast.quantizes:
        written["quantization_config"] = fp8.quantization_config(ue8m0=recast.ue8m0)
    return written
