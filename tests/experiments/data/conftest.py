"""A small generated corpus, so that tests do not depend on the Python that runs them."""

import random

import pytest

WORDS = ("the", "of", "and", "to", "café", "naïve", "日本", "42", "🙂", "def", "return", "x", "=", ";", "(a,", "b)")


def make_texts(count, seed=0, longest=60):
    """Different texts of very different lengths."""
    choose = random.Random(seed)
    return [f"{seed}.{i} " + " ".join(choose.choices(WORDS, k=choose.randint(1, longest))) for i in range(count)]


@pytest.fixture
def texts():
    return make_texts(80)


@pytest.fixture
def text_files(tmp_path, texts):
    """A glob for 80 files of one text each."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number:02}.txt").write_text(text, encoding="utf-8")
    return str(folder / "*.txt")
