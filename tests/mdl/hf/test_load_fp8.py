"""FP8 checkpoints: 128x128 blocks with partial ones at the edges, against the dequantized truth of the golden files."""

import dataclasses
import functools
import json
import pathlib

import jax
import ml_dtypes
import numpy as np
import pytest

from experiments.loading import find_model
from experiments.scoring import score
from kernels_pallas.fp8 import host
from mdl import hf
from mdl.hf import fp8
from mdl.hf.load import leaf_shapes, load_params, read_config
from mdl.hf.safetensors import open_tensors
from mdl.hf.safetensors_write import ShardWriter, plan_shards
from mdl.hf.table import Layout, bind
from mdl.precision import PrecisionConfig
from mdl.pure import PureModel
from mdl.sharding import MeshConfig

GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "deepseek_v3_fp8"
TRUTH = GOLDEN / "dequantized_bf16"
O_PROJ = "model.layers.1.self_attn.o_proj.weight"
UP = "model.layers.1.mlp.experts.3.up_proj.weight"


def one_device():
    return MeshConfig(data=1).build(jax.devices()[:1])


def load(directory, mesh=None):
    config = hf.model_config(read_config(directory))
    return load_params(directory, PureModel(config), mesh or one_device())


@functools.cache
def truth():
    return load(TRUTH)


def same_bits(got, want) -> None:
    def same(a, b):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()

    jax.tree.map(same, got, want)


# ---- the golden checkpoint


def test_parameters_are_the_truth_bit_for_bit():
    assert open_tensors(GOLDEN).entries[O_PROJ].file != open_tensors(GOLDEN).entries[f"{O_PROJ}_scale_inv"].file
    assert open_tensors(GOLDEN)[O_PROJ].dtype == fp8.DTYPE
    same_bits(load(GOLDEN), truth())


@pytest.mark.parametrize("mesh", [MeshConfig(data=1, fsdp=2, expert=2, tensor=2), MeshConfig(data=1, fsdp=8)])
def test_eight_devices_hold_the_same(mesh):
    same_bits(load(GOLDEN, mesh.build()), truth())


def test_logits():
    """The golden logits are those of the bfloat16 weights, computed in float32."""

    def logits(directory):
        source = find_model(directory)
        precision = PrecisionConfig(param="bfloat16", compute="float32")
        source = dataclasses.replace(source, config=dataclasses.replace(source.config, precision=precision))
        return score(source.load(one_device()), want["input_ids"], batch_size=8).logits_BTV

    with np.load(GOLDEN / "golden.npz", allow_pickle=False) as want:
        stored, dequantized = logits(GOLDEN), logits(TRUTH)
        np.testing.assert_array_equal(stored, dequantized)
        np.testing.assert_allclose(stored, want["logits"], rtol=1e-4, atol=1e-4)  # see tests/golden/README.md


# ---- only what is needed is read


@pytest.fixture
def asked(monkeypatch):
    """Elements that were dequantized, one entry per call."""
    counts = []

    dequantize = host.dequantize

    def spy(data, scale, dtype, *, rows, cols):
        counts.append(len(range(*rows.indices(data.shape[0]))) * len(range(*cols.indices(data.shape[1]))))
        return dequantize(data, scale, dtype, rows=rows, cols=cols)

    monkeypatch.setattr(host, "dequantize", spy)
    return counts


def bindings():
    config = hf.model_config(read_config(GOLDEN))
    shapes = leaf_shapes(jax.eval_shape(lambda: truth()))
    return {binding.path: binding for binding in bind(hf.family(read_config(GOLDEN)).TABLE, config, shapes)}


@pytest.mark.parametrize(
    ("path", "index"),
    [
        ("stack/mlp/experts/up_EDF", np.s_[0:1, 1:3, 30:150, 64:136]),
        ("stack/mlp/experts/down_EFD", np.s_[0:1, 3:4, 0:136, 159:160]),
        ("stack/attention/kv_b_proj/weight", np.s_[0:1, 7:131, 1:3, 0:64]),
        ("stack/attention/o_proj/weight", np.s_[0:1, 2:4, 0:32, 100:160]),
        ("prefix/0/mlp/gate_proj/weight", np.s_[80:160, 132:264]),
        ("prefix/0/mlp/gate_proj/weight", np.s_[0:0, 0:264]),
    ],
)
def test_a_slice_reads_no_more_than_itself(asked, path, index):
    binding = bindings()[path]
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    part = binding.read(open_tensors(GOLDEN), index, bfloat16)
    assert sum(asked) == part.size
    whole = tuple(slice(0, size) for size in binding.shape)
    np.testing.assert_array_equal(part, binding.read(open_tensors(TRUTH), whole, bfloat16)[index])


def test_loading_onto_devices_reads_each_element_once(asked):
    load(GOLDEN, MeshConfig(data=1, fsdp=8).build())
    tensors = open_tensors(GOLDEN)
    assert sum(asked) == sum(tensor.size for tensor in tensors.values() if tensor.dtype == fp8.DTYPE)


