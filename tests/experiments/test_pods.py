"""docs/pods.md: its commands parse, its numbers are those of the reports, and its launch commands train on two processes."""

import json
import math
import pathlib
import re
import shlex
import socket

import pytest
from small_runs import CONFIG, DENSE, ROOT, metrics, newest, write_corpus

from experiments.cli import parse_argv
from experiments.compilation.chips import CHIP_RATES
from experiments.compile import CompileFlags
from experiments.config import ExperimentConfig
from experiments.run import RunFlags

PAGE = (ROOT / "docs" / "pods.md").read_text(encoding="utf-8")


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(module, arguments) of each, up to the end of the line, of the lines that a backslash joins, or of the quotes around it."""
    found = re.findall(r"-m experiments\.(\w+)((?: +|\\\n|[^\s\"`\\]+)+)", text)
    return [(module, shlex.split(arguments.replace("\\\n", " "))) for module, arguments in found]


COMMANDS = commands(PAGE)
FLAGS = {"run": RunFlags, "compile": CompileFlags}
GIB = 2**30


@pytest.mark.parametrize(("module", "arguments"), COMMANDS)
def test_commands_are_understood(module, arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    config, _ = parse_argv(arguments, FLAGS[module], ExperimentConfig)
    config.check_training()


def test_there_are_commands_for_every_place():
    runs = [arguments for module, arguments in COMMANDS if module == "run"]
    assert len(runs) == 5 and len(COMMANDS) >= 7
    assert sum("--process_id=0" in arguments for arguments in runs) == 1


def test_fields_that_are_named_exist():
    named = re.findall(r"`(?:--config\.)?((?:train|data|mesh|checkpoint|model|eval|log|optim)\.[\w.]+)", PAGE)
    assert len(named) >= 4
    for name in named:
        node = ExperimentConfig()
        for part in name.split("."):
            node = getattr(node, part)


def test_the_jobset_has_as_many_pods_as_its_topology_hosts():
    yaml = pytest.importorskip("yaml")
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    (slice_,) = yaml.safe_load(text)["spec"]["replicatedJobs"]
    job = slice_["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    shape = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    hosts = math.prod(map(int, shape)) // container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == hosts
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def row(path: pathlib.Path) -> str:
    """A report as a line of the page's table."""
    found = json.loads(path.read_text())["results"]
    mesh = " ".join(f"{axis} {size}" for axis, size in found["mesh"].items() if size > 1) or "1"
    batch, memory = found["batch"], found["memory"]
    shares = math.prod(size for axis, size in found["mesh"].items() if axis != "tensor")
    cells = (
        f"`{re.fullmatch(r'[0-9-]+_compile_(.*?)_[^_]+_[^_]+', path.stem.removesuffix(KERNELS))[1]}`",
        f"`{found['topology']}`",
        mesh,
        f"{batch['rows'] // batch['micro_batches'] // shares} x {batch['micro_batches']}",
        f"{memory['peak'] / GIB:.1f} of {memory['hbm'] / GIB:.0f}",
        span(found["roofline"]["step"], "{:.3g}", 1) + " s",
        span(found["roofline"]["mfu"], "{:.0f}", 100) + " %",
    )
    return f"| {' | '.join(cells)} |"


def span(values: dict[str, float], form: str, scale: float) -> str:
    """If communication is overlapped, to if it is not."""
    ends = [form.format(scale * values[name]) for name in ("overlapped", "in_turn")]
    return " to ".join(dict.fromkeys(ends))


def table(path: pathlib.Path) -> list[str]:
    """That which a report belongs to: the one of kernels, or the other."""
    name = "kernels" if path.stem.endswith(KERNELS) else "table"
    (written,) = re.findall(rf"<!-- {name} -->\n.*\n\|---.*\n((?:\|.*\n)+)<!-- end -->", PAGE)
    return written.splitlines()


