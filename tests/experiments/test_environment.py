"""Wrong environments: recognized from what the machine says of itself, each told in one line with what mends it."""

import dataclasses
import pathlib
import re
import subprocess
import sys
import tomllib

import jax.numpy as jnp
import pytest

from experiments import cli, environment
from experiments.distributed import check_slurm
from experiments.environment import Environment, explain, why_only_cpu
from experiments.errors import UserError
from experiments.versions import OLDEST_PYTHON, numbers, required_jax, wrong_version

ROOT = pathlib.Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIRED = "jax<0.13,>=0.10.2"
BARE = Environment(
    variables={},
    versions={"jaxlib": "0.10.2", "libtpu": None, "jax-cuda13-plugin": None, "jax-cuda12-plugin": None},
)
CUDA = dataclasses.replace(
    BARE, num_gpus=8, driver="580.65.06", versions=BARE.versions | {"jax-cuda13-plugin": "0.10.2"}
)


def machine(base, *, variables=None, versions=None, **others):
    return dataclasses.replace(
        base, variables=base.variables | (variables or {}), versions=base.versions | (versions or {}), **others
    )


# --- versions ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jax", ["0.10.2", "0.11.0", "0.12.0.dev20261101", "0.12.9+cuda13"])
def test_versions_that_are_allowed(jax):
    assert wrong_version((3, 11), jax, REQUIRED, False) is None


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (((3, 10), "0.10.2", REQUIRED, False), "this is Python 3.10, and mdl needs 3.11 or newer; run `python3.11 -m venv"),
        (((3, 11), "0.10.1", REQUIRED, False), "JAX 0.10.1 is older than mdl can use .* run `pip install -U 'jax<0.13,>=0.10.2'`"),
        (((3, 11), "0.9.2", REQUIRED, True), re.escape("run `pip install -U 'jax[cuda13]<0.13,>=0.10.2'`")),
        (((3, 12), "0.13.0", REQUIRED, False), "JAX 0.13.0 is newer than mdl can use"),
        (((3, 12), None, REQUIRED, False), "JAX is not installed here; run `pip install -e .`"),
    ],
)  # fmt: skip
def test_versions_that_are_not(found, line):
    assert re.search(line, wrong_version(*found))


def test_the_bounds_are_those_of_the_project():
    assert PROJECT["requires-python"] == ">=" + ".".join(map(str, OLDEST_PYTHON))
    (declared,) = (each for each in PROJECT["dependencies"] if each.startswith("jax>"))
    assert sorted(re.findall(r"[<>=]+[\d.]+", declared)) == sorted(re.findall(r"[<>=]+[\d.]+", required_jax()))
    assert len(re.findall(r"(?:>=|<)\s*[\d.]+", required_jax())) == 2  # both are understood


def test_a_command_under_an_old_jax_says_so_and_does_not_begin(tmp_path):
    metadata = tmp_path / "jax-0.9.1.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: jax\nVersion: 0.9.1\n")
    (tmp_path / "jax.py").write_text("raise SystemExit('jax was imported')\n")
    for name, code in (("-m", "experiments.run"), ("-c", "import experiments")):
        ended = subprocess.run(
            [sys.executable, name, code],
            cwd=ROOT,
            env={"PYTHONPATH": str(tmp_path), "PATH": ""},
            capture_output=True,
            text=True,
            timeout=60,
        )
        *others, line = ended.stderr.splitlines()
        assert "JAX 0.9.1 is older than mdl can use" in line, ended.stderr
        if name == "-m":
            assert (ended.returncode, others) == (2, []) and line.startswith("error: ")
        else:
            assert ended.returncode == 1 and line.startswith("ImportError: ")


# --- chips that are not used ---------------------------------------------------------------------------------------------------

