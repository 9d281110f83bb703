"""`python -m experiments.chat`: transcripts, commands, Ctrl-C, a context that is full, and a whole process at a terminal."""

import dataclasses
import io
import json
import os
import pathlib
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time

import jax
import pytest
from small_runs import children_hear_ctrl_c

from experiments import chat
from experiments.chat_template import encode_chat
from experiments.checkpoint import CheckpointConfig
from experiments.config import ExperimentConfig
from experiments.config_tree import to_json
from experiments.conversation import DEFAULT_CONTEXT, Conversation, context_of
from experiments.errors import UserError
from experiments.talk import HELP, Talk
from experiments.tokenizer import BOS, EOS, Tokenizer, byte_tokenizer
from mdl.attention.gqa import GqaConfig
from mdl.mlp import MlpConfig
from mdl.mtp import MtpConfig
from mdl.precision import PrecisionConfig
from mdl.pure import PureModel
from mdl.sampling import Sampling
from mdl.transformer import TransformerConfig

ROOT = pathlib.Path(__file__).parents[2]
BYTES = byte_tokenizer()
SHORT = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
CONFIG = ExperimentConfig(
    model=TransformerConfig(
        vocab_size=259,
        hidden_size=16,
        num_hidden_layers=1,
        max_position_embeddings=65536,
        attention=GqaConfig(num_attention_heads=2, num_key_value_heads=1, head_dim=8),
        mlp=MlpConfig(intermediate_size=24),
        moe=None,
        mtp=MtpConfig(),
        initializer_range=0.5,
        precision=PrecisionConfig(compute="float32"),
    )
)


class Script:
    """Stands in for the model: answers in turn, each of which ends as its last word says."""

    def __init__(self, *answers: str):
        self._answers = list(answers)
        self.asked: list[str] = []
        self.room: list[int] = []
        self.temperatures: list[float] = []

    def complete(self, prompts, rows, sampling, *, max_new_tokens, show):
        [prompt], [row] = prompts, rows
        self.asked.append(BYTES.decode(prompt.ids))
        self.room.append(max_new_tokens)
        self.temperatures.append(sampling.temperature)
        text, _, end = self._answers.pop(0).rpartition(" ")
        for byte in text.encode()[:max_new_tokens]:
            show(0, row.push(byte))
        if end == "ctrl-c":
            raise KeyboardInterrupt
        show(0, row.push(BYTES.eos_id) if end == "eos" else row.end())


@pytest.fixture
def talk(monkeypatch, capsys):
    """Lets lines be typed; returns what stands on the screen (input's echo is the terminal's) and the script."""

    def talk(lines: list[str], *answers: str, template: str | None = SHORT, context: int = 100, **flags):
        tokenizer = Tokenizer(BYTES._raw, bos=BOS, eos=EOS, chat_template=template)
        conversation = Conversation(tokenizer, context=context, system=flags.pop("system", None), bos=False)
        script = Script(*answers)
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        flags = {"seed": 0, "max_new_tokens": None} | flags
        Talk(script, conversation, Sampling(temperature=0.7), **flags).until_the_end()
        return capsys.readouterr().out, script

    return talk


# --- transcripts -------------------------------------------------------------------------------------------------------------


def test_a_transcript(talk):
    """Each prompt is the whole conversation; blank lines say nothing; characters come whole."""
    screen, script = talk(
        ["hi", "", "more?", "/clear", "/system Be brief.", "é", "/system", "x", "/exit", "never read"],
        "Hello é! eos",
        "Yes. eos",
        " ok eos",
        "y eos",
    )
    assert screen == (
        "> Hello é!\n> > Yes.\n> (the conversation is forgotten)\n> (the system's message is set)\n>  ok\n"
        "> (there is no system message)\n> y\n> "
    )
    assert script.asked == [
        "u:hi;a:",
        "u:hi;a:Hello é!;u:more?;a:",
        "s:Be brief.;u:é;a:",
        "u:é;a:ok;u:x;a:",
    ]


