"""One corpus, one cache and one uninterrupted run for all tests of the training command."""

import socket

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


@pytest.fixture
def two_processes(home):
    """Starts a run on two processes of four devices each; both are killed in the end. each: options of one process, by its id."""
    runs = []

    def start(workdir, *arguments, each=None, **options):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        for process in range(2):
            flags = f"--coordinator_address=localhost:{port}", "--num_processes=2", f"--process_id={process}"
            own = dict((each or {}).get(process, {}))
            # Only process 0 would find compiled programs, and its collectives would wait 30 seconds for the other, no longer.
            also = {"devices": 4, "compilation_cache": False} | options | own
            runs.append(home.start(workdir, *flags, *arguments, *also.pop("arguments", ()), **also))
        return runs[-2:]

    yield start
    for run in runs:
        run.__exit__()
