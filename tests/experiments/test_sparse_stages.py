"""From dense to sparse attention: indexers are trained alone, then everything is, each run beginning with the one before."""

import contextlib
import io

import numpy as np
import pytest
from small_runs import CONFIG, checkpoint, metrics

from experiments import run
from experiments.generate import main as generate

pytestmark = pytest.mark.slow  # four runs; the parts are tested in test_step and mdl/test_dsa

SPARSE_CONFIG = CONFIG.with_name("small_dsa.py")
WARMUP = (
    "--config.model.attention.warmup=true",
    "--config.train.trainable=*/indexer/*",
    "--config.loss.bias_update_speed=none",
)


@pytest.fixture(scope="module")
def stages(home, tmp_path_factory):
    """The runs dense, warmup, sparse and too_early of two steps each on eight devices, and what the last three said on stderr."""
    folder = tmp_path_factory.mktemp("stages")
    said = {name: io.StringIO() for name in ("dense", "warmup", "sparse", "too_early")}

    def stage(name, config, *arguments, steps=2):
        flags = [
            "--config.eval.every=2",
            "--config.checkpoint.every=1",
            f"--config.train.num_steps={steps}",
            *arguments,
        ]
        with contextlib.redirect_stderr(said[name]):
            assert run.main([f"--config={config}:{home.corpus}", f"--workdir={folder / name}", *flags]) == 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home.cache))
        stage("dense", CONFIG)
        for steps in (1, 2):  # the second goes on from the first's checkpoint
            stage("warmup", SPARSE_CONFIG, f"--config.init_from={folder / 'dense'}", *WARMUP, steps=steps)
        stage("sparse", SPARSE_CONFIG, f"--config.init_from={folder / 'warmup'}")
        stage("too_early", SPARSE_CONFIG, f"--config.init_from={folder / 'dense'}", steps=1)
    return folder, {name: text.getvalue() for name, text in said.items()}


def test_the_first_stage_trains_indexers_only(stages):
    folder, _ = stages
    (dense, _), (warmup, _) = checkpoint(folder / "dense"), checkpoint(folder / "warmup")
    indexers = {name for name in warmup if name.startswith("/params/") and "/indexer/" in name}
    assert len(indexers) == 5 * 3
    for name, array in warmup.items():
        if name.startswith(("/params/", "/buffers/")) and name not in indexers:
            np.testing.assert_array_equal(array, dense[name.replace("/dense/", "/")], err_msg=name)
    moments = {name.split("/params/")[-1] for name in warmup if name.startswith("/opt/mu")}
    assert moments == {name.replace("/params/", "/opt/mu/") for name in indexers}
    first = checkpoint(folder / "sparse")[0]
    assert all(np.any(first[name] != warmup[name]) for name in indexers)
    assert len([name for name in first if name.startswith("/opt/mu/")]) > len(moments)


def test_metrics(stages):
    folder, _ = stages
    for name in ("warmup", "sparse"):
        lines = metrics(folder / name)
        assert len(lines) == 2
        last = lines[-1]
        assert last["indexer/kl"] > 0 and last["indexer/uniform"] > 0
        kls = last["indexer/by_layer/kl"]
        assert len(kls) == 3  # with the MTP module's
        np.testing.assert_allclose([last["loss/indexer"], 3 * last["indexer/kl"]], sum(kls), rtol=1e-5)
        assert 6 / 16 < last["val/indexer/recall"] < 1
        assert len(last["val/indexer/by_layer/recall"]) == 2
        want = last["loss/main"] + 0.3 * last["loss/mtp_1"] + 1e-4 * last["loss/balance"] + last["loss/indexer"]
        np.testing.assert_allclose(last["loss"], want, rtol=1e-5)
    assert not any("indexer" in name for name in metrics(folder / "dense")[-1])


def test_attention_is_still_dense_in_the_first_stage(stages):
    """What the run says of held-out text is what the dense model said."""
    folder, _ = stages
    losses = {name: metrics(folder / name)[-1]["val/loss"] for name in ("dense", "warmup", "sparse")}
    np.testing.assert_allclose(losses["warmup"], losses["dense"], rtol=1e-6)
    assert abs(losses["sparse"] - losses["dense"]) > 1e-5


def test_untrained_indexers_are_named(stages):
    folder, said = stages
    warning = "warning: the indexers that choose keys have learnt nothing yet"
    assert f"{warning} (init_from={folder / 'dense'})" in said["too_early"]
    assert warning not in said["warmup"] and warning not in said["sparse"]
    assert "attention.warmup" in said["sparse"]  # what differs from the run before is told


def test_generating_beyond_what_is_selected(stages, capsys):
    folder, _ = stages
    capsys.readouterr()
    generate([f"--checkpoint={folder / 'sparse'}", "--prompt=abcdefghijkl", "--max_new_tokens=24"])
    assert len(capsys.readouterr().out) > 12