def test_temperature_and_help(talk):
    screen, script = talk(["a", "/temp 0", "b", "/temp -1", "/temp warm", "/temp", "/help", "/hepl"], "1 eos", "2 eos")
    assert script.temperatures == [0.7, 0]
    assert "(temperature 0)" in screen and HELP in screen
    assert screen.count("a number that is not negative is expected") == 3
    assert "(no command /hepl; there are /clear, /system, /temp, /help, /exit)" in screen
    assert screen.endswith("> \n")  # the end of the input ends the line


def test_ctrl_c_stops_the_answer_only(talk, monkeypatch):
    screen, script = talk(["a", "b"], "half an answer ctrl-c", "whole eos")
    assert "> half an answer\n(stopped)\n> whole\n" in screen
    assert script.asked[1] == "u:a;a:half an answer;u:b;a:"

    lines = iter([KeyboardInterrupt(), EOFError()])

    def typed(_):
        raise next(lines)

    monkeypatch.setattr("builtins.input", typed)
    Talk(script, None, Sampling(), seed=0, max_new_tokens=None).until_the_end()


def test_a_full_context(talk):
    """Old messages go, two at a time; an answer that reaches the end is cut; a message without room is refused."""
    screen, script = talk(["x" * 30, "y" * 30, "z" * 80], f"{'1' * 20} eos", f"{'2' * 80} length", "3 eos", context=100)
    assert script.asked == [f"u:{'x' * 30};a:", f"u:{'y' * 30};a:", f"u:{'z' * 80};a:"]
    assert script.room == [65, 65, 15]
    full = "the context of 100 tokens is full"
    left_out = f"> ({full}: 2 old messages are left out)"
    cut = f"(the answer is cut: {full})"
    assert screen.splitlines() == [f"> {'1' * 20}", left_out, "2" * 65, cut, left_out, "3", "> "]


def test_a_message_without_room_is_refused(talk):
    screen, script = talk(["a", "x" * 100, "b"], "1 eos", "2 eos")
    assert "(the message takes 105 tokens with what stands before it; the context has 100)" in screen
    assert script.asked == ["u:a;a:", "u:a;a:1;u:b;a:"]


def test_a_limit_of_tokens(talk):
    screen, script = talk(["a"], "1234 length", max_new_tokens=2)
    assert "> 12\n(the answer is cut: --max_new_tokens=2)\n" in screen and script.room == [2]


def test_a_message_that_the_template_refuses(talk):
    template = "{% if messages[-1].content == 'bad' %}{{ raise_exception('no such thing') }}{% endif %}" + SHORT
    screen, script = talk(["bad", "good"], "1 eos", template=template)
    assert "(chat template: no such thing)" in screen and script.asked == ["u:good;a:"]


def test_without_a_template_the_next_turn_is_not_the_models(talk):
    screen, script = talk(["hi", "again"], "Hello.\n\nUser: me eos", "Yes eos", template=None)
    assert screen.startswith("> Hello.\n> Yes\n")
    assert script.asked[1] == "User: hi\n\nAssistant: Hello.User: again\n\nAssistant:"


def test_bos_stands_once():
    for template in (SHORT, "{{ bos_token }}" + SHORT, None):
        tokenizer = Tokenizer(BYTES._raw, bos=BOS, eos=EOS, chat_template=template)
        ids = Conversation(tokenizer, context=100, system=None, bos=True).asked("hi").ids
        assert ids[0] == BYTES.bos_id and ids.count(BYTES.bos_id) == 1
        assert ids == encode_chat(tokenizer, [{"role": "user", "content": "hi"}], bos=True)


def test_the_context():
    assert context_of(CONFIG.model, None) == DEFAULT_CONTEXT and context_of(CONFIG.model, 65536) == 65536
    assert context_of(dataclasses.replace(CONFIG.model, max_position_embeddings=100), None) == 100
    with pytest.raises(ValueError, match="--context=65537: max_position_embeddings of the model is 65536"):
        context_of(CONFIG.model, 65537)


