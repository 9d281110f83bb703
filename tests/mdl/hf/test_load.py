"""Tables read in both directions, and what happens when tensors and config.json do not fit."""

import json
import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from mdl import hf
from mdl.hf import deepseek_v3, llama
from mdl.hf.load import export_tensors, load_params, read_config
from mdl.hf.safetensors import open_tensors
from mdl.hf.safetensors_write import ShardWriter, plan_shards, write_index
from mdl.hf.table import Layout
from mdl.pure import PureModel
from mdl.sharding import MeshConfig

GOLDEN = pathlib.Path(__file__).parents[2] / "golden"
VARIANTS = [
    "deepseek_v3",
    "deepseek_v3_yarn",
    "deepseek_v3_mtp",
    "deepseek_v2_lite",
    "deepseek_v32",
    "glm_moe_dsa",
    "qwen3_untied",
    "qwen3_moe",
    "llama",
]


def one_device():
    return MeshConfig(data=1).build(jax.devices()[:1])


def load(directory, mesh=None):
    config = hf.model_config(read_config(directory))
    return load_params(directory, PureModel(config), mesh or one_device()), config


@pytest.fixture
def copied(tmp_path):
    """A function that copies a golden checkpoint, with changes to its tensors and config, and returns the directory."""

    def copy(variant: str, change=None, **fields) -> pathlib.Path:
        config = json.loads((GOLDEN / variant / "config.json").read_text()) | fields
        (tmp_path / "config.json").write_text(json.dumps(config))
        tensors = load_file(GOLDEN / variant / "model.safetensors")
        save_file(change(tensors) if change else tensors, tmp_path / "model.safetensors")
        return tmp_path

    return copy


KEPT_IN_FLOAT32 = ("e_score_correction_bias", "indexer.weights_proj.weight")


def to_bfloat16(tensors):
    return {k: v if k.endswith(KEPT_IN_FLOAT32) else v.astype(ml_dtypes.bfloat16) for k, v in tensors.items()}


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [*((variant, "float32") for variant in VARIANTS), ("deepseek_v32", "bfloat16"), ("deepseek_v3_mtp", "bfloat16")],
)
def test_in_and_out_again(copied, variant, dtype):
    directory = copied(variant, to_bfloat16 if dtype == "bfloat16" else None, dtype=dtype)
    arrays, config = load(directory)
    config_json = hf.config_json(config)
    exported = dict(export_tensors(arrays, config, hf.family(config_json).TABLE))

    written = directory / "written"
    written.mkdir()
    (written / "config.json").write_text(json.dumps(config_json))
    shards = plan_shards({name: (tensor.dtype, tensor.shape) for name, tensor in exported.items()}, 100_000)
    for shard in shards:
        with ShardWriter(written, shard) as writer:
            for name in shard.entries:
                writer.write(name, exported[name])
    write_index(written, shards)

    want, got = open_tensors(directory), open_tensors(written)
    assert set(got) == set(want)
    for name in want:
        assert (got[name].dtype, got[name].shape) == (want[name].dtype, want[name].shape), name
        assert got[name].tobytes() == want[name].tobytes(), name


def test_one_tensor_lies_where_the_table_says():
    arrays, _ = load(GOLDEN / "deepseek_v3")
    theirs = load_file(GOLDEN / "deepseek_v3" / "model.safetensors")
    heads = theirs["model.layers.2.self_attn.kv_b_proj.weight"].reshape(4, 44, 32)
    np.testing.assert_array_equal(arrays["params"]["stack"]["attention"]["kv_b_proj"]["weight"][1, :, 3], heads[3].T)
    np.testing.assert_array_equal(
        arrays["params"]["stack"]["mlp"]["experts"]["up_EDF"][0, 11],
        theirs["model.layers.1.mlp.experts.11.up_proj.weight"].T,
    )


def test_shards_on_eight_devices():
    mesh = MeshConfig(data=1, fsdp=2, expert=2, tensor=2).build()
    arrays, _ = load(GOLDEN / "deepseek_v3", mesh)
    whole, _ = load(GOLDEN / "deepseek_v3")
    experts = arrays["params"]["stack"]["mlp"]["experts"]["down_EFD"]
    assert experts.sharding.spec == P(None, "expert", "tensor", "fsdp")
    jax.tree.map(np.testing.assert_array_equal, arrays, whole)


def test_bfloat16_is_kept_and_router_bias_stays_float32(copied):
    arrays, _ = load(copied("deepseek_v3", to_bfloat16, dtype="bfloat16"))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(arrays["params"])} == {"bfloat16"}
    assert arrays["buffers"]["stack"]["mlp"]["router"]["bias"].dtype == "float32"


