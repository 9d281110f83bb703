"""Which keys a query of `flash_attention` sees."""

import dataclasses
import operator
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask:
    """A query sees a key that every condition given here allows; `Mask()` allows all.

    causal      the key's position is not after the query's.
    window      (left, right): query position - left <= key position <= query position + right, both ends included; None leaves a
                side open. Configs that count the query itself, as Mistral's and Gemma's `sliding_window`, mean
                left = sliding_window - 1.
    q_positions_BT, kv_positions_BS   what causal and window compare. Without them a key's position is its index and a query's is
                its index + q_offset; for packed rows this gives the same, as only differences within a segment count, and lets
                an implementation know before it runs which keys it need not read.
    q_offset    how many keys stand before the first query, negative if the query comes first. Must be said where the numbers of
                queries and keys differ: S - T if both end together. Fixed when compiled; for what changes use positions.
    q_segment_ids_BT, kv_segment_ids_BS   the two ids are equal, and not 0, which marks padding.
    selected_BTS   True where the key may be seen: any other choice, such as that of sparse attention.
    """

    causal: bool = dataclasses.field(default=False, metadata={"static": True})
    window: tuple[int | None, int | None] | None = dataclasses.field(default=None, metadata={"static": True})
    q_offset: int | None = dataclasses.field(default=None, metadata={"static": True})
    q_positions_BT: jax.Array | None = None
    kv_positions_BS: jax.Array | None = None
    q_segment_ids_BT: jax.Array | None = None
    kv_segment_ids_BS: jax.Array | None = None
    selected_BTS: jax.Array | None = None

    def __post_init__(self):
        # Of static fields only: jax also builds masks of things that are no arrays.
        if self.window is not None:
            if not isinstance(self.window, tuple) or len(self.window) != 2:
                raise ValueError(f"window must be (left, right), got {self.window!r}")
            if not all(side is None or (_is_int(side) and side >= 0) for side in self.window):
                raise ValueError(f"window={self.window} must hold integers that are not negative, or None for no bound")
            left, right = self.window
            if left == 0 and (self.causal or right == 0):
                raise ValueError(f"window={self.window} leaves each query only itself; widen it, or give none")
        if self.q_offset is not None and not _is_int(self.q_offset):
            raise ValueError(f"q_offset must be an int known when compiled, got {self.q_offset!r}; else give positions")

    @property
    def ordered(self) -> bool:
        """Whether positions matter."""
        return self.causal or self.window is not None

    @property
    def left(self) -> int | None:
        """How far back a query sees; None is without end."""
        return None if self.window is None else self.window[0]

    @property
    def right(self) -> int | None:
        """How far ahead a query sees, 0 if causal; None is without end."""
        return 0 if self.causal else None if self.window is None else self.window[1]

    def check(self, batch: int, num_queries: int, num_keys: int) -> None:
        """ValueError if it is no mask for [batch, num_queries, num_keys]."""
        for name, q_ids, kv_ids in (
            ("segment ids", self.q_segment_ids_BT, self.kv_segment_ids_BS),
            ("positions", self.q_positions_BT, self.kv_positions_BS),
        ):
            if (q_ids is None) != (kv_ids is None):
                raise ValueError(f"mask: give {name} of both queries and keys, or of neither")
            for whose, ids, length in (("queries", q_ids, num_queries), ("keys", kv_ids, num_keys)):
                if ids is None:
                    continue
                if ids.shape != (batch, length) or not jnp.issubdtype(ids.dtype, jnp.signedinteger):
                    raise ValueError(
                        f"mask: {name} of {whose} must be signed integers [{batch}, {length}], got {ids.dtype} {list(ids.shape)}"
                    )
        if self.q_offset is not None and self.q_positions_BT is not None:
            raise ValueError("mask: give q_offset or positions, not both")
        if self.ordered and self.q_positions_BT is None and self.q_offset is None and num_queries != num_keys:
            raise ValueError(
                f"mask: {num_queries} queries and {num_keys} keys do not say where the queries stand; give q_offset "
                f"({num_keys - num_queries} if both end together) or positions"
            )
        selected = self.selected_BTS
        if selected is not None and (selected.shape != (batch, num_queries, num_keys) or selected.dtype != bool):
            raise ValueError(
                f"mask: selected_BTS must be bool [{batch}, {num_queries}, {num_keys}], got {selected.dtype} "
                f"{list(selected.shape)}"
            )

    def near(self, q: Any, kv: Any) -> tuple[Any, Any]:
        """Whether some and whether all keys are near enough, by the least and greatest positions [..., 2] of both sides."""
        some, every = True, True
        if self.right is not None:
            some &= kv[..., 0] <= q[..., 1] + self.right
            every &= kv[..., 1] <= q[..., 0] + self.right
        if self.left is not None:
            some &= kv[..., 1] >= q[..., 0] - self.left
            every &= kv[..., 0] >= q[..., 1] - self.left
        return some, every

    def array(self, batch: int, num_queries: int, num_keys: int) -> jax.Array:
        """The whole as bool [B, T, S]: the specification, for tests and short sequences."""
        self.check(batch, num_queries, num_keys)
        q_BT, kv_BS = self.q_positions_BT, self.kv_positions_BS
        if q_BT is None or kv_BS is None:
            q_BT, kv_BS = jnp.arange(num_queries)[None] + (self.q_offset or 0), jnp.arange(num_keys)[None]
        distance_BTS = kv_BS[:, None, :] - q_BT[:, :, None]
        visible_BTS = jnp.ones((batch, num_queries, num_keys), bool)
        if self.right is not None:
            visible_BTS &= distance_BTS <= self.right
        if self.left is not None:
            visible_BTS &= distance_BTS >= -self.left
        if self.q_segment_ids_BT is not None and self.kv_segment_ids_BS is not None:
            visible_BTS &= self.q_segment_ids_BT[:, :, None] == self.kv_segment_ids_BS[:, None, :]
            visible_BTS &= self.q_segment_ids_BT[:, :, None] != 0
        if self.selected_BTS is not None:
            visible_BTS &= self.selected_BTS
        return visible_BTS


def _is_int(value: object) -> bool:
    if isinstance(value, bool):
        return False
    try:
        operator.index(value)  # pyright: ignore[reportArgumentType]
    except TypeError:
        return False
    return not isinstance(value, jax.Array)
