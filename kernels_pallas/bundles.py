"""Instructions that libtpu's compiler schedules for a Mosaic kernel: a static measure of its speed, where there is no chip.

A bundle is what a core issues in a cycle. Counted are those of an innermost region of the kernel, where its products are; a loop
counts once. A kernel that handles tiles in two ways, with and without a mask, is judged by the leaner one.
"""

import dataclasses
import pathlib
import re
from collections.abc import Iterator
from typing import Self

# What makes the compiler write down its schedule. Undocumented: known of libtpu 0.0.42 to 0.0.50.
DUMP_FLAGS = "--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true --xla_jf_emit_annotations=true"
AS_MUCH = 0.9  # of the matrix work of the region that has most, for a region to count as another way to do the same


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bundles:
    scheduled: int
    needed: float  # by the matrix units alone, if they never waited

    @classmethod
    def of_kernel(cls, schedule: str, utilization: str) -> Self | None:
        """From the texts `final_bundles` and `final_hlo-static-per-bundle-utilization`; None for a kernel without products."""
        (mxus, *_), *used = (
            [int(n) for n in line.split()] for line in utilization.splitlines() if _NUMBERS.match(line)
        )
        done = [0]
        for mxu_slots, *_ in used:
            done.append(done[-1] + mxu_slots)
        regions = [(start, end, done[end] - done[start]) for start, end in _regions(schedule)]
        busy = [region for region in regions if region[2]]
        inner = [
            (start, end, work)
            for start, end, work in busy
            if not any((start, end) != (a, b) and start <= a and b <= end for a, b, _ in busy)
        ]
        if not inner:
            return None
        most = max(work for _, _, work in inner)
        return min(
            (cls(scheduled=end - start, needed=work / mxus) for start, end, work in inner if work >= AS_MUCH * most),
            key=lambda bundles: bundles.scheduled,
        )

    @classmethod
    def read(cls, directory: pathlib.Path) -> Self | None:
        """Of the kernel with most matrix work among those that a compiler has written down in `directory`."""
        found = []
        for schedule in directory.glob("*-final_bundles.txt"):
            stem = re.sub(r"-\d+-final_bundles$", "", schedule.stem)
            analysis = next(directory.glob(f"{_escape(stem)}-*-schedule-analysis_final_bundles.txt"), None)
            utilization = next(directory.glob(f"{_escape(stem)}-*-final_hlo-static-per-bundle-utilization.txt"), None)
            if analysis and utilization and "tpu_custom_call" in analysis.read_text():
                found.append(cls.of_kernel(schedule.read_text(), utilization.read_text()))
        return max(filter(None, found), key=lambda bundles: bundles.needed, default=None)


_NUMBERS = re.compile(r"\s*\d[\d\s]*$")
_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s")
_COMMENT = re.compile(r"/\* ((?:Start|End)[ /][^*]*region[^*]*) \*/")


def _regions(schedule: str) -> Iterator[tuple[int, int]]:
    """First bundle and the one after the last of every region."""
    starts = {}
    bundles = (line for line in schedule.splitlines() if _BUNDLE.match(line))
    for i, line in enumerate(bundles):
        for mark in (mark for comment in _COMMENT.findall(line) for mark in comment.split("::")):
            edge, *_, region = mark.split()
            if edge == "Start":
                starts[region] = i
            elif edge == "End" and region in starts:
                yield starts[region], i + 1


def _escape(stem: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", stem)