TPU = dataclasses.replace(BARE, num_tpus=4)
UNUSED = {
    "no chips": (BARE, None),
    "no plugin": (machine(BARE, num_gpus=1), r"plugin is not installed; run `pip install -e '\.\[gpu\]'`"),
    "another plugin": (
        machine(CUDA, versions={"jax-cuda13-plugin": "0.11.0"}),
        r"jax-cuda13-plugin 0\.11\.0 does not go with jaxlib 0\.10\.2; run `pip install -U 'jax\[cuda13\]==0\.10\.2'`",
    ),
    "another plugin of CUDA 12": (
        machine(CUDA, versions={"jax-cuda13-plugin": None, "jax-cuda12-plugin": "0.9.0"}),
        r"jax-cuda12-plugin 0\.9\.0 .* 'jax\[cuda12\]==0\.10\.2'",
    ),
    "old driver": (
        machine(CUDA, driver="550.54.14"),
        r"driver 550\.54\.14 is older than CUDA 13 needs; install 580 or newer, or .* 'jax\[cuda12\]==0\.10\.2'",
    ),
    "old driver for CUDA 12": (
        machine(CUDA, driver="470.82.01", versions={"jax-cuda13-plugin": None, "jax-cuda12-plugin": "0.10.2"}),
        r"install 525 or newer$",
    ),
    "a driver that CUDA 12 can use": (
        machine(CUDA, driver="550.54.14", versions={"jax-cuda13-plugin": None, "jax-cuda12-plugin": "0.10.2"}),
        r"jax-cuda12-plugin 0\.10\.2 did not start, JAX says why above$",
    ),
    "JAX_PLATFORMS": (machine(CUDA, variables={"JAX_PLATFORMS": "cpu"}), "JAX_PLATFORMS=cpu says so; unset it"),
    "JAX_PLATFORMS that ask for it": (machine(CUDA, variables={"JAX_PLATFORMS": "cuda,cpu"}), "did not start"),
    "hidden": (machine(CUDA, variables={"CUDA_VISIBLE_DEVICES": ""}), "CUDA_VISIBLE_DEVICES= hides it"),
    "LD_LIBRARY_PATH": (machine(CUDA, variables={"LD_LIBRARY_PATH": "/cuda/lib64"}), "LD_LIBRARY_PATH=/cuda/lib64 may be"),
    "TPU without libtpu": (TPU, r"libtpu is not installed; run `pip install -e '\.\[tpu\]'`"),
    "TPU left out": (machine(TPU, variables={"JAX_PLATFORMS": "cpu"}), "the TPU .* JAX_PLATFORMS=cpu says so"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSED)
def test_why_chips_are_not_used(name):
    found, line = UNUSED[name]
    why = why_only_cpu(found)
    assert why is None if line is None else re.search(line, why) and "\n" not in why


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    "version",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Fri Jan 17 15:12:00 UTC 2025\nGCC version: gcc 12.2.0\n",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs-builder)\nGCC version: 13\n",
    ],
)
def test_gpus_are_found(tmp_path, version):
    write(tmp_path, {f"dev/nvidia{name}": "" for name in ("0", "1", "ctl", "-uvm")})
    write(tmp_path, {"proc/driver/nvidia/version": version})
    found = Environment.find(tmp_path)
    assert (found.num_gpus, found.driver, found.num_tpus) == (2, "570.86.15", 0)


def test_tpus_are_found_and_not_taken_for_network_cards(tmp_path):
    for slot, (vendor, device) in enumerate([("0x1ae0", "0x0062"), ("0x1ae0", "0x0042"), ("0x10de", "0x0062")]):
        path = f"sys/bus/pci/devices/{slot}"
        write(tmp_path, {f"{path}/vendor": vendor + "\n", f"{path}/device": device + "\n"})
    found = Environment.find(tmp_path)
    assert (found.num_gpus, found.driver, found.num_tpus) == (0, None, 1)


def test_an_empty_machine(tmp_path):
    found = Environment.find(tmp_path)
    assert (found.num_gpus, found.driver, found.num_tpus) == (0, None, 0)
    assert numbers(found.versions["jaxlib"]) >= (0, 10, 2)