def test_tied_head_with_and_without_its_copy(copied):
    def without_head(tensors):
        return {k: v for k, v in tensors.items() if k != "lm_head.weight"}

    first, config = load(copied("llama", without_head, tie_word_embeddings=True))
    second, _ = load(copied("llama", tie_word_embeddings=True))
    assert "head" not in first["params"]
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert "lm_head.weight" not in dict(export_tensors(first, config, llama.TABLE))


def test_copies_of_an_mtp_module_with_a_tied_head(copied):
    copy = "model.layers.2.shared_head.head.weight"

    def tied(tensors):
        tensors = {k: v for k, v in tensors.items() if k != "lm_head.weight"}
        return tensors | {copy: tensors["model.embed_tokens.weight"]}

    directory = copied("deepseek_v3_mtp", tied, tie_word_embeddings=True)
    arrays, config = load(directory)
    exported = dict(export_tensors(arrays, config, deepseek_v3.TABLE))
    assert set(exported) == set(open_tensors(directory))
    np.testing.assert_array_equal(exported[copy], exported["model.embed_tokens.weight"])


def test_mtp_copies_may_be_absent(copied):
    copies = ("model.layers.2.embed_tokens.weight", "model.layers.2.shared_head.head.weight")
    load(copied("deepseek_v3_mtp", lambda tensors: {k: v for k, v in tensors.items() if k not in copies}))


def without(name):
    return lambda tensors: {k: v for k, v in tensors.items() if k != name}


MISFITS = {
    "missing": (
        "deepseek_v3",
        without("model.layers.2.mlp.experts.7.up_proj.weight"),
        {},
        r"1 missing \(model\.layers\.2\.mlp\.experts\.7\.up_proj\.weight\)",
    ),
    "left over": (
        "llama",
        lambda tensors: tensors | {"model.layers.0.self_attn.q_proj.bias": np.zeros(64, np.float32)},
        {},
        r"1 left over \(model\.layers\.0\.self_attn\.q_proj\.bias\)",
    ),
    "MTP that config.json does not mention": (
        "deepseek_v3_mtp",
        None,
        {"num_nextn_predict_layers": 0},
        r"left over \(model\.layers\.2\.",
    ),
    "MTP that is not there": (
        "deepseek_v3",
        None,
        {"num_nextn_predict_layers": 1},
        r"missing \(model\.layers\.3\..*hold no multi-token-prediction module: set num_nextn_predict_layers to 0 in config\.json",
    ),
    "half an MTP module": (
        "deepseek_v3_mtp",
        without("model.layers.2.enorm.weight"),
        {},
        r"1 missing \(model\.layers\.2\.enorm\.weight\)$",
    ),
    "another shape": (
        "llama",
        None,
        {"head_dim": 8},
        r"model\.layers\.0\.self_attn\.q_proj\.weight \[64, 64\] instead of \[32, 64\]",
    ),
    "transposed": (
        "llama",
        lambda t: t | {"model.layers.1.mlp.up_proj.weight": t["model.layers.1.mlp.up_proj.weight"].T.copy()},
        {},
        r"1 of another shape \(model\.layers\.1\.mlp\.up_proj\.weight \[64, 128\] instead of \[128, 64\]\)",
    ),
    "integers": (
        "llama",
        lambda tensors: tensors | {"model.norm.weight": np.ones(64, np.int8)},
        {},
        r"1 of a dtype that cannot be read \(model\.norm\.weight int8\)",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_misfits_are_listed_in_one_error(copied, case):
    variant, change, fields, message = MISFITS[case]
    with pytest.raises(ValueError, match=message) as error:
        load(copied(variant, change, **fields))
    assert "\n" not in str(error.value)


def test_a_model_that_the_family_cannot_name():
    arrays, config = load(GOLDEN / "qwen3_untied")
    with pytest.raises(ValueError, match="no tensor for stack/attention/k_norm/weight, stack/attention/q_norm/weight"):
        list(export_tensors(arrays, config, llama.TABLE))


def test_sharded_files(tmp_path):
    shutil.copy(GOLDEN / "llama" / "config.json", tmp_path)
    tensors = load_file(GOLDEN / "llama" / "model.safetensors")
    names = sorted(tensors)
    parts = {"1.safetensors": names[::2], "2.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path)[0], load(GOLDEN / "llama")[0])


# ---- layouts


def test_layout_by_hand():
    layout = Layout("(NK)D -> DNK")
    assert layout.shape_on_disk((5, 2, 3)) == (6, 5)
    theirs = np.arange(30).reshape(6, 5)
    ours = layout.read(theirs, (5, 2, 3))
    assert ours[4, 1, 2] == theirs[1 * 3 + 2, 4]
    np.testing.assert_array_equal(layout.write(ours), theirs)


@pytest.mark.parametrize("text", ["DF -> DN", "DD -> DD", "D(NK) -> DN"])
def test_layout_that_loses_a_dim(text):
    with pytest.raises(ValueError, match="both sides must name the same dims"):
        Layout(text)
