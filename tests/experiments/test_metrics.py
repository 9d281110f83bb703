"""metrics.jsonl, TensorBoard events, the printed line, time left, peaks."""

import io
import json
import math
import os
import sys

import jax
import numpy as np
import pytest

from experiments import peak_flops, progress
from experiments.errors import UserError
from experiments.metrics import FILE_NAME, LogConfig, NoMetricsWriter, read_metrics, truncate_after
from experiments.tensorboard import EventWriter, crc32c


def test_one_flushed_line_per_step(tmp_path):
    with LogConfig().build(tmp_path / "run") as writer:
        writer.write(1, {"loss": np.float32(2.5), "tokens": np.int64(64), "load": np.array([0.5, 0.25])})
        text = (tmp_path / "run" / FILE_NAME).read_text()  # before close: it is flushed
        assert json.loads(text) == {"step": 1, "loss": 2.5, "tokens": 64, "load": [0.5, 0.25]}
        writer.write(2, {"loss": jax.numpy.float32(0.1)})
    lines = read_metrics(tmp_path / "run" / FILE_NAME)
    assert [line["step"] for line in lines] == [1, 2]
    assert np.float32(lines[1]["loss"]) == np.float32(0.1)


def test_nan_and_infinity_become_null(tmp_path):
    with LogConfig(tensorboard=False).build(tmp_path) as writer:
        writer.write(1, {"loss": math.nan, "grad_norm": np.float32(np.inf), "load": np.array([1.0, np.nan])})
    text = (tmp_path / FILE_NAME).read_text()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    assert json.loads(text, parse_constant=refuse) == {"step": 1, "loss": None, "grad_norm": None, "load": [1.0, None]}
    assert not list(tmp_path.glob("events*"))


def test_resume_cuts_what_will_be_run_again(tmp_path):
    config = LogConfig()
    with config.build(tmp_path) as writer:
        for step in range(1, 8):
            writer.write(step, {"loss": float(step)})
    with open(tmp_path / FILE_NAME, "a") as file:
        file.write('{"step": 8, "lo')  # killed while writing
    with config.build(tmp_path, restored_step=5) as writer:
        for step in range(6, 9):
            writer.write(step, {"loss": step + 0.5})
    lines = read_metrics(tmp_path / FILE_NAME)
    assert [(line["step"], line["loss"]) for line in lines] == [
        *((step, float(step)) for step in range(1, 6)),
        *((step, step + 0.5) for step in range(6, 9)),
    ]
    assert [file.name for file in tmp_path.iterdir() if file.name.endswith(".tmp")] == []
    assert read_scalars(tmp_path, "loss") == [(line["step"], line["loss"]) for line in lines]
    with config.build(tmp_path):  # no checkpoint was saved: from the start
        pass
    assert read_metrics(tmp_path / FILE_NAME) == []


def test_truncate_keeps_the_kept_lines_byte_for_byte(tmp_path):
    path = tmp_path / FILE_NAME
    kept = '{"step": 1, "loss": 10.82642650604248}\n{"step": 2, "loss": null}\n'
    path.write_bytes((kept + '{"step": 3, "loss": 1.0}\n').encode() + b'{"step": 4, \xff\xfe')
    truncate_after(path, 2)
    assert path.read_text() == kept
    truncate_after(tmp_path / "absent.jsonl", 2)
    assert not (tmp_path / "absent.jsonl").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_full_disk_is_one_clear_line(tmp_path):
    line = r"step 3: cannot write metrics to .* \(No space left on device\)"
    with pytest.raises(UserError, match=line), open("/dev/full", "w") as full, LogConfig().build(tmp_path) as writer:
        writer._file.close()
        writer._file = full
        writer.write(3, {"loss": 1.0})


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with NoMetricsWriter() as writer:
        writer.write(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_missing_wandb_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"log.wandb=true: wandb is not installed; run `pip install wandb`"):
        LogConfig(wandb=True).build(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="wandb is not installed"):
        LogConfig(wandb=True).check()
    LogConfig().check()


