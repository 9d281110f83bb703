"""`python -m experiments.convert`: every direction, bit by bit, and what it refuses."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from convert_files import (
    BF16,
    FP8,
    GOLDEN,
    as_bf16,
    assert_same_files,
    assert_same_tensors,
    contents,
    convert,
    read_json,
    with_companions,
    write_safetensors,
)
from jax.sharding import NamedSharding

from experiments import score
from experiments.arrays_on_disk import ArraysOnDisk
from experiments.checkpoint import CheckpointConfig
from experiments.config import ExperimentConfig
from experiments.config_tree import to_json
from experiments.conversion import blocks
from experiments.conversion.recast import is_quantized
from experiments.convert import main
from experiments.errors import UserError
from experiments.loading import find_model, load_model
from experiments.resume import check_directory
from experiments.tokenizer import byte_tokenizer
from mdl.hf.safetensors import open_tensors
from mdl.pure import PureModel
from mdl.sharding import MeshConfig

FAMILIES = [
    "deepseek_v2_lite",
    "deepseek_v3",
    "deepseek_v3_mtp",
    "deepseek_v3_yarn",
    "deepseek_v32",
    "glm_moe_dsa",
    "llama",
    "qwen3_moe",
    "qwen3_untied",
]


def logits(checkpoint, tmp_path, input_ids):
    np.save(tmp_path / "ids.npy", input_ids)
    out = tmp_path / "out.npz"
    assert score.main([f"--checkpoint={checkpoint}", f"--input_ids={tmp_path / 'ids.npy'}", f"--out={out}"]) == 0
    return np.load(out)["logits"]


def assert_same_arrays(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), got, want)


# ---- to our format and back


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_in_float32(family, tmp_path):
    ours = convert(GOLDEN / family, tmp_path / "ours")
    back = convert(ours, tmp_path / "back")
    assert_same_tensors(back, GOLDEN / family)
    assert read_json(back / "config.json") == read_json(GOLDEN / family / "config.json")


def test_layers_of_unequal_parameters_are_read_alike(tmp_path):
    """Some have an indexer, others none, so that no array holds all layers."""
    source = GOLDEN / "glm_moe_dsa"
    assert_same_arrays(load_model(convert(source, tmp_path / "ours")).arrays, load_model(source).arrays)


@pytest.mark.parametrize("family", ["deepseek_v3_mtp", "qwen3_moe"])
def test_there_and_back_in_bfloat16(family, tmp_path):
    source = as_bf16(GOLDEN / family, tmp_path / "source")
    back = convert(convert(source, tmp_path / "ours"), tmp_path / "back", max_shard_bytes=100_000)
    assert_same_tensors(back, source)
    assert len(list(back.glob("*.safetensors"))) > 3


def test_there_and_back_in_fp8(tmp_path):
    ours = convert(FP8, tmp_path / "ours")
    arrays = read_json(ours / "checkpoints" / "step_0" / "meta" / "metadata")["arrays"]
    assert arrays["params/layers/1/mlp/experts/gate_EDF"][:2] == ["float8_e4m3fn", [4, 160, 136]]
    assert arrays["params/layers/1/mlp/experts/gate_EDF_scale_inv"][:2] == ["float32", [4, 2, 2]]
    back = convert(ours, tmp_path / "back")
    assert_same_tensors(back, FP8)
    assert read_json(back / "config.json") == read_json(FP8 / "config.json")


@pytest.mark.parametrize("dtype", ["float8_e8m0fnu", "bfloat16"])
def test_scales_keep_their_dtype(dtype, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(FP8 / "config.json", source)
    tensors = dict(open_tensors(FP8))
    for name in tensors:
        if name.endswith("_scale_inv"):
            tensors[name] = np.exp2(np.round(np.log2(tensors[name]))).astype(dtype)
    if dtype == "bfloat16":
        write_safetensors(source / "model.safetensors", tensors)
    else:
        write_e8m0(source / "model.safetensors", tensors)
    ours = convert(source, tmp_path / "ours")
    assert_same_tensors(convert(ours, tmp_path / "back"), source)
    assert_same_arrays(load_model(ours).arrays, load_model(source).arrays)


def write_e8m0(file, tensors):
    as_bytes = {
        n: x.view(np.uint8).view("float8_e4m3fn") if x.dtype == "float8_e8m0fnu" else x for n, x in tensors.items()
    }
    write_safetensors(file, as_bytes)
    length = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + length])
    for name, fields in header.items():
        if name.endswith("_scale_inv"):
            fields["dtype"] = "F8_E8M0"
    text = json.dumps(header).encode()
    assert len(text) == length
    file.write_bytes(file.read_bytes()[:8] + text + file.read_bytes()[8 + length :])


@pytest.mark.parametrize("family", ["llama", "deepseek_v3_fp8"])
def test_a_converted_checkpoint_scores_as_its_source(family, tmp_path):
    ids = np.load(GOLDEN / family / "golden.npz")["input_ids"][:, :8]
    ours = convert(GOLDEN / family, tmp_path / "ours")
    np.testing.assert_array_equal(logits(ours, tmp_path, ids), logits(GOLDEN / family, tmp_path, ids))


def test_fp8_is_dequantized_on_any_mesh(tmp_path):
    ours = convert(FP8, tmp_path / "ours")
    want = load_model(FP8, MeshConfig(data=1, fsdp=1).build(jax.devices()[:1])).arrays
    for mesh in (MeshConfig(fsdp=8), MeshConfig(data=1, fsdp=2, expert=2, tensor=2)):
        got = load_model(ours, mesh.build()).arrays
        assert_same_arrays(got, want)


def test_dtypes_change_on_the_way_in(tmp_path):
    for source, dtype in [(GOLDEN / "deepseek_v3", "bf16"), (FP8, "bf16"), (FP8, "f32")]:
        to = convert(source, tmp_path / f"{source.name}_{dtype}", dtype=dtype, to_format="ours")
        want = {"bf16": "bfloat16", "f32": "float32"}[dtype]
        arrays = read_json(to / "checkpoints" / "step_0" / "meta" / "metadata")["arrays"]
        assert {a[0] for name, a in arrays.items() if name.startswith("params/")} == {want}
        assert {a[0] for name, a in arrays.items() if name.startswith("buffers/")} == {"float32"}
        assert read_json(to / "config.json")["model"]["precision"]["param"] == want
        loaded = load_model(to).arrays["params"]
        assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype(want)}
    back = convert(tmp_path / f"{FP8.name}_bf16", tmp_path / "back")
    assert_same_tensors(back, FP8 / "dequantized_bf16")
    assert "quantization_config" not in read_json(back / "config.json")


def test_a_copy_that_is_none_is_named(tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(GOLDEN / "deepseek_v3_mtp" / "config.json", source)
    tensors = dict(open_tensors(GOLDEN / "deepseek_v3_mtp"))
    tensors["model.layers.2.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.2.shared_head.head.weight"] = tensors["lm_head.weight"] + 1
    write_safetensors(source / "model.safetensors", tensors)
    ours = convert(source, tmp_path / "ours")
    assert [line.split(" and ")[0] for line in capsys.readouterr().err.splitlines()] == [
        "warning: model.layers.2.shared_head.head.weight should be a copy of lm_head.weight"
    ]
    back = open_tensors(convert(ours, tmp_path / "back"))
    assert back.keys() == tensors.keys()
    np.testing.assert_array_equal(back["model.layers.2.shared_head.head.weight"], tensors["lm_head.weight"])


# ---- between Hugging Face directories


def test_fp8_to_bfloat16_is_the_truth_bit_for_bit(tmp_path, capsys):
    to = convert(FP8, tmp_path / "bf16", dtype="bf16")
    assert "Hugging Face (FP8+bf16+f32) -> Hugging Face (bf16+f32)" in capsys.readouterr().out
    assert_same_tensors(to, FP8 / "dequantized_bf16")
    config = read_json(FP8 / "config.json")
    del config["quantization_config"]
    assert read_json(to / "config.json") == config


@pytest.mark.parametrize("ue8m0", [False, True])
def test_bfloat16_to_fp8_and_back(ue8m0, tmp_path):
    source = FP8 / "dequantized_bf16"
    to = convert(source, tmp_path / "fp8", fp8=True, ue8m0=ue8m0, max_shard_bytes=90_000)
    written, before = open_tensors(to), open_tensors(source)
    published = open_tensors(FP8)
    assert written.keys() == published.keys()
    assert {name: x.dtype for name, x in written.items()} == {name: x.dtype for name, x in published.items()}
    for name in before:
        if written[name].dtype == ml_dtypes.float8_e4m3fn:
            data, scale = quantized(before[name].astype(np.float32), ue8m0)
            assert written[name].tobytes() == data.tobytes(), name
            assert written[f"{name}_scale_inv"].tobytes() == scale.tobytes(), name
        else:
            assert written[name].tobytes() == before[name].tobytes(), name
    settings = read_json(to / "config.json")["quantization_config"]
    assert settings.get("scale_fmt") == ("ue8m0" if ue8m0 else None)
    back = open_tensors(convert(to, tmp_path / "back", dtype="bf16"))
    for name in before:  # half a step of e4m3, of the largest value in the block
        error = np.abs(back[name].astype(np.float32) - before[name].astype(np.float32))
        assert error.max() <= (2 if ue8m0 else 1) * np.abs(before[name].astype(np.float32)).max() * 2.0**-4, name


def quantized(w, ue8m0=False):
    """e4m3(w / scale) and scale = max(amax of each 128x128 block, 1e-4) / 448, in float32."""
    blocks = [(m, n) for m in range(0, w.shape[0], 128) for n in range(0, w.shape[1], 128)]
    data, scale = np.empty(w.shape, ml_dtypes.float8_e4m3fn), np.empty([-(-n // 128) for n in w.shape], np.float32)
    for m, n in blocks:
        block = w[m : m + 128, n : n + 128]
        s = np.maximum(np.abs(block).max(), np.float32(1e-4)) * np.float32(1 / 448)
        s = np.exp2(np.ceil(np.log2(s))) if ue8m0 else s
        scale[m // 128, n // 128] = s
        data[m : m + 128, n : n + 128] = np.clip(block / s, -448, 448).astype(data.dtype)
    return data, scale


def test_large_weights_go_through_xla_to_the_same_bits(monkeypatch):
    rng = np.random.default_rng(5)
    data = rng.integers(0, 256, (200, 300), np.uint8).view(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(1e-9, 1e9, (2, 3)).astype(np.float32)
    w = (rng.normal(size=(200, 300)) * rng.choice([1e-6, 1, 1e6], (200, 1))).astype(BF16)

    def results():
        for scales in (scale, scale * 0, scale * 1e-44, scale * np.nan):
            for dtype in (BF16, np.dtype(np.float32)):
                x = blocks.dequantize(data, scales, dtype)
                yield x.dtype, np.where(np.isnan(x), 1, x).tobytes()
        for ue8m0 in (False, True):
            yield [x.tobytes() for x in blocks.quantize(w, ue8m0=ue8m0)]

    by_numpy = list(results())
    monkeypatch.setattr(blocks, "_COMPILED", 0)
    assert list(results()) == by_numpy


def test_which_tensors_become_fp8():
    matrix = (256, 256)
    layer = "model.layers.61."
    for name in ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.indexer.wq_b", "self_attn.indexer.wk",
                 "mlp.experts.7.down_proj", "mlp.shared_experts.up_proj", "mlp.gate_proj"):  # fmt: skip
        assert is_quantized(f"{layer}{name}.weight", matrix), name
    for name in ("eh_proj", "mlp.gate", "embed_tokens", "shared_head.head", "self_attn.indexer.weights_proj"):
        assert not is_quantized(f"{layer}{name}.weight", matrix), name
    assert not is_quantized("lm_head.weight", matrix)
    assert not is_quantized(f"{layer}self_attn.q_proj.bias", matrix)


def test_float32_to_bfloat16(tmp_path):
    to = convert(GOLDEN / "deepseek_v3", tmp_path / "to", dtype="bf16", to_format="hf")
    assert_same_tensors(to, as_bf16(GOLDEN / "deepseek_v3", tmp_path / "want"))
    assert read_json(to / "config.json")["dtype"] == "bfloat16"


# ---- large tensors are cut; here all of them are


@pytest.fixture
def in_small_pieces(monkeypatch):
    from experiments.conversion import hf_files, run_files

    monkeypatch.setattr(hf_files, "_PIECE_BYTES", 10_000)
    monkeypatch.setattr(run_files, "_CHUNK_BYTES", 5_000)
    monkeypatch.setattr(run_files, "_GROUP_BYTES", 2_000)


@pytest.mark.parametrize("family", ["deepseek_v3_mtp", "deepseek_v3_fp8", "deepseek_v32", "qwen3_moe"])
def test_pieces_do_not_show(family, tmp_path, in_small_pieces):
    ours = convert(GOLDEN / family, tmp_path / "ours")
    files = sum(1 for _ in (ours / "checkpoints" / "step_0" / "state").glob("*/0*"))
    arrays = sum(1 for _ in (ours / "checkpoints" / "step_0" / "state").glob("*/.zarray"))
    assert files > 2 * arrays
    assert_same_tensors(convert(ours, tmp_path / "back"), GOLDEN / family)
    load_model(ours)  # checksums
    if family == "deepseek_v3_fp8":
        assert_same_tensors(convert(ours, tmp_path / "bf16", dtype="bf16"), FP8 / "dequantized_bf16")
        convert(FP8 / "dequantized_bf16", tmp_path / "again", fp8=True)
        cut = open_tensors(tmp_path / "again")
        for name, x in open_tensors(FP8 / "dequantized_bf16").items():
            if f"{name}_scale_inv" in cut:
                data, scale = quantized(x.astype(np.float32))
                assert cut[name].tobytes() == data.tobytes(), name
                assert cut[f"{name}_scale_inv"].tobytes() == scale.tobytes(), name


# ---- what a run has trained


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run directory with averaged parameters, made by the Checkpointer from random numbers."""
    from experiments.checkpoint import Checkpointer
    from mdl.hf import model_config

    directory = tmp_path_factory.mktemp("trained") / "run"
    model = model_config(read_json(GOLDEN / "deepseek_v3_mtp" / "config.json"))
    config = ExperimentConfig(model=model)
    config = ExperimentConfig(model=model, train=type(config.train)(ema_decay=0.9))
    mesh = MeshConfig(data=1, fsdp=4, expert=2).build()
    with jax.set_mesh(mesh):
        abstract = PureModel(model).abstract()
    rng = np.random.default_rng(3)

    def fill(leaf):
        return jax.device_put(rng.normal(size=leaf.shape).astype(leaf.dtype), NamedSharding(mesh, leaf.sharding.spec))

    with jax.set_mesh(mesh):
        state = jax.tree.map(fill, abstract)
        state["ema"] = jax.tree.map(fill, abstract["params"])
        with Checkpointer(directory / "checkpoints", CheckpointConfig(every=1)) as checkpointer:
            assert checkpointer.save(7, state, data_state={}, config_json=to_json(config), extra={})
    (directory / "config.json").write_text(json.dumps(to_json(config)))
    byte_tokenizer().save(directory / "tokenizer")
    return directory


