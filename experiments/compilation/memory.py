"""What the compiler says of a program's memory."""

import dataclasses
from typing import Any, Self


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device while a program runs, as the compiler reports them."""

    arguments: int
    outputs: int  # without those that take an argument's place
    temporaries: int  # all together; on chips not all of them exist at the same time
    peak: int  # the most that exists at any one time, arguments and outputs included

    @classmethod
    def of(cls, compiled: Any) -> Self:
        """Of a `jax.stages.Compiled`."""
        sizes = compiled.memory_analysis()
        return cls(
            arguments=sizes.argument_size_in_bytes,
            outputs=sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
            temporaries=sizes.temp_size_in_bytes,
            peak=sizes.peak_memory_in_bytes,
        )
