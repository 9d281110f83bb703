"""Instructions of kernels are counted as libtpu writes them down, and attention on TPU stays near what its products need."""

import json
import os
import subprocess
import sys

import pytest

from kernels_pallas import aot
from kernels_pallas.bundles import Bundles

needs_compilers = pytest.mark.skipif(aot.unavailable() is not None, reason=str(aot.unavailable()))

# Two ways to do the same (regions 2 and 3) inside a loop (1), and a small product outside of it.
SCHEDULE = """= control target key start
LB: loop body

     0   :  { %1 = smov 0 } /* Start region 1 :: Start region 2 */
   0x1   : > { %2 = vmatmul }
   0x2   : > { %3 = vmatmul }
   0x3   : > { %4 = vst } /* End region 2 */
   0x4 PF: > { %5 = vmatmul } /* Start/End empty region 9 :: Start region 3 */
   0x5   : > { %6 = vmatmul }
   0x6   : > { %7 = vadd }
   0x7   : > { %8 = vadd }
   0x8   : > { %9 = vst } /* End region 3 */
   0x9   : > { %10 = sadd } /* End region 1 :: Start region 4 */
   0xa   :  { %11 = vmatmul } /* End region 4 */
"""
UTILIZATION = "== CAPACTIY:\nMXU, VALU\n    2     4\n== UTILIZATION:\n" + "\n".join(
    f"{mxu} 0" for mxu in (0, 2, 2, 0, 2, 2, 0, 0, 0, 0, 1)
)


def test_the_leaner_way_is_counted():
    assert Bundles.of_kernel(SCHEDULE, UTILIZATION) == Bundles(scheduled=4, needed=2.0)


def test_a_kernel_without_products_has_none():
    assert Bundles.of_kernel(SCHEDULE, UTILIZATION.replace("1 0", "0 0").replace("2 0", "0 0")) is None


def test_what_is_no_kernel_is_left_out(tmp_path):
    for name, text in (
        ("1-fusion-07-final_bundles.txt", SCHEDULE),
        ("1-fusion-06-schedule-analysis_final_bundles.txt", "[opcode] fusion"),
        ("1-fusion-05-final_hlo-static-per-bundle-utilization.txt", UTILIZATION),
    ):
        (tmp_path / name).write_text(text)
    assert Bundles.read(tmp_path) is None
    (tmp_path / "1-fusion-06-schedule-analysis_final_bundles.txt").write_text('custom_call_target="tpu_custom_call"')
    assert Bundles.read(tmp_path) == Bundles(scheduled=4, needed=2.0)


@needs_compilers
@pytest.mark.slow
@pytest.mark.parametrize(("chip", "most"), [("v5e", 1.1), ("v5p", 1.1), ("v6e", 1.25), ("tpu7x", 1.3)])
def test_attention_issues_little_more_than_its_products_need(chip, most, tmp_path):
    out = tmp_path / "aot.json"
    flags = ["--bundles", "--op=flash_attention", "--all", "--contains=mla train 32K", f"--chip={chip}", f"--out={out}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-m", "experiments.bench", "aot", *flags], env=environment, check=True)
    counted = [row["bundles"] for row in json.loads(out.read_text())["results"]]
    assert len(counted) == 4  # forward and backward, plain and packed
    assert all(bundles["needed"] <= bundles["scheduled"] <= most * bundles["needed"] for bundles in counted), counted