def test_inner_dims_of_a_merged_one_are_cut_after_reading():
    theirs = np.arange(4 * 6 * 5).reshape(24, 5)
    layout, index = Layout("(NK)D -> DNK"), (range(1, 4), range(2, 3), range(1, 5))
    slices, shape, rest = layout.part(index, (5, 4, 6))
    assert slices == np.s_[12:18, 1:4]
    np.testing.assert_array_equal(
        layout.read(theirs[slices], shape)[rest], layout.read(theirs, (5, 4, 6))[1:4, 2:3, 1:5]
    )


# ---- other scales


@pytest.fixture
def changed(tmp_path):
    """A function that writes the golden checkpoint with changes to its tensors into one file, and returns the directory."""

    def write(change) -> pathlib.Path:
        tensors = dict(open_tensors(GOLDEN))
        change(tensors)
        [shard] = plan_shards({name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()})
        with ShardWriter(tmp_path, shard) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
        (tmp_path / "config.json").write_text((GOLDEN / "config.json").read_text())
        return tmp_path

    return write


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e8m0fnu, ml_dtypes.bfloat16])
def test_scales_of_other_dtypes(changed, dtype):
    scale = np.array([[0.5, 2.0**-9], [4.0, 1.0]], dtype)  # UP is [136, 160]

    def other_scale(tensors):
        tensors[f"{UP}_scale_inv"] = scale

    experts = load(changed(other_scale))["params"]["stack"]["mlp"]["experts"]["up_EDF"]
    factors = np.repeat(np.repeat(scale.astype(np.float32), 128, 0), 128, 1)[:136, :160]
    want = (open_tensors(GOLDEN)[UP].astype(np.float32) * factors).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(experts[0, 3], want.T)


def remove(name):
    return lambda tensors: tensors.pop(name)


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


NORM = "model.norm.weight"
MISFITS = {
    "no scale": (remove(f"{UP}_scale_inv"), rf"1 missing \({UP}_scale_inv\)"),
    "a scale too many": (put(f"{NORM}_scale_inv", np.ones(1, np.float32)), rf"1 left over \({NORM}_scale_inv\)"),
    "scale without its weight": (
        remove(UP),
        rf"1 missing \({UP}\); 1 left over \({UP}_scale_inv\)",
    ),
    "scale of a weight that is not FP8": (
        put(UP, np.zeros((136, 160), np.float32)),
        rf"1 left over \({UP}_scale_inv\)",
    ),
    "another grid": (
        put(f"{UP}_scale_inv", np.ones((2, 1), np.float32)),
        rf"1 of another shape \({UP}_scale_inv \[2, 1\] instead of \[2, 2\]\)",
    ),
    "one scale for all": (
        put(f"{UP}_scale_inv", np.ones((), np.float32)),
        rf"1 of another shape \({UP}_scale_inv \[\] instead of \[2, 2\]\)",
    ),
    "scale of another dtype": (
        put(f"{UP}_scale_inv", np.ones((2, 2), np.float16)),
        rf"1 of a dtype that cannot be read \({UP}_scale_inv float16\)",
    ),
    "another FP8": (
        put(UP, np.zeros((136, 160), ml_dtypes.float8_e5m2)),
        rf"1 left over \({UP}_scale_inv\); 1 of a dtype that cannot be read \({UP} float8_e5m2\)",
    ),
    "FP8 vector": (
        put(NORM, np.ones(160, ml_dtypes.float8_e4m3fn)),
        rf"1 of a dtype that cannot be read \({NORM} float8_e4m3fn\)",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_misfits_are_listed_in_one_error(changed, case):
    change, message = MISFITS[case]
    with pytest.raises(ValueError, match=f"the tensors do not fit config.json: {message}$"):
        load(changed(change))


# ---- config.json


def config_with(**settings):
    config_json = json.loads((GOLDEN / "config.json").read_text())
    return hf.model_config(config_json | {"quantization_config": config_json["quantization_config"] | settings})


def test_quantization_config_as_published():
    assert read_config(GOLDEN)["quantization_config"] == fp8.quantization_config()
    assert config_with() == hf.model_config(read_config(TRUTH))
    assert config_with(scale_fmt="ue8m0", modules_to_not_convert=["lm_head"]) == config_with()
    assert config_with(scale_fmt="float", expert_dtype="fp8", dequantize=True) == config_with()
    assert config_with(**fp8.quantization_config(ue8m0=True)) == config_with()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("quant_method", "gptq"),
        ("quant_method", None),
        ("fmt", "e5m2"),
        ("weight_block_size", [64, 128]),
        ("weight_block_size", None),
        ("weight_block_size", 128),
        ("activation_scheme", "static"),
        ("scale_fmt", "e5m10"),
        ("expert_dtype", "fp4"),
        ("bits", 4),
    ],
)
def test_other_quantization_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"config\.json: quantization_config: {field}="):
        config_with(**{field: value})
