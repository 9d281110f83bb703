"""Config overrides, config files, flags, help and JSON, on small configs of the test's own."""

import dataclasses
import json
from typing import Literal

import pytest

from experiments import cli
from experiments.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class GqaConfig:
    num_heads: int = 4  # Query heads.
    num_kv_heads: int = 2

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlaConfig:
    num_heads: int = 4
    # Width of the cached latent,
    # shared by all heads.
    kv_lora_rank: int = 16
    q_lora_rank: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig:
    n_routed_experts: int
    score: Literal["sigmoid", "softmax"] = "sigmoid"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    attention: GqaConfig | MlaConfig = MlaConfig()
    moe: MoeConfig | None = None
    tied: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilesConfig:
    paths: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemberConfig:
    source: "SourceConfig"
    weight: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    members: tuple[MemberConfig, ...] = (MemberConfig(source=FilesConfig()), MemberConfig(source=FilesConfig()))


SourceConfig = FilesConfig | MixtureConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    num_steps: int = 100  # Optimizer steps.
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    ramp: tuple[tuple[int, int], ...] = ()
    name: str = "run"
    trainable: tuple[str, ...] | None = None

    def __post_init__(self):
        if self.num_steps <= 0:
            raise ValueError(f"num_steps must be positive, not {self.num_steps}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TestConfig:
    __test__ = False
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    source: SourceConfig = MixtureConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    workdir: str  # Where the run writes.
    force: bool = False  # Overwrite.


def changed(**overrides):
    return cli.apply_overrides(TestConfig(), {k.replace("__", "."): v for k, v in overrides.items()})


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("train.num_steps", "1e3", 1000),
        ("train.num_steps", "1_000", 1000),
        ("train.learning_rate", "3", 3.0),
        ("train.learning_rate", "3e-4", 3e-4),
        ("train.betas", "(0.8,0.9)", (0.8, 0.9)),
        ("train.betas", "0.8, 0.9", (0.8, 0.9)),
        ("train.ramp", "((0,8),(100,16))", ((0, 8), (100, 16))),
        ("train.ramp", "(0,8),(100,16)", ((0, 8), (100, 16))),
        ("train.ramp", "()", ()),
        ("train.betas", "0.8:0.9", (0.8, 0.9)),
        ("source.members.0.source.paths", "gs://a,b", ("gs://a", "b")),
        ("train.name", "none", "none"),
        ("train.name", "a=b,c", "a=b,c"),
        ("train.trainable", "none", None),
        ("train.trainable", "*/indexer/*", ("*/indexer/*",)),
        ("model.tied", "True", True),
        ("model.attention.q_lora_rank", "12", 12),
        ("model.attention.q_lora_rank", "none", None),
        ("source.members.1.weight", "0.25", 0.25),
        ("source.members.0.source.paths", "a.txt,b.txt", ("a.txt", "b.txt")),
        ("source.members.0.source.paths", "a.txt", ("a.txt",)),
    ],
)
def test_values(path, text, value):
    config = cli.apply_overrides(TestConfig(), {path: text})
    for name in path.split("."):
        config = config[int(name)] if name.isdecimal() else getattr(config, name)
    assert config == value
    assert type(config) is type(value)


@pytest.mark.parametrize(
    ("path", "text", "line"),
    [
        ("trian.num_steps", "1", "--config.trian: TestConfig has no field 'trian' (did you mean train?)"),
        (
            "train.num_step",
            "1",
            "--config.train.num_step: TrainConfig has no field 'num_step' (did you mean num_steps?)",
        ),
        (
            "num_steps",
            "1",
            "--config.num_steps: TestConfig has no field 'num_steps' (did you mean --config.train.num_steps?)",
        ),
        ("train.num_steps", "1.5", "--config.train.num_steps=1.5: expected int"),
        ("train.num_steps", "1e99999999", "--config.train.num_steps=1e99999999: expected int"),
        ("train.num_steps", "nan", "--config.train.num_steps=nan: expected int"),
        ("train.num_steps", "", "--config.train.num_steps=: expected int"),
        ("train.num_steps", "-5", "--config.train: num_steps must be positive, not -5"),
        ("train.num_steps.x", "5", "--config.train.num_steps.x: --config.train.num_steps is 100 and has no fields"),
        ("train.learning_rate", "nan", "--config.train.learning_rate=nan: expected float"),
        ("train.betas", "0.9", "--config.train.betas=0.9: expected tuple[float, float]"),
        ("train.betas", "(0.9,0.9", "--config.train.betas=(0.9,0.9: expected tuple[float, float]"),
        ("train", "5", "--config.train=5: expected TrainConfig"),
        ("model.tied", "yes", "--config.model.tied=yes: expected true or false"),
        (
            "model.attention",
            "GqConfig",
            "--config.model.attention=GqConfig: expected GqaConfig | MlaConfig (did you mean GqaConfig?)",
        ),
        (
            "model.attention.num_kv_heads",
            "2",
            "--config.model.attention.num_kv_heads: MlaConfig has no field 'num_kv_heads'; "
            "GqaConfig has it (switch with --config.model.attention=GqaConfig)",
        ),
        (
            "model.moe.score",
            "softmax",
            "--config.model.moe.score: --config.model.moe is none and has no fields "
            "(switch it on with --config.model.moe=MoeConfig)",
        ),
        (
            "model.moe",
            "MoeConfig",
            "--config.model.moe.n_routed_experts: MoeConfig needs it (int) and it has no default",
        ),
        (
            "source.members.2.weight",
            "1",
            "--config.source.members.2: no such entry; --config.source.members has 2, counted from 0",
        ),
    ],
)
def test_bad_overrides(path, text, line):
    with pytest.raises(UserError) as error:
        cli.apply_overrides(TestConfig(), {path: text})
    assert str(error.value) == line


