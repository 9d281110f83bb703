"""The mesh, the logical axis names of parameters, and the table that maps one to the other.

All mesh axes are Explicit: shardings are part of array types, and a mistake fails while tracing. Code that must see local
shards (kernels, expert dispatch, the loss) enters `shard_map` through `local`, the only place that does.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "expert", "tensor")
ROWS = ("data", "fsdp", "expert")  # mesh axes over which batch rows are split

# Logical axis of a parameter or activation -> mesh axes. Ordered, one line each; absent means replicated.
STORED = {  # split where parameters lie, whole where they are used
    "embed": "fsdp",
    "latent": "fsdp",  # of matrices that expand a latent, the widest outside of the experts
}
RULES: dict[str, str | tuple[str, ...]] = {
    "batch": ROWS,
    "vocab": "tensor",
    "heads": "tensor",
    "mlp": "tensor",
    "experts": "expert",
    **STORED,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be None and takes what is left."""

    data: int | None = None  # pure data parallelism: parameters replicated
    fsdp: int | None = 1  # rows and parameters split, parameters gathered where they are used
    expert: int | None = 1  # rows and experts split
    tensor: int | None = 1  # heads, feed-forward and vocabulary split

    def __post_init__(self):
        sizes = [getattr(self, axis) for axis in AXES]
        if sizes.count(None) > 1:
            raise ValueError("at most one mesh axis may be none (it takes the remaining devices)")
        for axis, size in zip(AXES, sizes, strict=True):
            if size is not None and size < 1:
                raise ValueError(f"mesh.{axis} is {size}; it must be at least 1")

    def shape(self, num_devices: int) -> tuple[int, int, int, int]:
        """Sizes of (data, fsdp, expert, tensor) on `num_devices` devices; ValueError if they do not multiply up."""
        sizes = [getattr(self, axis) for axis in AXES]
        known = 1
        for size in sizes:
            known *= size or 1
        if num_devices % known or (None not in sizes and known != num_devices):
            spelled = " x ".join(
                f"{axis}={'rest' if size is None else size}" for axis, size in zip(AXES, sizes, strict=True)
            )
            raise ValueError(
                f"mesh {spelled} does not fit {num_devices} devices; set one mesh axis to none or change a size"
            )
        data, fsdp, expert, tensor = (num_devices // known if size is None else size for size in sizes)
        return data, fsdp, expert, tensor

    def build(self, devices: list[Any] | None = None) -> Mesh:
        devices = jax.devices() if devices is None else devices
        # A mesh axis may cut an axis of a TPU's torus in two: `jax.make_mesh` refuses that, and so most shapes of large slices.
        grid = mesh_utils.create_device_mesh(self.shape(len(devices)), devices, allow_split_physical_axes=True)
        return Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def spec(*logical: str | None) -> P:
    """PartitionSpec of an array whose dims have these logical names."""
    return P(*(RULES.get(name) if name else None for name in logical))


def gathered(*logical: str | None) -> P:
    """Spec of a parameter where it is used: split as stored, but whole along the axes of STORED."""
    return P(*(None if name is None or name in STORED else RULES.get(name) for name in logical))


def mesh_is_set() -> bool:
    return not jax.sharding.get_abstract_mesh().empty


def platform() -> str | None:
    """What the devices of the mesh are, as `jax.default_backend()` spells it; None without a mesh, or of one without devices."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return None if device is None else device.platform


def optional_sharding(partition: P) -> P | None:
    """`partition` under a mesh, None without one (a plain single-device call, in a notebook say)."""
    return partition if mesh_is_set() else None


def reshard(x: jax.Array, partition: P) -> jax.Array:
    return jax.sharding.reshard(x, partition) if mesh_is_set() else x


def spec_of(x: jax.Array) -> P:
    """The PartitionSpec in the type of `x`, one entry a dim; all None without a mesh."""
    return jax.typeof(x).sharding.spec if mesh_is_set() else P(*(None,) * x.ndim)


def axis_size(axis: str) -> int:
    """Devices along a mesh axis; 1 without a mesh."""
    return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def local(fn: Callable, in_specs: Any, out_specs: Any, *, vary: tuple[str, ...] = AXES) -> Callable:
    """Wraps `fn` to run on local shards, by `shard_map` under a mesh and plainly without one.

    Inside, every input varies over the axes `vary`, so a cotangent always has its primal's type, and the sum of partial gradients
    over the axes along which an input is replicated comes from the transpose of `pcast`. An output must be made equal (psum) along
    the axes that `out_specs` leaves out.
    """
    if not mesh_is_set():
        return fn

    def enter(*args: Any) -> Any:
        return fn(*jax.tree.map(lambda x: varying(x, vary), args))

    return jax.shard_map(enter, in_specs=in_specs, out_specs=out_specs)


def gather(w: jax.Array, dtype: jnp.dtype, *logical: str | None) -> jax.Array:
    """Inside `local`: a parameter that came as `spec` says, as `gathered` has it, in the dtype of the products with it.

    It travels in that dtype. Its gradient is summed in float32 at least, and each device gets its own part only.
    """
    dims = tuple(
        (dim, STORED[name]) for dim, name in enumerate(logical) if name in STORED and axis_size(STORED[name]) > 1
    )
    return _gather(w.astype(jnp.promote_types(dtype, jnp.float32)), dtype, dims)


Dims = tuple[tuple[int, str], ...]  # dims and the mesh axes that split them


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(w: jax.Array, dtype: jnp.dtype, dims: Dims) -> jax.Array:
    w = w.astype(dtype)
    for dim, axes in dims:
        w = jax.lax.all_gather(w, axes, axis=dim, tiled=True)
    return w


def _gather_bwd(dtype: jnp.dtype, dims: Dims, _: None, dw: jax.Array) -> tuple[jax.Array]:
    dw = dw.astype(jnp.promote_types(dtype, jnp.float32))
    for dim, axes in dims:
        dw = jax.lax.psum_scatter(dw, axes, scatter_dimension=dim, tiled=True)
    return (dw,)


_gather.defvjp(lambda w, *static: (_gather(w, *static), None), _gather_bwd)


def varying(x: jax.Array, axes: tuple[str, ...] = AXES) -> jax.Array:
    """Inside `local`: the same values, of a type that may differ along these mesh axes."""
    missing = tuple(axis for axis in axes if axis not in jax.typeof(x).manual_axis_type.varying)
    return jax.lax.pcast(x, missing, to="varying") if missing else x
