"""`python -m experiments.generate` on runs and Hugging Face directories, the text of a row as it arrives, the sample of a run."""

import dataclasses
import json
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import generate
from experiments.checkpoint import CheckpointConfig
from experiments.config import EvalConfig, ExperimentConfig, TrainConfig
from experiments.config_tree import to_json
from experiments.continuation import Continuation
from experiments.errors import UserError
from experiments.eval.sample import print_sample
from experiments.loading import find_model
from experiments.tokenizer import BOS, EOS, Tokenizer, byte_tokenizer
from mdl.attention.gqa import GqaConfig
from mdl.mlp import MlpConfig
from mdl.mtp import MtpConfig
from mdl.precision import PrecisionConfig
from mdl.pure import PureModel
from mdl.sharding import MeshConfig
from mdl.transformer import TransformerConfig

ROOT = pathlib.Path(__file__).parents[2]
LLAMA = ROOT / "tests" / "golden" / "llama"
BYTES = byte_tokenizer()
WITH_BOS = Tokenizer(BYTES._raw, bos=BOS, eos=EOS, add_bos=True)
CONFIG = ExperimentConfig(
    model=TransformerConfig(
        vocab_size=259,
        hidden_size=16,
        num_hidden_layers=1,
        max_position_embeddings=64,
        attention=GqaConfig(num_attention_heads=2, num_key_value_heads=1, head_dim=8),
        mlp=MlpConfig(intermediate_size=24),
        moe=None,
        initializer_range=0.5,
        precision=PrecisionConfig(compute="float32"),
    ),
    train=TrainConfig(ema_decay=0.9),
    eval=EvalConfig(sample_prompt="def ", sample_tokens=6),
)


def save_run(folder: pathlib.Path, config: ExperimentConfig) -> pathlib.Path:
    """A run with averaged parameters, which are those of another seed."""
    BYTES.save(folder / "tokenizer")
    (folder / "config.json").write_text(json.dumps(to_json(config)))
    init = jax.jit(PureModel(config.model).init)
    with CheckpointConfig(every=1).build(folder / "checkpoints") as checkpointer:
        for step in (1, 2):
            state = init(jax.random.key(step)) | {"ema": init(jax.random.key(step - 1))["params"]}
            checkpointer.save(step, state, data_state={}, config_json=to_json(config), extra={})
    return folder


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("run"), CONFIG)


@pytest.fixture(scope="module")
def drafting(tmp_path_factory):
    """A run with an MTP module."""
    model = dataclasses.replace(CONFIG.model, mtp=MtpConfig())
    return save_run(tmp_path_factory.mktemp("drafting"), dataclasses.replace(CONFIG, model=model))


@pytest.fixture
def run(capsys, workdir):
    """Runs the command in this process; returns what it prints."""

    def run(checkpoint=workdir, **flags):
        flags = {"max_new_tokens": 6} | flags
        assert (
            generate.main([f"--checkpoint={checkpoint}", *(f"--{name}={value}" for name, value in flags.items())]) == 0
        )
        return capsys.readouterr().out

    return run


# --- the command -------------------------------------------------------------------------------------------------------------


def test_a_prompt_gives_the_same_text_alone_and_in_a_batch(run, tmp_path):
    sampling = {"temperature": 0.8, "top_k": 100, "top_p": 0.95}
    alone = run(prompt="def f", seed=7, **sampling)
    assert alone.startswith("def f") and alone.endswith("\n") and len(alone) > 6
    assert run(prompt="def f", seed=7, **sampling) == alone
    assert run(prompt="def f", seed=8, **sampling) != alone

    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    entries = [{"prompt": "a longer one, also continued"}, {"prompt": "def f", "seed": 7}, {"prompt": "\u2028é"}]
    prompts.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n\n" for entry in entries), encoding="utf-8")
    assert run(prompts=prompts, out=out, seed=1, **sampling) == ""
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").split("\n") if line]
    assert [row["prompt"] for row in rows] == [entry["prompt"] for entry in entries]
    assert rows[1]["prompt"] + rows[1]["text"] + "\n" == alone
    assert all(len(row["ids"]) == 6 and row["finish"] == "length" for row in rows)
    assert [row["text"] for row in rows] == [BYTES.decode(row["ids"]) for row in rows]


