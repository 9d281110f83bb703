"""The figure of a run: drawn, small, right curves; clear lines when something is missing."""

import json
import sys

import pytest

from experiments import plot
from experiments.errors import UserError
from experiments.plot import Curve

PNG = b"\x89PNG"


def write_run(folder, losses, **others):
    folder.mkdir()
    lines = [{"step": i, "loss": loss} | {k: v[i - 1] for k, v in others.items()} for i, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9, "lo')
    return folder


@pytest.fixture
def run(tmp_path):
    n = 400
    noise = [0.1 * ((i * 7919) % 101 - 50) / 50 for i in range(n)]
    losses = [3 + 5 / (i + 1) + noise[i] for i in range(n)]
    losses[5] = None
    return write_run(tmp_path / "tiny", losses, grad_norm=[1 + x for x in noise], learning_rate=[1e-3] * n)


def test_one_run(run, capsys):
    pytest.importorskip("matplotlib")
    plot.main([str(run)])
    assert capsys.readouterr().out.strip() == str(run / "loss.png")
    data = (run / "loss.png").read_bytes()
    assert data.startswith(PNG)
    assert 5_000 < len(data) < 100_000
    assert plot.plot_at_end(run) == f"curves: {run / 'loss.png'}"


def test_several_runs_with_and_without_each_metric(run, tmp_path):
    pytest.importorskip("matplotlib")
    other = write_run(tmp_path / "other", [2.0, 1.0, float("nan")], **{"val/bpb": [1.0, None, 0.5]})
    (tmp_path / "no_run").mkdir()
    plot.main([str(run), str(other), str(tmp_path / "no_run"), f"--out={tmp_path / 'all.png'}"])
    assert (tmp_path / "all.png").read_bytes().startswith(PNG)
    assert not (run / "loss.png").exists()


def test_curves():
    lines = [
        {"step": 1, "a": 1.0},
        {"step": 2, "a": None},
        {"step": 3, "a": float("inf")},
        {"step": 4, "a": 2, "b": 3.0},
    ]
    assert plot.read_curve(lines, ("a",)) == Curve([1, 4], [1.0, 2])
    assert plot.read_curve(lines, ("absent", "b")) == Curve([4], [3.0])
    assert plot.read_curve(lines, ("absent",)) == Curve([], [])
    long = Curve(list(range(10_000)), [float(x) for x in range(10_000)])
    assert len(plot.thinned(long).steps) <= 700
    assert plot.thinned(long).steps[-1] == 9999
    flat = plot.smoothed(Curve(list(range(1000)), [5.0] * 1000))
    assert flat.values == [5.0] * 1000
    bottom, top = plot.loss_limits([Curve(list(range(1000)), [100.0] + [5.0] * 500 + [4.0] * 499)])
    assert 3.5 < bottom < 4 < 5 < top < 10


def test_the_acceptance_of_drafts_is_drawn_where_a_run_measured_it(tmp_path):
    pytest.importorskip("matplotlib")
    (panel,) = (each for each in plot._SMALL_PANELS if "drafts" in each.title)
    lines = [
        {"step": 1, "val/acceptance/mtp_1": 0.5},
        {"step": 2, "val/acceptance/mtp_1": 0.6, "val/acceptance/mtp_2": 0.3},
    ]
    assert plot.panel_curves(lines, panel) == [Curve([1, 2], [0.5, 0.6]), Curve([2], [0.3])]
    assert plot.panel_curves([{"step": 1, "loss": 1.0}], panel) == []
    plain, drafting = (tmp_path / name for name in ("plain", "drafting"))
    write_run(plain, [2.0, 1.0])
    write_run(drafting, [2.0, 1.0], **{"val/acceptance/mtp_1": [0.5, 0.6], "val/acceptance/mtp_2": [None, 0.3]})
    pictures = []
    for run in (plain, drafting):
        plot.main([str(run)])
        pictures.append((run / "loss.png").read_bytes())
    assert pictures[0] != pictures[1]


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([], "no run: give run directories"),
        (["nowhere"], "no metrics.jsonl in nowhere"),
        (["--uot=x"], "did you mean --out"),
    ],
)
def test_bad_arguments(argv, line):
    with pytest.raises(UserError, match=line):
        plot.main(argv)


def test_no_finite_loss(tmp_path):
    pytest.importorskip("matplotlib")
    run = write_run(tmp_path / "run", [None])
    with pytest.raises(UserError, match="no finite loss in"):
        plot.main([str(run)])
    assert plot.plot_at_end(run).startswith("no loss.png: no finite loss")


def test_without_matplotlib(run, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        plot.main([str(run)])
    assert plot.plot_at_end(run) == "no loss.png: matplotlib is not installed; run `pip install matplotlib`"