def test_wandb_gets_every_step(tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finish")

    class Wandb:
        @staticmethod
        def init(**arguments):
            calls.append(arguments)
            return Run()

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    with LogConfig(wandb=True, wandb_project="p").build(tmp_path / "run", run_config={"a": 1}) as writer:
        writer.write(1, {"loss": 2.0, "load": np.zeros(2)})
    assert (calls[0]["project"], calls[0]["name"], calls[0]["config"]) == ("p", "run", {"a": 1})
    assert calls[1:] == [(1, {"loss": 2.0}), "finish"]


def test_log_config_range():
    with pytest.raises(UserError, match="every=0"):
        LogConfig(every=0)


# ---- TensorBoard


def read_scalars(directory, tag):
    accumulator_module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accumulator = accumulator_module.EventAccumulator(str(directory))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def test_crc32c_vectors_of_rfc_3720():
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E


def test_tensorboard_reads_our_events(tmp_path):
    with EventWriter(tmp_path) as writer:
        writer.scalars(0, {"loss": 4.5, "val/bpb": 2.0})
        writer.scalars(2**40, {"loss": -1e30, "long " * 60: 1.0})
        writer.scalars(2**40 + 1, {"loss": math.inf})
    assert read_scalars(tmp_path, "loss") == [(0, 4.5), (2**40, np.float32(-1e30)), (2**40 + 1, math.inf)]
    assert read_scalars(tmp_path, "val/bpb") == [(0, 2.0)]
    assert read_scalars(tmp_path, "long " * 60) == [(2**40, 1.0)]


# ---- the printed line


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run_progress(file, num_steps=40, every=10, step_seconds=2.0, pauses=()):
    clock = Clock()
    with progress.Progress(num_steps, every=every, file=file, clock=clock) as shown:
        clock.now = 60.0  # compilation
        for step in range(1, num_steps + 1):
            clock.now += step_seconds + dict(pauses).get(step, 0.0)
            shown.step(step, {"loss": 5.0 / step, "grad_norm": 1.0})
        shown.say("saved")
    return file.getvalue()


def test_plain_lines_in_a_file():
    lines = run_progress(io.StringIO()).splitlines()
    assert lines == [
        "step  1/40  loss 5.0000  grad 1.00",
        "step 10/40  loss 0.5000  grad 1.00  left 1:00",
        "step 20/40  loss 0.2500  grad 1.00  left 0:40",
        "step 30/40  loss 0.1667  grad 1.00  left 0:20",
        "step 40/40  loss 0.1250  grad 1.00",
        "saved",
    ]


def test_terminal_shows_the_same_lines():
    shown = run_progress(Terminal())
    assert "step 10/40  loss 0.5000  grad 1.00  left 1:00" in shown
    assert "saved" in shown


def test_time_left_ignores_one_long_pause_and_counts_regular_ones():
    once = run_progress(io.StringIO(), pauses=[(15, 100.0)])
    assert "step 20/40  loss 0.2500  grad 1.00  left 0:40" in once
    regular = run_progress(io.StringIO(), pauses=[(step, 4.0) for step in range(2, 41, 2)])
    assert "step 20/40  loss 0.2500  grad 1.00  left 1:20" in regular


def test_line_with_everything():
    values = {
        "loss": 3.21456,
        "val/bpb": 1.8712,
        "learning_rate": 9.8e-4,
        "grad_norm": 0.853,
        "tokens_per_second": 12345.0,
        "mfu": 0.4123,
        "step_ms": 312.4,
        "data_wait": 0.003,
        "load/max_violation": 0.42,
        "skipped_steps": 0,
        "unknown": 1.0,
    }
    assert progress.format_line(120, 2000, values, 725.0) == (
        "step  120/2000  loss 3.2146  val bpb 1.8712  lr 9.80e-04  grad 0.85  12.3k tok/s  mfu 41.2%  312 ms  wait 0.3%"
        "  max-vio 0.42  left 12:05"
    )
    assert progress.format_line(1, 2, {"loss": math.nan}, None) == "step 1/2  loss nan"


@pytest.mark.parametrize(
    ("value", "text"), [(7, "7"), (950, "950"), (999.6, "1.00k"), (4891, "4.89k"), (123456, "123k"), (1.05e6, "1.05M")]
)
def test_counts(value, text):
    assert progress.format_count(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(7, "0:07"), (725, "12:05"), (11220, "3:07:00"), (187800, "2d 04:10")])
def test_seconds(seconds, text):
    assert progress.format_seconds(seconds) == text


# ---- the peak that MFU is a share of


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5p", 459),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA L4", 121),
        ("Tesla T4", 65),
        ("NVIDIA L40S", None),
        ("cpu", None),
    ],
)
def test_published_peaks(kind, tera):
    assert peak_flops.peak_flops(kind) == (tera and pytest.approx(1e12 * tera))


def test_cpu_peak_is_measured_once_for_all_virtual_devices():
    peak = peak_flops.find_peak(jax.devices())
    assert 1e9 < peak.flops < 1e14
    assert "x 1: float32 matrix products, measured" in peak.line