def test_a_text_file_is_one_prompt_a_line(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("one\n\ntwo and more\n")
    printed = run(prompts=tmp_path / "prompts.txt")
    assert "1 of 2 (length)\none" in printed
    assert "2 of 2 (length)\ntwo and more" in printed
    assert run(prompt="two and more") in printed


def test_a_prompt_can_be_a_message(run, workdir, tmp_path):
    plain = run(prompt="User: hi\n\nAssistant:")
    assert run(prompt="hi", chat=True) == "hi\n" + plain.removeprefix("User: hi\n\nAssistant:")
    checkpoint = shutil.copytree(workdir, tmp_path / "run")
    (checkpoint / "tokenizer" / "chat_template.jinja").write_text("<{{ messages[0].content }}>")
    assert run(checkpoint, prompt="hi", chat=True) == "hi\n" + run(prompt="<hi>").removeprefix("<hi>")


def test_averaged_parameters(run, workdir):
    averaged, earlier = run(prompt="x = ", ema=True), run(workdir / "checkpoints" / "step_1", prompt="x = ")
    assert averaged == earlier != run(prompt="x = ")


def test_more_prompts_than_rows(workdir, tmp_path, monkeypatch, capsys):
    """The same texts in the same order however many are continued at once; each that ends makes room."""
    monkeypatch.setattr(generate, "REPORT_SECONDS", 0.0)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join("abcdefghijklm"[:length] for length in (3, 9, 1, 12, 5)))
    texts = []
    for batch_size in (1, 2, 8):
        out = tmp_path / f"{batch_size}.jsonl"
        flags = {"prompts": prompts, "out": out, "seed": 3, "temperature": 1, "stop": r"\n", "max_new_tokens": 9}
        argv = [
            f"--{name}={value}" for name, value in ({"checkpoint": workdir, "batch_size": batch_size} | flags).items()
        ]
        assert generate.main(argv) == 0
        texts.append(out.read_text(encoding="utf-8"))
    assert texts[0] == texts[1] == texts[2] and texts[0].count("\n") == 5
    assert re.search(r"^\d of 5 prompts, \d+ tokens, \d+ tokens/s$", capsys.readouterr().err, re.MULTILINE)


def test_drafts_give_the_same_text(drafting, capsys):
    argv = [f"--checkpoint={drafting}", "--prompt=def f", "--max_new_tokens=12", "--temperature=0.8", "--seed=5"]
    assert generate.main(argv) == 0
    plain = capsys.readouterr()
    assert generate.main([*argv, "--draft=mtp"]) == 0
    drafted = capsys.readouterr()
    assert drafted.out == plain.out and "drafts" not in plain.err
    assert re.search(r"tokens/s; of the drafts \d+ % were right, 1\.\d\d tokens a step$", drafted.err, re.MULTILINE)


def test_tokens_of_a_directory_without_tokenizer(run):
    with np.load(LLAMA / "golden.npz") as golden:
        prompt, tokens = golden["input_ids"][0], golden["gen.tokens"][0]
    printed = run(LLAMA, prompt_ids=",".join(map(str, prompt)), max_new_tokens=16)
    assert [int(token) for token in printed.split()] == tokens.tolist()


def test_fp8_weights_continue_as_what_they_stand_for(run):
    fp8 = LLAMA.with_name("deepseek_v3_fp8")
    with np.load(fp8 / "golden.npz") as golden:
        prompt = ",".join(map(str, golden["input_ids"][1]))
    printed = run(fp8, prompt_ids=prompt)
    assert printed == run(fp8 / "dequantized_bf16", prompt_ids=prompt) and len(printed.split()) == 6


def test_bos_is_put_where_training_put_it(run, workdir, tmp_path):
    def ids(checkpoint, tokenizer=BYTES, **flags):
        flags = generate.GenerateFlags(checkpoint=str(checkpoint), prompt="a", **flags)
        return generate._encode(flags, [("a", 0)], find_model(checkpoint), tokenizer)[0].ids

    assert ids(workdir) == [*b"a"]
    assert ids(workdir, bos=True) == [BYTES.bos_id, *b"a"]
    directory = shutil.copytree(LLAMA, tmp_path / "llama")
    assert ids(directory, bos=True) == ids(directory, tokenizer=WITH_BOS) == [BYTES.bos_id, *b"a"]
    assert ids(directory) == ids(directory, tokenizer=WITH_BOS, bos=False) == [*b"a"]
    chat = ids(directory, tokenizer=WITH_BOS, chat=True)
    assert chat == [BYTES.bos_id, *b"User: a\n\nAssistant:"]


