"""What an entry point sets up before it uses devices."""

from experiments.backend import saying_choices
from kernels_pallas import select


def test_choices_of_implementations_are_said_once(caplog):
    caplog.set_level("INFO")
    said = []
    with saying_choices(said.append):
        select.say("test_backend's op", "xla")
        select.say("test_backend's op", "xla")
    select.say("test_backend's other op", "xla")
    assert said == ["test_backend's op: implementation xla"]
    assert caplog.messages == [
        "test_backend's other op: implementation xla"
    ]  # what a root logger says too, but not twice
