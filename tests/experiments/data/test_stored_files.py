"""Corpora in object stores: the same documents as from a disk, and one line for each fault. The store is fsspec's, in memory."""

import dataclasses

import fsspec
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from experiments.data.documents import documents
from experiments.data.files import JsonlConfig, TextFilesConfig
from experiments.data.records import ArrayRecordConfig, ParquetConfig
from experiments.errors import UserError


class Store(MemoryFileSystem):
    """s3://, as s3fs has it, but in memory."""

    protocol = "s3"
    store = {}
    pseudo_dirs = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("s3://"))

    def checksum(self, path):  # s3fs takes the ETag, which follows the content
        return hash(self.cat_file(path))


@pytest.fixture
def bucket():
    fsspec.register_implementation("s3", Store, clobber=True)
    Store.store.clear()
    Store.pseudo_dirs[:] = [""]
    return epath.Path("s3://bucket/corpus")


@pytest.fixture
def texts():
    return [f"document {number}\r\nof \N{SNOWMAN} several lines\n" * (number % 3 + 1) for number in range(40)]


def write(folder, kind, texts):
    """The same documents below a folder of the disk or of the store, and the config that reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "jsonl":
        import json

        (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return JsonlConfig(paths=(f"{folder}/*.jsonl",))
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        with (folder / "a.parquet").open("wb") as file:
            pyarrow.parquet.write_table(pyarrow.table({"text": texts}), file)
        return ParquetConfig(paths=(f"{folder}/*.parquet",))
    for number, text in enumerate(texts):
        (folder / f"{number:02}.txt").write_bytes(text.encode())
    return TextFilesConfig(paths=(f"{folder}/**/*.txt", f"{folder}/00.txt"))


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
def test_the_same_documents_as_from_a_disk(kind, bucket, texts, tmp_path):
    (bucket / "sub.txt").mkdir(parents=True)  # no file, whatever its name
    stored, there = (write(folder, kind, texts).build() for folder in (bucket, tmp_path))
    for split in ("train", "validation"):
        assert stored.shards(split) == there.shards(split)
        assert [each.text for each in documents(stored, split)] == [each.text for each in documents(there, split)] != []
    name = next(documents(stored, "train")).name
    assert name.startswith("s3://bucket/corpus/")


def test_disks_come_first(bucket, texts, tmp_path):
    stored, there = (write(folder, "text", texts[:2]).paths[0] for folder in (bucket, tmp_path))
    names = [
        each.name for each in documents(TextFilesConfig(paths=(stored, there), validation_fraction=0).build(), "train")
    ]
    assert names == [f"{folder}/0{number}.txt" for folder in (tmp_path, bucket) for number in range(2)]


def test_identity_follows_the_content(bucket, texts):
    config = write(bucket, "text", texts)
    before = config.build().identity
    assert config.build().identity == before
    (bucket / "07.txt").write_bytes(b"other")
    assert config.build().identity != before


def test_faults(bucket, monkeypatch):
    def refused(pattern, config=TextFilesConfig, **settings):
        with pytest.raises(UserError) as error:
            config(paths=(pattern,), **settings).build()
        return str(error.value)

    assert refused("s3://bucket/none/*.txt").endswith(
        "='s3://bucket/none/*.txt': no such file (the pattern matches nothing)"
    )
    assert refused("ftp://host/*.txt").endswith("='ftp://host/*.txt': files lie on disks or in gs://, s3://, az://")
    assert "ArrayRecord files are read from disks" in refused("s3://bucket/*.array_record", ArrayRecordConfig)

    def no_credentials(self, path, **options):
        raise RuntimeError("Unable to locate credentials")

    monkeypatch.setattr(Store, "glob", no_credentials)
    assert refused("s3://bucket/*.txt").endswith("='s3://bucket/*.txt': RuntimeError: Unable to locate credentials")

    def not_installed(url):
        raise ImportError("Please install s3fs to access S3")

    monkeypatch.setattr(fsspec, "url_to_fs", not_installed)
    assert refused("s3://bucket/*.txt").endswith("needs s3fs, which is not installed; run `pip install s3fs`")


def test_a_bad_file_is_named(bucket):
    bucket.mkdir(parents=True)
    (bucket / "bad.txt").write_bytes(b"\xff\xfe")
    config = TextFilesConfig(paths=(f"{bucket}/*.txt",), validation_fraction=0)
    with pytest.raises(UserError, match=r"^s3://bucket/corpus/bad.txt: byte 0 is not UTF-8; convert it, or set"):
        list(documents(config.build(), "train"))
    skipping = dataclasses.replace(config, skip_bad_files=True)
    assert list(documents(skipping.build(), "train")) == []