@pytest.mark.parametrize("order", [1, -1])
def test_union_switch_in_any_order(order):
    items = {"model.attention.num_heads": "9", "model.attention.num_kv_heads": "3", "model.attention": "GqaConfig"}
    config = cli.apply_overrides(TestConfig(), dict(list(items.items())[::order]))
    assert config.model.attention == GqaConfig(num_heads=9, num_kv_heads=3)


def test_tuple_of_configs_by_class_names():
    config = cli.apply_overrides(
        TestConfig(),
        {
            "source.members.1.source": "FilesConfig",
            "source.members.1.source.paths": "a,b",
            "source.members": "(MemberConfig, MemberConfig)",
            "source.members.0.source": "MixtureConfig",
            "source.members.0.weight": "3",
        },
    )
    assert config.source.members == (
        MemberConfig(source=MixtureConfig(), weight=3.0),
        MemberConfig(source=FilesConfig(paths=("a", "b"))),
    )
    for overrides, line in [
        ({"source.members": "MemberConfig"}, "--config.source.members.0.source: MemberConfig needs it"),
        (
            {"source.members": "(MemberConfig"},
            "--config.source.members=(MemberConfig: expected tuple[MemberConfig, ...]",
        ),
        ({"source.members": "Member"}, "--config.source.members.0=Member: expected MemberConfig"),
        ({"source.members": "()", "source.members.0.weight": "3"}, "--config.source.members.0: no such entry"),
    ]:
        with pytest.raises(UserError) as error:
            cli.apply_overrides(TestConfig(), overrides)
        assert str(error.value).startswith(line)


def test_switch_takes_the_defaults_and_checks_literals():
    config = changed(model__moe="MoeConfig", model__moe__n_routed_experts="8")
    assert config.model.moe == MoeConfig(n_routed_experts=8)
    assert cli.apply_overrides(config, {"model.moe": "none"}).model.moe is None
    with pytest.raises(UserError, match=r"expected sigmoid \| softmax \(did you mean softmax\?\)"):
        cli.apply_overrides(config, {"model.moe.score": "sofmax"})
    mla = changed(model__attention__kv_lora_rank="99")
    assert cli.apply_overrides(mla, {"model.attention": "MlaConfig"}).model.attention == MlaConfig()


def test_a_class_that_refuses_its_values_is_named_by_path():
    with pytest.raises(UserError, match=r"^--config.model.attention: num_heads 5 is not a multiple of num_kv_heads 2$"):
        changed(model__attention="GqaConfig", model__attention__num_heads="5")


