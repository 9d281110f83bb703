"""What is read off compiled text: how often things run, products, memory traffic, collectives; and the rooflines made of it."""

# ruff: noqa: E501 (lines as a compiler writes them)

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from experiments.compilation.chips import CHIP_RATES, ChipRates
from experiments.compilation.collectives import Traffic, collectives
from experiments.compilation.describe import amount
from experiments.compilation.hlo import Program
from experiments.compilation.roofline import roofline
from kernels_pallas.aot_cluster import CHIPS

# As XLA:TPU writes it: a loop whose length stands in its condition, a product that is a convolution, and an all-gather that
# three fusions carry in turn.
TPU = """HloModule jit_step, is_scheduled=true

%fused_start (p.0: bf16[1,8]) -> bf16[4,8] {
  %p.0 = bf16[1,8]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[4,8]{1,0:T(8,128)(2,1)} all-gather(%p.0), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}, frontend_attributes={chain_id="3"}
}

%fused_rest (p.1: bf16[1,8]) -> bf16[4,8] {
  %p.1 = bf16[1,8]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[4,8]{1,0} all-gather(%p.1), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}, frontend_attributes={chain_id="3"}
}

%fused_product (p.2: f32[4,8,16], p.3: f32[4,16,32]) -> f32[4,8,32] {
  %p.2 = f32[4,8,16]{2,1,0} parameter(0)
  %p.3 = f32[4,16,32]{2,1,0} parameter(1)
  ROOT %convolution.1 = f32[4,8,32]{2,1,0} convolution(%p.2, %p.3), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf
}

%fused_slice (p.4: f32[100,8], p.5: s32[]) -> f32[1,8] {
  %p.4 = f32[100,8]{1,0} parameter(0)
  %p.5 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %dynamic-slice.1 = f32[1,8]{1,0} dynamic-slice(%p.4, %p.5, %zero), dynamic_slice_sizes={1,8}
}

%body (state: (s32[], bf16[1,8], f32[4,8,16], f32[4,16,32], f32[100,8])) -> (s32[], bf16[1,8], f32[4,8,16], f32[4,16,32], f32[100,8]) {
  %state = (s32[]{:T(128)}, bf16[1,8]{1,0}, f32[4,8,16]{2,1,0:T(8,128)S(1)}, f32[4,16,32]{2,1,0}, /*index=4*/f32[100,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = bf16[1,8]{1,0} get-tuple-element(%state), index=1
  %a = f32[4,8,16]{2,1,0:T(8,128)S(1)} get-tuple-element(%state), index=2
  %b = f32[4,16,32]{2,1,0} get-tuple-element(%state), index=3
  %table = f32[100,8]{1,0} get-tuple-element(%state), index=4
  %start = bf16[4,8]{1,0:S(1)} fusion(%x), kind=kCustom, calls=%fused_start
  %rest = bf16[4,8]{1,0:S(1)} fusion(%x), kind=kCustom, calls=%fused_rest
  %product = f32[4,8,32]{2,1,0:T(8,128)S(1)} fusion(%a, %b), kind=kOutput, calls=%fused_product
  %row = f32[1,8]{1,0:S(1)} fusion(%table, %i), kind=kLoop, calls=%fused_slice
  ROOT %next = (s32[], bf16[1,8]{1,0}, f32[4,8,16]{2,1,0}, f32[4,16,32]{2,1,0}, f32[100,8]{1,0}) tuple(%i, %x, %a, %b, %table)
}

%condition (state.1: (s32[], bf16[1,8], f32[4,8,16], f32[4,16,32], f32[100,8])) -> pred[] {
  %state.1 = (s32[], bf16[1,8]{1,0}, f32[4,8,16]{2,1,0}, f32[4,16,32]{2,1,0}, f32[100,8]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %bound = s32[]{:T(128)} constant(7)
  ROOT %less = pred[] compare(%i.1, %bound), direction=LT
}

%data_condition (state.2: (s32[], s32[])) -> pred[] {
  %state.2 = (s32[], s32[]) parameter(0)
  %i.2 = s32[] get-tuple-element(%state.2), index=0
  %n.2 = s32[] get-tuple-element(%state.2), index=1
  ROOT %less.2 = pred[] compare(%i.2, %n.2), direction=LT
}

%data_body (state.3: (s32[], s32[])) -> (s32[], s32[]) {
  ROOT %state.3 = (s32[], s32[]) parameter(0)
}

ENTRY %main (x: bf16[1,8], a: f32[4,8,16], b: f32[4,16,32], table: f32[100,8]) -> f32[4,8,16] {
  %x.1 = bf16[1,8]{1,0} parameter(0)
  %a.1 = f32[4,8,16]{2,1,0} parameter(1)
  %b.1 = f32[4,16,32]{2,1,0} parameter(2)
  %table.1 = f32[100,8]{1,0} parameter(3)
  %two = s32[] constant(2)
  %first = s32[] copy(%two)
  %tuple = (s32[], bf16[1,8]{1,0}, f32[4,8,16]{2,1,0}, f32[4,16,32]{2,1,0}, f32[100,8]{1,0}) tuple(%first, %x.1, %a.1, %b.1, %table.1)
  %while = (s32[], bf16[1,8]{1,0}, f32[4,8,16]{2,1,0}, f32[4,16,32]{2,1,0}, f32[100,8]{1,0}) while(%tuple), condition=%condition, body=%body
  %pair = (s32[], s32[]) tuple(%first, %two)
  %data = (s32[], s32[]) while(%pair), condition=%data_condition, body=%data_body
  ROOT %out = f32[4,8,16]{2,1,0} get-tuple-element(%while), index=2
}
"""