KERNELS = "_kernels"
REPORTS = [
    path
    for path in (ROOT / "benchmarks" / "results").glob("*_compile_*.json")
    if re.search(rf"_\d+x\d+(x\d+)?({KERNELS})?$", path.stem) and "_compile_tiny_" not in path.stem
]


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_every_report_is_a_row_of_its_table(path):
    assert row(path) in table(path)
    found = json.loads(path.read_text())
    assert found["results"]["fits"] and not found["commit"].endswith("-dirty")
    assert path.stem.removesuffix(KERNELS).endswith("_" + found["results"]["topology"].replace(":", "_"))
    if found["results"]["flops"].get("silent_kernels"):
        assert path.stem.endswith(KERNELS)


def test_every_row_is_that_of_a_report():
    lines = [line for some in {tuple(table(path)) for path in REPORTS} for line in some]
    assert sorted(lines) == sorted(map(row, REPORTS))


@pytest.mark.parametrize("name", ["moe_1b", "deepseek_v2_lite"])
def test_the_table_has_rows_for_every_chip(name):
    chips = re.findall(rf"^\| `{name}` \| `(\w+):", PAGE, flags=re.MULTILINE)
    assert set(chips) == set(CHIP_RATES)


# --- the launch commands, as processes -------------------------------------------------------------------------------------------


@pytest.fixture
def launch(home, tmp_path, monkeypatch):
    """Starts a command of the page as two processes of four devices, with a model that takes seconds; returns their ends."""
    shared = tmp_path / "shared"
    shared.mkdir()
    write_corpus(shared / "corpus")
    runs = []

    def launch(arguments, variables=lambda process: {}):
        """`arguments` and `variables` of the environment: those of each process."""
        for process in range(2):
            given = [each.replace("/shared/", f"{shared}/") for each in arguments(process)]
            (workdir,) = (each.removeprefix("--workdir=") for each in given if each.startswith("--workdir="))
            given = [each for each in given if not each.startswith(("--workdir=", "--config="))]
            small = f"--config={CONFIG}", *DENSE, "--config.data.source.validation_fraction=0.2"
            with monkeypatch.context() as environment:
                for name, value in variables(process).items():
                    environment.setenv(name, value)
                runs.append(home.start(workdir, *given, *small, devices=4, compilation_cache=False))
        return pathlib.Path(workdir), [run.end() for run in runs[-2:]]

    yield launch
    for run in runs:
        run.__exit__()


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


@pytest.mark.slow
def test_slurm_and_going_on_by_other_means(launch):
    """The job script's command under what srun sets; then, with more steps, that of no cluster in the same directory."""
    script = re.search(r"#!/bin/bash\n#SBATCH.*?```", PAGE, flags=re.DOTALL)[0]
    ((_, in_slurm),) = commands(script)
    slurm = dict(each.split("=", 1) for each in re.search(r"export (.*)", script)[1].split()) | {
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "JAX_COORDINATOR_PORT": free_port(),
    }
    workdir, ends = launch(
        lambda process: [*in_slurm, "--config.train.num_steps=6"],
        lambda process: slurm | {"SLURM_PROCID": str(process), "SLURM_LOCALID": str(process)},
    )
    assert [end.code for end in ends] == [0, 0], ends
    assert "devices: 8 cpu (fsdp 8)" in ends[0].stdout and len(metrics(workdir)) == 6

    (by_hand,) = (arguments for _, arguments in COMMANDS if "--num_processes=2" in arguments)
    changes = {"HOST_0:PORT": f"localhost:{free_port()}", "--process_id=0": "--process_id={}"}

    def of(process):
        line = "\n".join([*by_hand, "--config.train.num_steps=9"])
        for old, new in changes.items():
            line = line.replace(old, new.format(process))
        return line.split("\n")

    same, ends = launch(of)
    assert [end.code for end in ends] == [0, 0], ends
    assert same == workdir and "resumed from the checkpoint of step 6" in ends[0].stdout
    assert len(metrics(workdir)) == 9 and newest(workdir).name == "step_9"
