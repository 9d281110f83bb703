"""Training with every transport: the same losses, but for rounding, which training magnifies."""

import numpy as np
import pytest
from small_runs import CONFIG, ROOT, assert_close_run, metrics

from experiments import run

# Some layers find room for all tokens that come, in some steps; the others make room.
TRANSPORTS = {
    "ring": ["RingConfig"],
    "all_to_all": ["AllToAllConfig", ".capacity_factor=0.75"],
    "ragged": ["EmulatedRaggedConfig", ".capacity_factor=0.75"],
}


def train(workdir, config, name, *arguments) -> None:
    """On the eight devices of this process, four of which share the experts."""
    cls, *fields = TRANSPORTS[name]
    transport = [f"={cls}", *fields]
    command = [f"--config={config}", f"--workdir={workdir}", "--config.mesh.expert=4"]
    assert run.main([*command, *(f"--config.model.moe.transport{part}" for part in transport), *arguments]) == 0


@pytest.mark.slow
def test_a_run_on_eight_devices_is_that_of_one(home, uninterrupted, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(home.cache))
    train(tmp_path / "run", f"{CONFIG}:{home.corpus}", "ragged")
    assert_close_run(tmp_path / "run", uninterrupted)


@pytest.mark.slow
def test_three_hundred_steps_of_tiny(home, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(home.cache))
    losses = {}
    for name in TRANSPORTS:
        short = "--config.train.num_steps=300", "--config.train.seq_len=64", "--config.eval.every=300"
        train(tmp_path / name, ROOT / "configs" / "tiny.py", name, *short, "--config.checkpoint.every=300")
        lines = metrics(tmp_path / name)
        assert all(line["load/drop_rate"] == 0 for line in lines)
        losses[name] = np.array([line["loss"] for line in lines])
    for name in ("all_to_all", "ragged"):
        np.testing.assert_allclose(losses[name][:10], losses["ring"][:10], rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(losses[name][-1], losses["ring"][-1], rtol=1e-2, err_msg=name)
