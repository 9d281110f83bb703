"""Corpora: what they yield, how they split, and the one line that each fault gets."""

import logging
import pickle
import subprocess
import sys

import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from experiments.data import documents as documents_module
from experiments.data.documents import documents
from experiments.data.files import JsonlConfig, TextFilesConfig
from experiments.data.records import ArrayRecordConfig, ParquetConfig
from experiments.data.sources import MixtureConfig
from experiments.data.stdlib import StdlibConfig
from experiments.errors import UserError


def texts_of(config, split):
    return [document.text for document in documents(config.build(), split)]


def write_jsonl(path, texts):
    import json

    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def write_parquet(path, texts, column="text"):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({column: texts, "other": list(range(len(texts)))}), path)
    return str(path)


def write_array_record(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:7")
    for record in records:
        writer.write(record)
    writer.close()
    return str(path)


def config_of(kind, tmp_path, texts, **settings):
    """The same documents in a file of each format."""
    if kind == "jsonl":
        return JsonlConfig(paths=(write_jsonl(tmp_path / "a.jsonl", texts),), **settings)
    if kind == "parquet":
        return ParquetConfig(paths=(write_parquet(tmp_path / "a.parquet", texts),), **settings)
    if kind == "array_record":
        records = [text.encode() for text in texts]
        return ArrayRecordConfig(paths=(write_array_record(tmp_path / "a.array_record", records),), **settings)
    (tmp_path / "a.txt").write_bytes("\f".join(texts).encode())
    return TextFilesConfig(paths=(str(tmp_path / "a.txt"),), separator="\f", **settings)


FORMATS = ["text", "jsonl", "parquet", "array_record"]


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_give_the_same_documents_split_by_their_text(kind, tmp_path, texts):
    texts = texts * 4  # more than a batch of records; copies must stay on one side
    config = config_of(kind, tmp_path, texts, validation_fraction=0.2)
    train, held_out = texts_of(config, "train"), texts_of(config, "validation")
    strip = [text.removesuffix("\f") for text in train + held_out]
    assert sorted(strip) == sorted(texts)
    assert not set(train) & set(held_out)
    assert 0.08 < len(held_out) / len(texts) < 0.35
    assert texts_of(config, "train") == train
    source = pickle.loads(pickle.dumps(config.build()))
    assert [document.text for document in documents(source, "train")] == train


@pytest.mark.parametrize("kind", FORMATS)
def test_identity_follows_the_file_and_the_settings(kind, tmp_path, texts):
    config = config_of(kind, tmp_path, texts)
    before = config.build().identity
    assert config.build().identity == before
    assert config_of(kind, tmp_path, texts, validation_fraction=0.5).build().identity != before
    assert config_of(kind, tmp_path, [*texts, "one more"]).build().identity != before


@pytest.mark.parametrize("kind", FORMATS)
def test_validation_fraction_zero_holds_out_nothing(kind, tmp_path, texts):
    config = config_of(kind, tmp_path, texts, validation_fraction=0)
    assert len(texts_of(config, "train")) == len(texts)
    assert config.build().shards("validation") == []


def test_text_files_are_one_document_each_with_their_bytes_untouched(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_bytes("é".encode())
    config = TextFilesConfig(paths=(str(tmp_path / "**/*.txt"), str(tmp_path / "a.txt")), validation_fraction=0)
    assert texts_of(config, "train") == ["one\r\ntwo\r", "é"]


def test_separator_keeps_every_character(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\nthree")
    config = TextFilesConfig(paths=(str(tmp_path / "a.txt"),), separator="\n\n", validation_fraction=0)
    assert texts_of(config, "train") == ["one\n\n", "two\n\n", "three"]


def test_validation_paths_hold_out_whole_files(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    paths, held_out = (str(tmp_path / "*.txt"),), (str(tmp_path / "b.txt"),)
    config = TextFilesConfig(paths=paths, validation_paths=held_out)
    assert texts_of(config, "train") == ["a", "c"]
    assert texts_of(config, "validation") == ["b"]
    with pytest.raises(UserError, match="hold out every file"):
        TextFilesConfig(paths=paths, validation_paths=paths).build()


@pytest.mark.parametrize("config", [TextFilesConfig, JsonlConfig, ParquetConfig, ArrayRecordConfig])
def test_missing_files_and_senseless_settings(config, tmp_path):
    with pytest.raises(UserError, match=r"data\.source\.paths='.*nothing.*': no such file"):
        config(paths=(str(tmp_path / "nothing*"),)).build()
    with pytest.raises(UserError, match="give a tuple"):
        config(paths=()).build()
    with pytest.raises(UserError, match="validation_fraction=1"):
        config(paths=("x",), validation_fraction=1)


def test_a_file_that_is_not_utf8_stops_unless_skipping_is_asked_for(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "b.txt").write_bytes(b"bad \xff")
    paths = (str(tmp_path / "*.txt"),)
    with pytest.raises(UserError, match=r"b\.txt: byte 4 is not UTF-8; .*skip_bad_files=True"):
        texts_of(TextFilesConfig(paths=paths, validation_fraction=0), "train")
    documents_module.warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        config = TextFilesConfig(paths=paths, validation_fraction=0, skip_bad_files=True)
        assert texts_of(config, "train") == texts_of(config, "train") == ["good"]
    assert [r.getMessage() for r in caplog.records] == [f"{tmp_path}/b.txt: byte 4 is not UTF-8; left out"]


def test_a_file_that_vanished_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("good")
    source = TextFilesConfig(paths=(str(tmp_path / "a.txt"),)).build()
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UserError, match=r"a\.txt: No such file"):
        list(documents(source, "train"))


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"text": "cut', "Unterminated string"),
        (b'{"body": "x"}', r"no field 'text' \(data\.source\.text_field\)"),
        (b'["text"]', "no field 'text'"),
        (b'{"text": 3}', "field 'text' holds int, not text"),
        (b'{"text": "\xff"}', "codec can't decode byte 0xff"),
        (b'{"text": "\\ud800"}', "surrogates not allowed"),
    ],
)
def test_a_corrupt_jsonl_line_is_named_by_file_and_number(line, complaint, tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "first"}\n\n' + line + b'\n{"text": "last"}\n' + line)
    config = JsonlConfig(paths=(str(path),), validation_fraction=0)
    with pytest.raises(UserError, match=rf"a\.jsonl:3: .*{complaint}") as error:
        texts_of(config, "train")
    assert "\n" not in str(error.value)
    documents_module.warn_once.cache_clear()
    skipping = JsonlConfig(paths=(str(path),), validation_fraction=0, skip_bad_lines=True)
    assert texts_of(skipping, "train") == texts_of(skipping, "train") == ["first", "last"]
    assert [r.getMessage() for r in caplog.records] == [f"{path}: corrupt lines are left out, the first is line 3"]


def test_bad_parquet(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["x", None], column="body")
    with pytest.raises(UserError, match=r"no column 'text'; set data\.source\.column to one of body, other"):
        texts_of(ParquetConfig(paths=(path,)), "train")
    with pytest.raises(UserError, match="row 1 of column 'body' holds NoneType"):
        texts_of(ParquetConfig(paths=(path,), column="body"), "train")
    with pytest.raises(UserError, match="row 0 of column 'other' holds int"):
        texts_of(ParquetConfig(paths=(path,), column="other"), "train")
    (tmp_path / "a.parquet").write_text("not parquet")
    with pytest.raises(UserError, match=r"a\.parquet: not a readable Parquet file"):
        texts_of(ParquetConfig(paths=(path,)), "train")


def test_bad_array_record(tmp_path):
    path = write_array_record(tmp_path / "a.array_record", [b"fine", b"\xff"])
    with pytest.raises(UserError, match="record 1 is not UTF-8"):
        texts_of(ArrayRecordConfig(paths=(path,), validation_fraction=0), "train")
    (tmp_path / "a.array_record").write_text("not an array record")
    with pytest.raises(UserError, match=r"a\.array_record: not a readable ArrayRecord"):
        texts_of(ArrayRecordConfig(paths=(path,)), "train")
    write_array_record(tmp_path / "a.array_record", [b"%d" % number * 20 for number in range(5000)])
    content = bytearray((tmp_path / "a.array_record").read_bytes())
    content[4000:4100] = b"\xff" * 100
    (tmp_path / "a.array_record").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.array_record: not a readable ArrayRecord file \(Corrupted"):
        texts_of(ArrayRecordConfig(paths=(path,)), "train")


def test_standard_library():
    source = StdlibConfig().build()
    train, held_out = list(documents(source, "train")), list(documents(source, "validation"))
    names = {document.name for document in train + held_out}
    assert len(names) == len(train) + len(held_out) > 300
    assert {"ast.py", "asyncio/events.py", "pydoc_data/topics.py/assert"} <= names
    assert not any(name.startswith(("test/", "idlelib/", "site-packages/", "encodings/")) for name in names)
    assert all(name.split("/")[0] != "unittest" or "/test" not in name for name in names)
    sizes = [sum(len(document.text.encode()) for document in split) for split in (train, held_out)]
    assert sum(sizes) > 5e6
    assert 0.02 < sizes[1] / sum(sizes) < 0.12
    assert source.identity == pickle.loads(pickle.dumps(source)).identity


def test_mixture_wants_one_positive_weight_for_each_member():
    members = (StdlibConfig(), StdlibConfig())
    for weights in ((1.0,), (1.0, 0.0), (1.0, float("inf")), (1.0, -1.0)):
        with pytest.raises(UserError, match="weights"):
            MixtureConfig(members=members, weights=weights)


def test_configs_import_nothing_heavy():
    heavy = "{'grain', 'tensorflow_datasets', 'pyarrow', 'tokenizers', 'array_record', 'jax', 'absl'}"
    code = f"import sys, experiments.data.pipeline, experiments.tokenizer; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