def test_the_process_streams_and_reports_its_speed(workdir):
    command = [
        sys.executable,
        "-m",
        "experiments.generate",
        f"--checkpoint={workdir}",
        "--prompt=é: ",
        "--max_new_tokens=9",
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0 and result.stdout.startswith("é: ")
    assert re.search(r"^9 tokens; the first after \d+\.\d s, then \d+\.\d tokens/s$", result.stderr, re.MULTILINE)


# --- the text of a row -------------------------------------------------------------------------------------------------------


def pieces(row: Continuation, text: bytes) -> list[str]:
    """What each byte, and then the end, brings to light."""
    return [row.push(byte) for byte in text] + [row.end()]


def test_a_character_waits_for_its_last_byte():
    row = Continuation(BYTES)
    assert pieces(row, "aé€🎉".encode()) == ["a", "", "é", "", "", "€", "", "", "", "🎉", ""]
    assert (row.text, row.finish) == ("aé€🎉", "length")
    cut = Continuation(BYTES)
    assert "".join(pieces(cut, "é".encode()[:1])) == cut.text == "\ufffd"


def test_eos_ends_a_row():
    row = Continuation(BYTES, eos_id=BYTES.eos_id)
    shown = [row.push(token) for token in (*b"ab", BYTES.eos_id, *b"c")]
    assert (shown, row.text, row.finish) == (["a", "b", "", ""], "ab", "eos")
    assert row.ids == [*b"ab", BYTES.eos_id]
    ignored = Continuation(BYTES)
    assert "".join(ignored.push(token) for token in (*b"a", BYTES.eos_id, *b"c")) == "ac"


@pytest.mark.parametrize("stop", [("\n\n",), ("zz", "\n\n", "\n\ny"), ("\n\n", "\n\n\n")])
def test_a_stop_string_is_never_shown(stop):
    row = Continuation(BYTES, stop=stop)
    assert pieces(row, b"a\nb\n\nc") == ["a", "", "\nb", "", "", "", ""]
    assert (row.text, row.finish, row.ids) == ("a\nb", "stop", [*b"a\nb\n\n"])


def test_what_was_held_back_is_shown_at_the_end():
    row = Continuation(BYTES, eos_id=BYTES.eos_id, stop=("STOP",))
    assert pieces(row, b"SSTO") == ["", "S", "", "", "STO"]
    assert (row.text, row.finish) == ("SSTO", "length")
    row = Continuation(BYTES, eos_id=BYTES.eos_id, stop=("STOP",))
    assert [row.push(token) for token in (*b"xST", BYTES.eos_id)] == ["x", "", "", "ST"]
    assert (row.text, row.finish) == ("xST", "eos")


def test_a_stop_string_of_several_bytes_a_character():
    row = Continuation(BYTES, stop=("é!",))
    assert "".join(pieces(row, "aéé!b".encode())) == row.text == "aé"


def test_a_row_without_tokenizer_has_ids_only():
    row = Continuation(None)
    assert pieces(row, b"ab") == ["", "", ""]
    assert (row.ids, row.text, row.finish) == ([*b"ab"], "", "length")


@pytest.mark.parametrize(
    ("text", "stops"),
    [
        (None, []),
        ("\\n\\n", ["\n\n"]),
        ("\n\n", ["\n\n"]),
        ("a,b", ["a,b"]),
        ('["\\n", "def "]', ["\n", "def "]),
        ("\\\\n", ["\\n"]),
    ],
)
def test_how_stop_strings_are_written(text, stops):
    assert generate._stops(text) == stops


# --- the sample of a run -----------------------------------------------------------------------------------------------------


def sample_of(config: ExperimentConfig, mesh: MeshConfig) -> list[str]:
    lines: list[str] = []
    model = PureModel(config.model)
    with jax.set_mesh(mesh.build()):
        state = {"step": 5, "opt": (), **jax.jit(model.init)(jax.random.key(0))}
        print_sample(config, model, state, BYTES, lines.append)
    return lines


def test_a_run_ends_with_a_sample():
    header, text, footer = sample_of(CONFIG, MeshConfig(data=8))
    assert header == "--- sample: 6 tokens, temperature 0.8, seed 0" and footer == "---"
    assert text.startswith("def ") and len(text) > 4
    assert sample_of(CONFIG, MeshConfig(data=2, fsdp=4)) == [header, text, footer]
    assert sample_of(dataclasses.replace(CONFIG, seed=1), MeshConfig(data=8))[1] != text


@pytest.mark.parametrize(("prompt", "said"), [(None, 0), ("", 1), ("x" * 64, 1)])
def test_a_run_whose_prompt_cannot_be_continued_ends_well(prompt, said):
    config = dataclasses.replace(CONFIG, eval=EvalConfig(sample_prompt=prompt))
    lines = sample_of(config, MeshConfig(data=8))
    assert len(lines) == said and all(line.startswith("no sample") for line in lines)


def test_a_sample_longer_than_the_model_allows_is_cut():
    config = dataclasses.replace(CONFIG, eval=EvalConfig(sample_prompt="x" * 60, sample_tokens=100))
    header, text, _ = sample_of(config, MeshConfig(data=8))
    assert re.match("--- sample: [1-4] tokens", header) and text.startswith("x" * 60)


# --- bad input, refused before weights are read ------------------------------------------------------------------------------

BAD_FLAGS = {
    "no prompt": ({}, "give one of --prompt="),
    "two prompts": ({"prompt": "a", "prompt_ids": "1,2"}, "give one of --prompt="),
    "no tokens": ({"prompt": "a", "max_new_tokens": 0}, "--max_new_tokens=0: must be at least 1"),
    "negative seed": ({"prompt": "a", "seed": -1}, "--seed=-1: must be between 0 and 4294967295"),
    "negative temperature": ({"prompt": "a", "temperature": -1}, "temperature=-1.0 must not be negative"),
    "no candidates": ({"prompt": "a", "top_k": 0}, "top_k=0 must be at least 1"),
    "no probability": ({"prompt": "a", "top_p": 0}, "top_p=0.0 must be above 0"),
    "empty prompt": ({"prompt": ""}, "an empty prompt cannot be continued without BOS"),
    "too long": ({"prompt": "abc", "max_new_tokens": 62}, "need 65 positions; max_position_embeddings is 64"),
    "unknown token": (
        {"prompt_ids": "1,259", "max_new_tokens": 1},
        "token id 259 is not between 0 and vocab_size - 1 = 258",
    ),
    "empty stop": ({"prompt": "a", "stop": ""}, "texts of at least one character"),
    "broken stop": ({"prompt": "a", "stop": '["a"'}, "not a JSON list"),
    "no place": (
        {"prompt": "a", "out": "/none/out.jsonl"},
        "--out=/none/out.jsonl: the directory /none does not exist",
    ),
    "no prompts": ({"prompts": "/none.txt"}, "--prompts=/none.txt: cannot be read"),
    "misspelt": ({"promt": "a"}, r"unknown flag --promt \(did you mean --prompt\?\)"),
    "chat of ids": ({"prompt_ids": "1", "chat": "true"}, "--chat puts text through the chat template"),
    "no checkpoint": ({"checkpoint": "/none", "prompt": "a"}, "--checkpoint=/none: no such directory"),
    "no tokenizer": ({"checkpoint": LLAMA, "prompt": "a"}, "holds no tokenizer.json; give --prompt_ids"),
    "no averages": ({"checkpoint": LLAMA, "prompt_ids": "1", "ema": "true"}, "holds no averaged parameters"),
    "no rows": ({"prompt": "a", "batch_size": 0}, "--batch_size=0: must be at least 1"),
    "no modules": ({"prompt": "a", "draft": "mtp"}, "--draft=mtp: .*: the model has no MTP modules"),
    "stop without text": ({"checkpoint": LLAMA, "prompt_ids": "1", "stop": "a"}, "has no tokenizer.json"),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags(workdir, case, monkeypatch):
    monkeypatch.setattr("experiments.loading.ModelSource.load", lambda *_: pytest.fail("weights were read"))
    flags, message = BAD_FLAGS[case]
    with pytest.raises(UserError, match=message) as error:
        generate.main([f"--{name}={value}" for name, value in ({"checkpoint": workdir} | flags).items()])
    assert "\n" not in str(error.value)


BAD_FILES = {
    "empty.txt": (b"\n \n", "holds no prompt"),
    "latin.txt": (b"ok\ncaf\xe9", "not UTF-8 .* at byte 6"),
    "json.jsonl": (b'{"prompt": "a"}\n{"prompt": ', "line 2: not valid JSON"),
    "list.jsonl": (b'["a"]', 'line 1: an object with the text "prompt"'),
    "number.jsonl": (b'\n{"prompt": 1}', 'line 2: an object with the text "prompt"'),
    "seed.jsonl": (b'{"prompt": "a", "seed": 1.5}', "line 1: seed=1.5 is not an integer"),
    "huge.jsonl": (b'{"prompt": "a", "seed": 4294967296}', "line 1: seed=4294967296: must be between"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_prompt_files(workdir, tmp_path, name):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        generate.main([f"--checkpoint={workdir}", f"--prompts={tmp_path / name}"])
    assert "\n" not in str(error.value)