# --- the command -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """An untrained run."""
    folder = tmp_path_factory.mktemp("run")
    BYTES.save(folder / "tokenizer")
    (folder / "config.json").write_text(json.dumps(to_json(CONFIG)))
    with CheckpointConfig(every=1).build(folder / "checkpoints") as checkpointer:
        state = jax.jit(PureModel(CONFIG.model).init)(jax.random.key(0))
        checkpointer.save(1, state, data_state={}, config_json=to_json(CONFIG), extra={})
    return folder


BAD = {
    "no checkpoint": ({"checkpoint": "/none"}, "--checkpoint=/none: no such directory"),
    "no tokenizer": ({"checkpoint": ROOT / "tests" / "golden" / "llama"}, "holds no tokenizer.json"),
    "no modules": (
        {"checkpoint": ROOT / "tests" / "golden" / "llama", "draft": "mtp"},
        "--draft=mtp: .* no MTP modules",
    ),
    "another draft": ({"draft": "ngram"}, "--draft=ngram"),
    "context": ({"context": 70000}, "--context=70000: max_position_embeddings of the model is 65536"),
    "no room": ({"context": 5}, "the message takes .* tokens .*; the context has 5"),
    "temperature": ({"temperature": -1}, "temperature=-1.0 must not be negative"),
    "tokens": ({"max_new_tokens": 0}, "--max_new_tokens=0: must be at least 1"),
    "seed": ({"seed": -1}, "--seed=-1: must be between 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_flags(workdir, case, monkeypatch):
    monkeypatch.setattr("experiments.loading.ModelSource.load", lambda *_: pytest.fail("weights were read"))
    flags, message = BAD[case]
    with pytest.raises(UserError, match=message) as error:
        chat.main([f"--{name}={value}" for name, value in ({"checkpoint": workdir} | flags).items()])
    assert "\n" not in str(error.value)


def test_a_broken_template_is_refused_before_the_weights_are_read(workdir, tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.loading.ModelSource.load", lambda *_: pytest.fail("weights were read"))
    checkpoint = shutil.copytree(workdir, tmp_path / "run")
    (checkpoint / "tokenizer" / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(UserError, match="chat template: line 1"):
        chat.main([f"--checkpoint={checkpoint}"])


class Terminal:
    """The command at a pseudo-terminal."""

    def __init__(self, *flags: str):
        self._master, slave = pty.openpty()
        command = [sys.executable, "-m", "experiments.chat", *flags]
        with children_hear_ctrl_c():
            self._process = subprocess.Popen(command, cwd=ROOT, stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        self._unread = ""

    def expect(self, pattern: str, seconds: float = 120) -> None:
        """Waits until this stands behind what was expected before."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self._unread)):
            left = end - time.monotonic()
            assert left > 0 and select.select([self._master], [], [], left)[0], f"no {pattern!r} in {self._unread!r}"
            self._unread += os.read(self._master, 4096).decode(errors="replace")
        self._unread = self._unread[found.end() :]

    def interrupt(self) -> None:
        """What a terminal does at Ctrl-C."""
        self._process.send_signal(signal.SIGINT)

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def wait(self) -> int:
        return self._process.wait(60)

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        os.close(self._master)


def test_at_a_terminal(workdir):
    """Streams, is interrupted, goes on, and leaves with its speed."""
    terminal = Terminal(f"--checkpoint={workdir}", "--temperature=1", "--context=60000", "--draft=mtp")
    try:
        terminal.expect("> ")
        terminal.type("hi\n")
        terminal.expect(r"hi\r\n(?s:.{50})")
        terminal.interrupt()
        terminal.expect(r"\(stopped\)\r\n> ")
        terminal.type("/temp 0\n")
        terminal.expect(r"\(temperature 0\)\r\n> ")
        terminal.type("\x04")
        terminal.expect("tokens/s; of the drafts")
        assert terminal.wait() == 0
    finally:
        terminal.kill()
