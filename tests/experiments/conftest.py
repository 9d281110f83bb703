"""One corpus, one cache and one uninterrupted run for all tests of the training command."""

import pytest
from small_runs import Home, write_corpus


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    return Home(corpus=write_corpus(folder / "corpus"), cache=folder / "cache")


@pytest.fixture(scope="session")
def uninterrupted(home, tmp_path_factory):
    """The directory of a whole run of 40 steps on one device; to be read only."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    ended = home.run(workdir)
    (workdir / "stdout").write_text(ended.stdout)
    return workdir