def test_a_loop_multiplies_what_is_in_it():
    program = Program(TPU)
    assert program.product_flops() == 5 * 2 * 4 * 8 * 16 * 32  # from 2 to 7; of the four taps one meets an element
    assert program.unknown_loops == {"data"}


def test_memory_traffic_leaves_out_what_stays_on_the_chip_and_what_is_only_sliced():
    gathers, product, row = 2 * 1 * 8 * 2, 4 * 16 * 32 * 4, 1 * 8 * 4 + 4
    assert Program(TPU).memory_bytes() == 5 * (gathers + product + row) + 2 * 4  # and the copied counter


def test_a_collective_in_several_fusions_is_one():
    (line,) = collectives(Program(TPU), 8, None)
    assert line == Traffic(kind="all-gather", group=4, hosts=1, count=5, bytes=5 * 16 * 3, network_bytes=0)


@pytest.mark.parametrize(
    ("text", "kind", "group", "sent", "network"),
    [
        # Devices 0, 2, 4, 6: two of each host of four. Its 8 x 3 bytes in hierarchical rings: half of the result enters by two ports.
        ("f32[2]{0} parameter(0)|((f32[2]{0}), f32[8]{0}) all-gather-start(%x), replica_groups={{0,2,4,6},{1,3,5,7}}", "all-gather", 4, 24, 8),
        ("f32[8]{0} parameter(0)|((f32[8]{0}), f32[2]{0}) reduce-scatter-start(%x), replica_groups=[1,4]<=[4]", "reduce-scatter", 4, 24, 0),
        ("f32[8]{0} parameter(0)|f32[8]{0} all-reduce-start(%x), replica_groups={}", "all-reduce", 8, 56, 8),
        ("f32[8]{0} parameter(0)|f32[2]{0} reduce-scatter(%x), replica_groups=mesh['a'=4,'b'=1,'c'=2] {'a'}", "reduce-scatter", 4, 24, 8),
        ("bf16[8]{0} parameter(0)|bf16[8]{0} all-to-all(%x), replica_groups={{0,4}}", "all-to-all", 2, 8, 8),
        ("pred[8]{0} parameter(0)|pred[8]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}", "collective-permute", 2, 8, 0),
    ],
)  # fmt: skip
def test_bytes_of_a_collective(text, kind, group, sent, network):
    x, op = text.split("|")
    program = Program(f"ENTRY %main (x: f32[]) -> f32[] {{\n  %x = {x}\n  ROOT %y = {op}, channel_id=1\n}}\n")
    (line,) = collectives(program, 8, 4)
    assert (line.kind, line.group, line.count, line.bytes) == (kind, group, 1, sent)
    assert line.network_bytes == pytest.approx(network)


def test_a_sum_of_which_a_fusion_keeps_a_slice_is_a_reduce_scatter_and_other_cores_collectives_count():
    """As XLA:TPU writes the one, and for TPU v7 the other."""
    program = Program("""HloModule jit_step

%all-reduce-scatter (p.0: f32[64,8]) -> f32[16,8] {
  %p.0 = f32[64,8]{1,0} parameter(0)
  %all-reduce.1 = f32[64,8]{1,0} all-reduce(%p.0), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %dynamic-slice.1 = f32[16,8]{1,0} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={16,8}
}

%on_another_core (p.1: f32[16,8]) -> f32[64,8] {
  %p.1 = f32[16,8]{1,0} parameter(0)
  ROOT %all-gather.1 = f32[64,8]{1,0} all-gather(%p.1), channel_id=2, replica_groups={{0,1,2,3}}, dimensions={0}
}

ENTRY %main (x: f32[64,8]) -> f32[64,8] {
  %x = f32[64,8]{1,0} parameter(0)
  %part = f32[16,8]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter
  %start = ((f32[16,8]{1,0}), f32[64,8]{1,0}, u32[]{:S(8)}) call-start(%part), async_execution_thread="sparsecore", to_apply=%on_another_core
  ROOT %done = f32[64,8]{1,0} call-done(%start)
}
""")
    found = {line.kind: line.bytes for line in collectives(program, 4, None)}
    assert found == {"reduce-scatter": 64 * 8 * 4 * 3 / 4, "all-gather": 16 * 8 * 4 * 3}


