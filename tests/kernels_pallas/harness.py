"""How tests run kernels: one table of cases per op, against every implementation, in each way that this machine has.

    @pytest.mark.parametrize("way", ways("reference", "xla", "tpu", "gpu"), ids=str)
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_values(case, way):
        y = way.run(functools.partial(op, **case.options), *case.args())
        np.testing.assert_allclose(y, truth(*case.args(), **case.options), rtol=...)  # with its reason

A way's name says how the implementation ran: "tpu interpreted" on CPU is Pallas' simulation of the chip, "tpu device" (marked
`device`) the chip itself. That kernels compile for chips is tested in test_aot.py, for all that compile_cases.py lists.
"""

import contextlib
import dataclasses
import io
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    args: Callable[[], tuple[np.ndarray, ...]]  # the same at every call
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # keyword arguments of the op

    def __str__(self) -> str:
        return self.name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    implementation: str
    where: str  # "cpu", "interpreted" or "device"

    def __str__(self) -> str:
        return f"{self.implementation} {self.where}"

    def run(self, fn: Callable, *args: Any) -> Any:
        """fn(*args, implementation=...) under jit, or a skipped test that says why."""
        with self._simulated_or_there():
            return jax.block_until_ready(jax.jit(lambda *args: fn(*args, implementation=self.implementation))(*args))

    def _simulated_or_there(self) -> contextlib.AbstractContextManager:
        if self.where == "interpreted":
            return interpreted(self.implementation)
        if self.where == "device":
            wanted, here = self.implementation, jax.default_backend()
            if here == "cpu" or (wanted in ("tpu", "gpu") and wanted != here):
                pytest.skip(f"no device for {wanted!r}: this is {here}")
        return contextlib.nullcontext()


def ways(*implementations: str) -> list[Any]:
    """Each implementation on CPU (kernels interpreted), and all of them again on the device, marked so."""
    here = [Way(implementation=i, where="interpreted" if i in ("tpu", "gpu") else "cpu") for i in implementations]
    there = [pytest.param(Way(implementation=i, where="device"), marks=pytest.mark.device) for i in implementations]
    return [*here, *there]


@contextlib.contextmanager
def interpreted(implementation: str) -> Iterator[None]:
    """Kernels called inside run on a simulated chip whose memory starts as NaN; races and reads out of bounds fail the test."""
    if implementation == "tpu":
        simulated = pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True))
    elif hasattr(plgpu, "force_gpu_interpret_mode"):
        simulated = plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True))
    else:
        pytest.skip(
            f"JAX {jax.__version__} interprets no Mosaic GPU kernel with tiled memory; 0.11 does. Compiled only"
        )
    said = io.StringIO()
    with contextlib.redirect_stdout(said), simulated:
        try:
            yield
        except Exception:
            pltpu.reset_tpu_interpret_mode_state()  # or the next kernel would wait for this one
            raise
    assert "RACE DETECTED" not in said.getvalue(), said.getvalue()
