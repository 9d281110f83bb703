"""What happens once per run: entry points and everything that touches disk, clock or screen."""

from experiments.versions import refuse_wrong_versions

refuse_wrong_versions()