def test_a_compiled_program_of_many_devices():
    """Text of this very compiler: five steps of a product whose contraction is split, summed over the devices of an axis."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=jax.NamedSharding(mesh, P("a", "b")))
    w = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=jax.NamedSharding(mesh, P("b", None)))

    def step(x, w):
        y = jnp.matmul(x, w, out_sharding=P("a", None))
        return jax.sharding.reshard(jnp.tanh(y), P("a", "b")), None

    with jax.set_mesh(mesh):
        scan = jax.jit(lambda x, w: jax.lax.scan(lambda x, _: step(x, w), x, length=5)[0])
        program = Program(scan.trace(x, w).lower().compile().as_text())
    assert program.product_flops() == 5 * 2 * 8 * 16 * 64
    assert not program.unknown_loops
    (line,) = collectives(program, 8, None)
    assert (line.kind, line.group, line.count, line.bytes) == ("all-reduce", 4, 5, 5 * 2 * 8 * 64 * 4 * 3 / 4)


def test_a_slice_on_its_way_to_vmem_counts_as_itself():
    """TPU brings an array in parts, each of which names all of it; room for a result is nothing read or written."""
    program = Program("""HloModule jit_step, is_scheduled=true

ENTRY %main (x: s8[4096]) -> s8[1024] {
  %x = s8[4096]{0:T(1024)(128)(4,1)} parameter(0)
  %slice-start = ((s8[4096]{0:T(1024)(128)(4,1)}), s8[1024]{0:T(1024)(128)(4,1)S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:1024]}
  %room = s8[1024]{0:T(1024)(128)(4,1)} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %slice-done = s8[1024]{0:T(1024)(128)(4,1)S(1)} slice-done(%slice-start)
}
""")
    assert program.memory_bytes() == 1024


def test_kernels_for_tpu_say_what_they_take_and_those_for_gpus_count_as_silent():
    program = Program("""HloModule jit_step, is_scheduled=true

ENTRY %main (x: bf16[8,64]) -> (bf16[8,64], bf16[8,64]) {
  %x = bf16[8,64]{1,0} parameter(0)
  %twice = bf16[8,64]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"TUzvUg","cost_estimate":{"flops":"4096","transcendentals":"0","bytes_accessed":"5000"}}}
  %once = bf16[8,64]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"cost_estimate":{"flops":"96","bytes_accessed":"100"}}}
  %silent = bf16[8,64]{1,0} custom-call(%x), custom_call_target="mosaic_gpu_v2"
  ROOT %both = (bf16[8,64]{1,0}, bf16[8,64]{1,0}) tuple(%twice, %silent)
}
""")
    assert program.product_flops() == 4096 + 96
    assert program.memory_bytes() == 5000 + 2 * (2 * 8 * 64 * 2)
    assert program.silent_kernels == 1


def test_the_lighter_branch_counts():
    """The other one is an exception, such as a transport's fallback."""
    text = jax.jit(lambda p, x: jax.lax.cond(p, lambda x: x @ x @ x, lambda x: x @ x, x)).trace(
        jax.ShapeDtypeStruct((), bool), jax.ShapeDtypeStruct((8, 8), jnp.float32)
    )
    program = Program(text.lower().compile().as_text())
    assert program.product_flops() == 2 * 8**3
    assert len(program.conditionals) == 1


def test_roofline():
    lines = [Traffic(kind="all-gather", group=8, hosts=2, count=1, bytes=30.0, network_bytes=10.0)]
    find = functools.partial(roofline, model_flops=50, program_flops=100, memory_bytes=40, traffic=lines, peak=10)
    found = find(rates=ChipRates(0, hbm_rate=20, link_rate=10, network_rate=2))
    assert (found.compute, found.memory, found.links, found.network, found.useful) == (10, 2, 2, 5, 5)
    assert (found.overlapped, found.in_turn, found.mfu) == (10, 17, (5 / 17, 0.5))
    # Kernels whose products nobody counts: the model's are multiplied all the same.
    assert find(program_flops=20, rates=ChipRates(0, hbm_rate=20, link_rate=10, network_rate=2)).compute == 5


def test_every_chip_has_its_rates():
    assert set(CHIP_RATES) == set(CHIPS)
    for name, rates in CHIP_RATES.items():
        assert (rates.network_rate is None) == (CHIPS[name].platform == "tpu")


def test_amounts():
    assert [amount(value) for value in (0, 999, 1234, 5.66e16)] == ["0 ", "999 ", "1.23 k", "56.6 P"]
