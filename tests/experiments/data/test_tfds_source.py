"""TFDS directories in both record formats, without TensorFlow and without a network."""

import json
import struct
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments.data.documents import documents
from experiments.data.records import read_array_record
from experiments.data.tfds_source import TfdsConfig
from experiments.errors import UserError

TEXTS = {
    split: [f"{split} {i}: naïve 日本 " * (i % 5 + 1) for i in range(n)] for split, n in (("train", 300), ("test", 20))
}


class TinyTexts(tfds.core.GeneratorBasedBuilder):
    """A few texts."""

    VERSION = tfds.core.Version("1.2.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "number": np.int64})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        del dl_manager
        return {split: self._generate_examples(split) for split in TEXTS}

    def _generate_examples(self, split):
        for number, text in enumerate(TEXTS[split]):
            yield number, {"text": text, "number": number}


@pytest.fixture(scope="module")
def array_record_dir(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("tfds")
    TinyTexts(data_dir=data_dir, file_format="array_record").download_and_prepare()
    return data_dir


@pytest.fixture(scope="module")
def tfrecord_dir(array_record_dir, tmp_path_factory):
    """The same dataset as TFRecord, which TFDS itself cannot write without TensorFlow."""
    data_dir = tmp_path_factory.mktemp("tfds_tfrecord")
    source, target = array_record_dir / "tiny_texts/1.2.0", data_dir / "tiny_texts/1.2.0"
    target.mkdir(parents=True)
    for path in source.iterdir():
        if "array_record" not in path.name:
            (target / path.name).write_text(path.read_text().replace("array_record", "tfrecord"))
            continue
        with open(target / path.name.replace("array_record", "tfrecord"), "wb") as file:
            for record in read_array_record(path):
                file.write(struct.pack("<QI", len(record), 0) + record + struct.pack("<I", 0))
    assert json.loads((target / "dataset_info.json").read_text())["fileFormat"] == "tfrecord"
    return data_dir


@pytest.fixture(params=["array_record_dir", "tfrecord_dir"])
def data_dir(request):
    return str(request.getfixturevalue(request.param))


def texts_of(config, split):
    return [document.text for document in documents(config.build(), split)]


def test_reads_every_document_of_a_split(data_dir):
    config = TfdsConfig(name="tiny_texts", data_dir=data_dir, validation_split="test")
    assert sorted(texts_of(config, "train")) == sorted(TEXTS["train"])
    assert sorted(texts_of(config, "validation")) == sorted(TEXTS["test"])
    assert "tensorflow" not in sys.modules


def test_holds_out_by_hash(data_dir):
    config = TfdsConfig(name="tiny_texts/1.2.0", data_dir=data_dir, validation_fraction=0.2)
    train, held_out = texts_of(config, "train"), texts_of(config, "validation")
    assert sorted(train + held_out) == sorted(TEXTS["train"])
    assert 30 < len(held_out) < 90


def test_slices(data_dir):
    parts = [
        texts_of(TfdsConfig(name="tiny_texts", data_dir=data_dir, split=split, validation_fraction=0), "train")
        for split in ("train[:40%]", "train[40%:]")
    ]
    assert [len(part) for part in parts] == [120, 180]
    assert sorted(parts[0] + parts[1]) == sorted(TEXTS["train"])


def test_what_is_not_prepared_is_refused_with_the_command(tmp_path):
    with pytest.raises(UserError, match=r"lm1b: not prepared .*tfds build lm1b --file_format=array_record --data_dir="):
        TfdsConfig(name="lm1b", data_dir=str(tmp_path)).build()
    (tmp_path / "wikipedia/20230601.en/1.0.0").mkdir(parents=True)
    (tmp_path / "wikipedia/20230601.en/1.0.0/dataset_info.json").write_text("{}")
    with pytest.raises(UserError, match=r"give one of its configs: wikipedia/20230601\.en"):
        TfdsConfig(name="wikipedia", data_dir=str(tmp_path)).build()
    with pytest.raises(UserError, match="not a readable TFDS dataset"):
        TfdsConfig(name="wikipedia/20230601.en", data_dir=str(tmp_path)).build()


def test_unknown_split_and_feature(data_dir):
    with pytest.raises(UserError, match="split='dev': tiny_texts has only the splits"):
        TfdsConfig(name="tiny_texts", data_dir=data_dir, split="dev").build()
    with pytest.raises(UserError, match="text_feature='body': tiny_texts has no such feature"):
        TfdsConfig(name="tiny_texts", data_dir=data_dir, text_feature="body").build()


def test_a_cut_file_is_named(tfrecord_dir, tmp_path):
    import shutil

    shutil.copytree(tfrecord_dir, tmp_path / "copy")
    (path,) = (tmp_path / "copy").glob("*/*/*train*tfrecord*")
    path.write_bytes(path.read_bytes()[:-10])
    config = TfdsConfig(name="tiny_texts", data_dir=str(tmp_path / "copy"))
    with pytest.raises(UserError, match="ends inside record 299"):
        texts_of(config, "train")
    path.unlink()
    with pytest.raises(UserError, match="a file of tiny_texts is missing"):
        config.build()
