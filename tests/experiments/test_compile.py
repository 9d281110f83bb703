"""The command that compiles a train step for devices that are not there."""

import json
import re

import pytest

from experiments import compile as command
from experiments.compilation import step
from experiments.compilation.chips import CHIP_RATES
from experiments.compilation.step import DoesNotFit
from experiments.errors import UserError
from experiments.peak_flops import peak_flops
from kernels_pallas import aot
from kernels_pallas.aot_cluster import cluster

needs_compilers = pytest.mark.skipif(aot.unavailable() is not None, reason=str(aot.unavailable()))

TINY = ["--config=configs/tiny.py", "--config.model.num_hidden_layers=2", "--config.model.mtp=none"]
TINY += ["--config.loss.mtp_loss_weight=none"]


def compile_to(path, *argv):
    code = command.main([*argv, f"--out={path}"])
    return code, json.loads(path.read_text())["results"]


@needs_compilers
@pytest.mark.slow
def test_a_small_step_on_eight_tpus(tmp_path, capsys):
    code, found = compile_to(tmp_path / "out.json", *TINY, "--topology=v5e:2x4", "--config.mesh.expert=4")
    assert code == 0 and found["fits"]
    assert (found["devices"], found["device_kind"]) == (8, "TPU v5 lite")
    assert found["mesh"] == {"data": 2, "fsdp": 1, "expert": 4, "tensor": 1}
    memory, flops = found["memory"], found["flops"]
    # Parameters and two moments in float32: all of them less 3 of 4 parts of the experts.
    experts = 16 * 3 * 256 * 176
    assert 0 < memory["arguments"] - 12 * (found["parameters"]["total"] - experts * 3 / 4) < 1e6
    assert memory["arguments"] < memory["peak"] < memory["hbm"]
    # Nothing is recomputed; the padding of experts and attention's hidden half come on top.
    assert 1 < flops["program"] / flops["model"] < 2
    assert {line["kind"] for line in found["collectives"]} >= {"all-reduce", "all-gather", "reduce-scatter"}
    printed = capsys.readouterr()
    assert re.fullmatch(r"traced in \d+ s; compiling for v5e:2x4, which may take minutes\n", printed.err)
    assert re.search(r"^memory .* of 16\.0: fits$", printed.out, re.MULTILINE)
    assert re.search(r"^step .* MFU .*estimates", printed.out, re.MULTILINE)


# DeepSeek-V3 with fewer and narrower layers; all else, from MTP to bfloat16 moments, is as it trains.
SMALL_V3 = ["--config=configs/deepseek_v3.py", "--config.mesh.expert=4", "--config.train.batch_ramp=none"]
SMALL_V3 += ["--config.train.batch_size=32", "--config.train.grad_accum_steps=4", "--config.train.seq_len=128"]
SMALL_V3 += [
    f"--config.model.{field}"
    for field in (
        "num_hidden_layers=2",
        "first_k_dense_replace=0",
        "vocab_size=1024",
        "hidden_size=512",
        "attention.num_attention_heads=4",
        "attention.q_lora_rank=128",
        "attention.kv_lora_rank=128",
        "moe.moe_intermediate_size=256",
        "moe.router.n_routed_experts=32",
        "moe.router.num_experts_per_tok=4",
    )
]


KERNELS = [f"--config.model.kernels.{op}=pallas" for op in ("flash_attention", "expert_mlp")]


@needs_compilers
@pytest.mark.parametrize(
    ("topology", "kernels"),
    [
        pytest.param("v5p:2x2x2", [], id="v5p"),
        pytest.param("h200:1x1x8", [], id="h200", marks=pytest.mark.slow),
        pytest.param("v5p:2x2x2", KERNELS, id="v5p, kernels", marks=pytest.mark.slow),
        pytest.param("h200:1x1x8", KERNELS, id="h200, kernels", marks=pytest.mark.slow),
    ],
)
def test_a_small_deepseek_v3(topology, kernels, tmp_path, capfd, monkeypatch):
    texts = []

    def compile_step(*arguments):
        compiled = step.compile_step(*arguments)
        texts.append(compiled.text)
        return compiled

    monkeypatch.setattr(command, "compile_step", compile_step)
    code, found = compile_to(tmp_path / "out.json", *SMALL_V3, *kernels, f"--topology={topology}")
    assert code == 0 and found["fits"]
    assert found["mesh"] == {"data": 1, "fsdp": 2, "expert": 4, "tensor": 1}
    traffic = {(line["kind"], line["group"]): line["bytes"] for line in found["collectives"]}
    # Tokens travel to experts, parameters to where they are used, and gradients back to where they lie. Little is summed over all
    # devices: the gradients of matrices are summed over fsdp first, of which each device keeps its part.
    assert {("all-to-all", 4), ("all-gather", 2), ("reduce-scatter", 2)} <= traffic.keys()
    assert traffic["all-reduce", 8] < 0.05 * traffic["reduce-scatter", 2]
    names = set(re.findall(r"/(flash_attention\w*|grouped_gemm\w*)/(?:pallas_call|mpmd_map)", texts[0]))
    if kernels:  # forward and backward, of attention and of experts
        assert len([name for name in names if name.startswith("flash")]) >= 2
        assert len([name for name in names if name.startswith("grouped")]) >= 2
    else:  # everything is computed again in the backward pass, and experts' rows are padded
        assert not names
        assert 4 / 3 < found["flops"]["program"] / found["flops"]["model"] < 2
    if topology.startswith("v5p"):  # no exchange of tokens is waited for where it begins
        opcodes = set(re.findall(r" (all-to-all(?:-start|-done)?)\(", texts[0]))
        assert opcodes == {"all-to-all-start", "all-to-all-done"}
    printed = capfd.readouterr()
    assert re.search(rf"^traced in \d+ s; compiling for {topology}, which may take minutes$", printed.err, re.MULTILINE)
    assert "ptxas" not in printed.out + printed.err
    assert re.search(r"^memory .*: fits$", printed.out, re.MULTILINE)
    assert re.search(r"^step .* MFU .*estimates", printed.out, re.MULTILINE)