CONFIG_FILE = """
from tests.experiments.test_cli import *

def get_config(arg=None):
    return TestConfig(train=TrainConfig(num_steps=int(arg or 7)))
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(CONFIG_FILE.replace("tests.experiments.test_cli", __name__))
    return path


def parse(*argv):
    return cli.parse_argv(argv, Flags, TestConfig)


def test_argv(config_file):
    config, flags = parse(
        f"--config={config_file}:9", "--workdir", "w", "--force", "--config.model.tied", "true", "--config.train.name=x"
    )
    assert flags == Flags(workdir="w", force=True)
    assert config == TestConfig(train=TrainConfig(num_steps=9, name="x"), model=ModelConfig(tied=True))
    assert parse(f"--config={config_file}", "--workdir=w")[0].train.num_steps == 7


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ((), "no config: give --config=FILE.py"),
        (("--config=FILE",), "--workdir is required: Where the run writes."),
        (("--config=FILE", "--wrokdir=w"), "unknown flag --wrokdir (did you mean --workdir?)"),
        (("--config=FILE", "workdir=w"), "stray argument 'workdir=w' (did you mean --workdir?)"),
        (("--config=FILE", "--workdir=w", "12"), "stray argument '12'"),
        (
            ("--config=FILE", "--train.num_steps=1"),
            "unknown flag --train.num_steps (did you mean --config.train.num_steps?)",
        ),
        (("--config=FILE", "--workdir"), "--workdir needs a value: --workdir=VALUE"),
        (("--config=FILE", "--workdir=w", "--force=maybe"), "--force=maybe: expected true or false"),
        (("--config=DIR/smal.py",), "--config=DIR/smal.py: no such config file (did you mean DIR/small.py?)"),
        (("--config=DIR/small",), "--config=DIR/small: no such config file (did you mean DIR/small.py?)"),
        (("--config=FILE:x",), "FILE:5: invalid literal for int() with base 10: 'x'"),
    ],
)
def test_bad_argv(config_file, argv, line):
    def fill(text):
        return text.replace("FILE", str(config_file)).replace("DIR", str(config_file.parent))

    with pytest.raises(UserError) as error:
        parse(*(fill(a) for a in argv))
    assert str(error.value).startswith(line if not argv else fill(line))


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ("x = 1", "does not define get_config"),
        ("def get_config(): return 3", "get_config returned int, not TestConfig"),
        ("def get_config(): return TestConfig(train=TrainConfig(num_steps='8'))", ":3: '<=' not supported"),
        (
            "def get_config(): return TestConfig(train=TrainConfig(name=8))",
            "small.py.train.name: expected str, found 8",
        ),
        ("def get_config(): return TestConfig(trian=3)", ":3: TestConfig.__init__() got an unexpected keyword"),
        ("def get_config(: return 3", "small.py: "),
    ],
)
def test_bad_config_files(config_file, body, line):
    config_file.write_text(f"\nfrom {__name__} import *\n{body}\n")
    with pytest.raises(UserError) as error:
        parse(f"--config={config_file}")
    assert line in str(error.value)


def test_get_config_without_an_argument(config_file):
    config_file.write_text(f"from {__name__} import *\ndef get_config(): return TestConfig()\n")
    with pytest.raises(UserError, match="takes no argument"):
        parse(f"--config={config_file}:big")


def test_help_lists_every_field_with_type_value_and_doc(config_file, capsys):
    for argv in (["--help"], [f"--config={config_file}", "--help"]):
        with pytest.raises(SystemExit) as stop:
            parse(*argv)
        assert stop.value.code == 0
        rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
        assert "--workdir str required Where the run writes." in rows
        assert "--config.model.attention.kv_lora_rank int 16 Width of the cached latent, shared by all heads." in rows
        assert "--config.model.attention=GqaConfig has instead:" in rows
        assert "--config.model.attention.num_heads int 4 Query heads." in rows
        assert "--config.model.moe.score sigmoid | softmax sigmoid" in rows
        assert f"--config.train.num_steps int {7 if len(argv) == 2 else 100} Optimizer steps." in rows
        assert "--config.source.members.1.weight float 1" in rows


def test_json_round_trip():
    config = changed(model__attention="GqaConfig", train__ramp="(0,8),(9,16)", source__members__0__weight="0.5")
    data = json.loads(json.dumps(cli.to_json(config)))
    assert data["model"]["attention"]["class"] == "GqaConfig"
    assert cli.from_json(TestConfig, data) == config
    del data["train"]["name"]
    assert cli.from_json(TestConfig, data) == config
    data["train"]["num_stepz"] = 3
    with pytest.raises(
        UserError, match=r"config.train.num_stepz: TrainConfig of this version has no field 'num_stepz'"
    ):
        cli.from_json(TestConfig, data)
    with pytest.raises(UserError, match=r"config.model.attention: expected GqaConfig \| MlaConfig, found Popen"):
        cli.from_json(
            TestConfig, {"class": "TestConfig", "model": {"class": "ModelConfig", "attention": {"class": "Popen"}}}
        )


def test_diff():
    new = changed(model__attention="GqaConfig", train__num_steps="5", source__members__1__weight="2")
    assert cli.diff(TestConfig(), new) == [
        "model.attention: MlaConfig → GqaConfig",
        "train.num_steps: 100 → 5",
        "source.members.1.weight: 1 → 2",
    ]
    assert cli.diff(new, new) == []
    stored = cli.to_json(new)
    stored["train"]["old_field"] = 1
    assert cli.diff(stored, new) == ["train.old_field: 1 → absent"]


def test_format_shows_every_field_once_parents_first():
    assert cli.format_config(changed(source="FilesConfig", model__moe="none")).splitlines() == [
        "config: TestConfig",
        "model: ModelConfig",
        "  moe=none  tied=false",
        "model.attention: MlaConfig",
        "  num_heads=4  kv_lora_rank=16  q_lora_rank=none",
        "train: TrainConfig",
        "  num_steps=100  learning_rate=0.001  betas=(0.9, 0.95)  ramp=()  name=run  trainable=none",
        "source: FilesConfig",
        "  paths=()",
    ]
    wrapped = cli.format_config(TestConfig(), width=40).splitlines()
    assert max(map(len, wrapped)) <= 40
    assert "source.members.1: MemberConfig\n  weight=1\nsource.members.1.source: FilesConfig" in "\n".join(wrapped)


def test_run_main_prints_one_line_and_exits_with_2(capsys):
    def main(argv):
        raise UserError("two\nlines")

    with pytest.raises(SystemExit) as stop:
        cli.run_main(main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: two lines\n"