def test_where_jax_can_choose_the_cpu_alone():
    assert BARE.leaves_only_cpu
    assert not CUDA.leaves_only_cpu and not machine(BARE, num_tpus=4).leaves_only_cpu
    assert machine(CUDA, variables={"JAX_PLATFORMS": "cpu"}).leaves_only_cpu
    assert not machine(CUDA, variables={"JAX_PLATFORMS": "cuda,cpu"}).leaves_only_cpu


def test_it_is_said_once(monkeypatch, capsys):
    environment.warn_of_unused_chips.cache_clear()
    monkeypatch.setattr(Environment, "find", lambda: machine(CUDA, variables={"JAX_PLATFORMS": "cpu"}))
    for _ in range(2):
        environment.warn_of_unused_chips()
    said = capsys.readouterr().err
    assert said.startswith("warning: the NVIDIA GPU of this machine is not used: ") and said.count("\n") == 1
    environment.warn_of_unused_chips.cache_clear()


def test_srun_that_was_forgotten():
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_PROCID": "0"}
    with pytest.raises(UserError, match=r"this SLURM job has 16 tasks, .*; put srun in front"):
        check_slurm(job)
    check_slurm(job | {"SLURM_STEP_NODELIST": "node[1-2]"})
    check_slurm(job | {"OMPI_COMM_WORLD_SIZE": "16"})
    check_slurm(job | {"SLURM_NTASKS": "1"})
    check_slurm({})


# --- what JAX raises -----------------------------------------------------------------------------------------------------------

MEMORY = "too little memory; in training raise train.grad_accum_steps"
RAISED = {
    "GPU": ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 85899345920 bytes.", MEMORY),
    "TPU, compiling": (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 21.9G of 15.4G hbm.",
        MEMORY,
    ),
    "TPU": (
        "RESOURCE_EXHAUSTED: Error allocating device buffer: Attempting to allocate 15.65G. That was not possible.",
        MEMORY,
    ),
    "TPU, loading": (
        "RESOURCE_EXHAUSTED: Attempting to reserve 6.48G at the bottom of memory. That was not possible.",
        MEMORY,
    ),
    "kernel": ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 20M of 16M vmem.", None),
    "message": ("RESOURCE_EXHAUSTED: Received message larger than max (5242880 vs. 4194304)", None),
    "TPU in use": (
        "Unable to initialize backend 'tpu': ABORTED: The TPU is already in use by process with pid 2718. Not attempting to load "
        "libtpu.so in this process. (set JAX_PLATFORMS='' to automatically choose an available backend)",
        "the TPU is in use by process 2718; end that",
    ),
    "TPU in use, of another user": (
        "Unable to initialize backend 'tpu': ABORTED: libtpu.so already in use by another process probably owned by another user.",
        "the TPU is in use by another process .*lsof",
    ),
    "lock file": (
        "Unable to initialize backend 'tpu': ABORTED: Internal error when accessing libtpu multi-process lockfile. Run ...",
        "left its lock behind; .* `sudo rm /tmp/libtpu_lockfile`",
    ),
    "CUDA": ("Unable to initialize backend 'cuda': INTERNAL: no supported devices found", "there is no NVIDIA GPU"),
    "another": ("Unable to initialize backend 'rocm': INTERNAL", None),
}  # fmt: skip


@pytest.mark.parametrize("name", RAISED)
def test_errors_of_the_machine_are_explained(name):
    text, line = RAISED[name]
    said = explain(RuntimeError(text), BARE)
    assert said is None if line is None else re.search(line, said) and "\n" not in said


def test_memory_that_a_cpu_does_not_have(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run"])
    with pytest.raises(SystemExit) as exited:
        cli.run_main(lambda argv: jnp.zeros(1 << 55, jnp.int8).block_until_ready() and 0)
    *words, line = capsys.readouterr().err.splitlines()
    assert exited.value.code == 2 and "RESOURCE_EXHAUSTED" in words[0]
    assert line.startswith("error: a device has too little memory")


def test_other_errors_stay_what_they_are(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run"])
    with pytest.raises(RuntimeError, match="a bug"):
        cli.run_main(lambda argv: (_ for _ in ()).throw(RuntimeError("a bug")))