def test_what_does_not_fit_is_one_line_and_exit_code_1(monkeypatch, capsys, tmp_path):
    def too_large(config, cluster, say):
        raise DoesNotFit("Ran out of memory in memory space hbm. Used 120.00G of 15.75G hbm.")

    monkeypatch.setattr(command, "prepare", lambda config, topology: cluster(topology))
    monkeypatch.setattr(command, "compile_step", too_large)
    code, found = compile_to(tmp_path / "out.json", "--config=configs/tiny.py", "--topology=v5e:2x4")
    assert code == 1 and not found["fits"]
    printed = capsys.readouterr()
    assert printed.err == "does not fit v5e:2x4: Ran out of memory in memory space hbm. Used 120.00G of 15.75G hbm.\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--topology=v5:2x4"],
            r"--topology=v5:2x4: no chip 'v5'; there are v5e, v5p, v6e, tpu7x, h200, h100 \(did you mean",
        ),
        (["--topology=v5p:8x8"], "v5p takes chips along each axis, such as v5p:2x2x1$"),
        (["--topology=v5e:2x0"], "v5e takes chips along each axis, such as v5e:2x2"),
        (["--topology=h100:8"], "h100 takes slices x hosts x GPUs of a host, such as h100:1x1x1"),
        (["--topology=h200"], "h200 takes slices x hosts x GPUs of a host, such as h200:1x1x1"),
        (["--topology=v5e:2x4", "--out=/no/such/folder/out.json"], "--out=/no/such/folder/out.json: no such directory"),
        ([], "--topology is required"),
    ],
)
def test_bad_input_is_refused_in_one_line(argv, message):
    with pytest.raises(UserError, match=message):
        command.main(["--config=configs/tiny.py", *argv])


@needs_compilers
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--topology=v5p:3x3x3"], 'Topology layout "v5p:3x3x3" is not divisible'),
        (["--topology=v5e:2x4", "--config.mesh.expert=3"], "does not fit 8 devices"),
        (["--topology=v5e:4x4"], "train.batch_size / train.grad_accum_steps=8 is not divisible by mesh .*=16"),
        (["--topology=v5e:2x4", "--config.train.seq_len=4096"], "more than model.max_position_embeddings"),
    ],
)
def test_what_cannot_be_trained_there_is_refused_before_compiling(argv, message):
    with pytest.raises(UserError, match=message):
        command.main(["--config=configs/tiny.py", *argv])


@needs_compilers
def test_an_h100_is_an_h200_with_less_memory():
    h100, h200 = (cluster(f"{name}:1x2x8") for name in ("h100", "h200"))
    assert len(h100.devices) == len(h200.devices) == 16 and h100.devices_per_host == 8
    kinds = [each.devices[0].device_kind for each in (h100, h200)]
    assert kinds == ["NVIDIA H100 80GB HBM3", "NVIDIA H200"]
    assert [peak_flops(kind) for kind in kinds] == [989.4e12] * 2
    less, more = CHIP_RATES["h100"], CHIP_RATES["h200"]
    assert less.hbm_bytes < more.hbm_bytes and less.hbm_rate < more.hbm_rate and less[2:] == more[2:]


def test_missing_compilers_are_named(monkeypatch):
    def missing():
        raise aot.Unavailable("libtpu not installed: pip install 'mdl[aot]'")

    monkeypatch.setattr(aot, "check_installed", missing)
    with pytest.raises(UserError, match="libtpu not installed"):
        command.main(["--config=configs/tiny.py", "--topology=v5e:2x4"])


@pytest.mark.slow
@needs_compilers
@pytest.mark.parametrize("topology", ["v5p:8x8x8", "v5p:8x8x16", "tpu7x:4x8x8", "h200:1x128x8"])
def test_the_whole_of_deepseek_v3_fits(topology, tmp_path):
    """671B parameters, MTP, batches of 15,360 rows of 4,096 tokens; the time is that of two cores."""
    code, found = compile_to(tmp_path / "out.json", "--config=configs/deepseek_v3.py", f"--topology={topology}")
    assert code == 0 and found["fits"]
    assert found["devices"] >= 512 and found["parameters"]["total"] > 670e9
    assert found["batch"] == {"rows": 15360, "seq_len": 4096, "micro_batches": 15}
    assert found["trace_seconds"] + found["compile_seconds"] < 600


@pytest.mark.slow
@needs_compilers
def test_one_h200(tmp_path):
    code, found = compile_to(tmp_path / "out.json", "--config=configs/moe_1b.py", "--topology=h200:1x1x1")
    assert code == 0 and found["fits"] and found["devices"] == 1
    assert not found["collectives"]