def test_a_trained_run_goes_out_and_comes_in_unchanged(trained, tmp_path):
    out = convert(trained, tmp_path / "out")
    config = read_json(out / "config.json")
    assert config["model_type"] == "deepseek_v3" and config["num_nextn_predict_layers"] == 1
    assert (config["bos_token_id"], config["eos_token_id"]) == (256, 257)
    tensors = open_tensors(out)
    np.testing.assert_array_equal(tensors["model.layers.2.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    want = load_model(trained).arrays
    for directory in (out, convert(out, tmp_path / "ours")):
        loaded = load_model(directory)
        assert loaded.tokenizer and loaded.tokenizer.fingerprint == byte_tokenizer().fingerprint
        assert_same_arrays(loaded.arrays, want)
    averaged = convert(trained / "checkpoints" / "step_7", tmp_path / "averaged", ema=True)
    assert_same_arrays(load_model(averaged).arrays, find_model(trained, ema=True).load().arrays)


def test_a_run_stores_each_expert_apart(trained):
    on_disk = ArraysOnDisk(trained / "checkpoints" / "step_7" / "state")
    for name in ("params/layers/1/mlp/experts/gate_EDF", "ema/layers/1/mlp/experts/down_EFD"):
        assert on_disk.open(name).chunk_layout.read_chunk.shape[0] == 1


def test_a_trained_run_goes_out_in_fp8(trained, tmp_path):
    fp8 = convert(trained, tmp_path / "fp8", dtype="bf16", fp8=True)
    plain = convert(trained, tmp_path / "plain")
    assert_same_tensors(fp8, convert(plain, tmp_path / "in two steps", dtype="bf16", fp8=True))


# ---- what travels along


def test_tokenizer_and_templates_travel_both_ways(tmp_path):
    source = with_companions(GOLDEN / "llama", tmp_path / "source")
    ours = convert(source, tmp_path / "ours")
    back = convert(ours, tmp_path / "back")
    bf16 = convert(source, tmp_path / "bf16", dtype="bf16", to_format="hf")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        for directory in (ours / "tokenizer", back, bf16):
            assert (directory / name).read_bytes() == (source / name).read_bytes()
    assert not list(tmp_path.glob("back/*.py"))
    loaded = load_model(ours)
    assert loaded.tokenizer and loaded.tokenizer.fingerprint == byte_tokenizer().fingerprint


# ---- what is refused


def test_nothing_is_overwritten(tmp_path):
    to = convert(GOLDEN / "llama", tmp_path / "to")
    before = contents(to)
    with pytest.raises(UserError, match=r"--to=.*holds files already; nothing is overwritten, name a new directory"):
        main([f"--from={GOLDEN / 'qwen3_moe'}", f"--to={to}"])
    assert contents(to) == before
    (tmp_path / "empty").mkdir()
    assert_same_files(convert(GOLDEN / "llama", tmp_path / "empty"), to)


@pytest.mark.parametrize(
    ("source", "flags", "message"),
    [
        ("llama", ["--to_format=hf"], "this would be a copy; give --dtype or --fp8"),
        ("llama", ["--fp8", "--to_format=ours"], "--fp8 writes Hugging Face files"),
        ("llama", ["--ema"], "is no run of ours and holds no averaged parameters"),
        ("llama", ["--ue8m0"], "--ue8m0 belongs to --fp8"),
        ("llama", ["--dtype=fp16"], "--dtype=fp16"),
        ("llama", ["--process_id=2", "--num_processes=2"], "must be between 0 and num_processes - 1"),
        ("deepseek_v3_fp8", ["--fp8"], "holds FP8 already"),
        ("components", [], "no checkpoint here"),
        ("nowhere", [], "no such directory"),
    ],
)
def test_bad_requests_write_nothing(source, flags, message, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        main([f"--from={GOLDEN / source}", f"--to={tmp_path / 'to'}", *flags])
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "1 missing (model.norm.weight)"),
        (lambda t: t.update(stranger=np.zeros(3, np.float32)), "1 left over (stranger)"),
        (lambda t: t.update({"model.norm.weight": np.zeros(3, np.float32)}), "model.norm.weight [3] instead of [64]"),
    ],
)
def test_tensors_that_do_not_fit_are_named_before_anything_is_written(change, message, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(GOLDEN / "llama" / "config.json", source)
    tensors = dict(open_tensors(GOLDEN / "llama"))
    change(tensors)
    write_safetensors(source / "model.safetensors", tensors)
    with pytest.raises(UserError, match=re.escape(message)):
        main([f"--from={source}", f"--to={tmp_path / 'to'}"])
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_weights_without_their_config_are_refused(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(GOLDEN / "llama" / "model.safetensors", source)
    with pytest.raises(UserError, match=r"holds safetensors files, but no config.json"):
        main([f"--from={source}", f"--to={tmp_path / 'to'}"])


def test_a_full_disk_is_noticed_before(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 900))
    with pytest.raises(UserError, match=r"needs 575 kB, the disk has 900 B left"):
        main([f"--from={GOLDEN / 'llama'}", f"--to={tmp_path / 'to'}"])
    assert not list(tmp_path.iterdir())


def test_no_run_goes_on_in_a_converted_directory(tmp_path):
    ours = convert(GOLDEN / "llama", tmp_path / "ours")
    with pytest.raises(UserError, match=r"begin one elsewhere with --config.init_from="):
        check_directory(ExperimentConfig(), ours)


def test_help_spells_the_flags(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert re.search(r"--from +str +required +Hugging Face directory", text)
