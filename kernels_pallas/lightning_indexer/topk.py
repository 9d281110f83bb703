"""Exact choice of the largest scores in each row, by counting: for some hundred of many thousands, with places in order.

A threshold is found by bisection over the bits of the scores, and the places of what reaches it are read off packed bits: a dozen
passes that count, or half as many where each counts at several thresholds, which compilers for TPU and GPU make one reading of.
XLA:CPU's top-k of 512 takes ten times the processor time, of 2K keys and of 8K.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.select import platform

WORD = 32  # bits; rows are padded to whole words
SPARE = 1.25  # candidates for each key to be chosen: a threshold that may be so far off is found in half of the passes
WORTH = 4  # keys for each key to be chosen, from which on candidates are worth their place
HALVINGS = (
    3  # of a range in one pass, by the counts at 7 bounds; on CPU, where counting takes the time and not reading, 1
)
HIDDEN = np.iinfo(np.int32).min

Range = tuple[
    jax.Array, jax.Array, jax.Array
]  # of thresholds: low is enough or the least, high is not; how many reach low


def sortable(score: jax.Array) -> jax.Array:
    """int32 in the order of float32 scores: equal ones alike, zeros of either sign too; HIDDEN for -inf."""
    bits = jax.lax.bitcast_convert_type(jnp.where(score == 0, 0, score).astype(jnp.float32), jnp.int32)
    return jnp.where(score == -jnp.inf, HIDDEN, bits ^ ((bits >> 31) & np.iinfo(np.int32).max))


def largest(key_RS: jax.Array, number: int, over_pieces: Callable[[Callable, Any], Any]) -> jax.Array:
    """Places [R, number], ascending, of the largest keys that are not HIDDEN, of equal ones the earliest; S where there are fewer.

    over_pieces(absorb, state): absorb(piece, state) -> state for pieces of key_RS along S that hold all that is not HIDDEN.
    """
    num_keys = key_RS.shape[1]
    if num_keys <= WORTH * number:
        return _largest(key_RS, number, number, over_pieces)
    slots = _whole_words(int(SPARE * number))
    place_RC = _largest(key_RS, number, slots, over_pieces)
    candidate_RC = jnp.where(place_RC < num_keys, _take(key_RS, jnp.minimum(place_RC, num_keys - 1)), HIDDEN)
    chosen_RW = _largest(candidate_RC, number, number, lambda absorb, state: absorb(candidate_RC, state))
    return jnp.where(chosen_RW < slots, _take(place_RC, jnp.minimum(chosen_RW, slots - 1)), num_keys)


def _whole_words(size: int) -> int:
    return -(-size // WORD) * WORD


def _largest(key_RS: jax.Array, number: int, slots: int, over_pieces: Callable[[Callable, Any], Any]) -> jax.Array:
    """Places [R, slots] of `number` keys or some more, the largest: all that reach a threshold, but of too many ties the first."""
    num_keys = key_RS.shape[1]
    low_R, reach_R = _threshold(number, slots, over_pieces, like=key_RS[:, 0])
    tied_R = reach_R > slots

    def cut_ties(_: None) -> jax.Array:
        left_R = number - jnp.sum(key_RS > low_R[:, None], axis=1, dtype=jnp.int32)
        cut_R = _places(_packed(key_RS == low_R[:, None]), left_R[:, None])[:, 0]
        return jnp.where(tied_R, cut_R, num_keys)

    no_cut_R = jnp.where(tied_R, 0, num_keys)  # made of an argument, so that it varies as the other does
    cut_R = jax.lax.cond(tied_R.any(), cut_ties, lambda _: no_cut_R, None)
    place_1S = jnp.arange(num_keys, dtype=jnp.int32)[None]
    chosen_RS = (key_RS > low_R[:, None]) | ((key_RS == low_R[:, None]) & (place_1S < cut_R[:, None]))
    slot_RC = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (key_RS.shape[0], slots))
    return _places(_packed(chosen_RS), slot_RC)


def _threshold(
    number: int, most: int, over_pieces: Callable[[Callable, Any], Any], like: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(low, how many keys reach it), [R]: `number` to `most` of them, or all, and the count 0, if there are fewer.

    If it is more than `most`, less than `number` are above low: the others are ties.
    """

    def reaching(bounds: list[jax.Array]) -> tuple[jax.Array, ...]:
        def add(piece_Rs: jax.Array, counts: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            flags = (piece_Rs >= bound_R[:, None] for bound_R in bounds)
            return tuple(
                count_R + jnp.sum(flag_Rs, axis=1, dtype=jnp.int32)
                for count_R, flag_Rs in zip(counts, flags, strict=True)
            )

        return over_pieces(add, (jnp.zeros_like(like),) * len(bounds))

    def narrow(low_R: jax.Array, high_R: jax.Array, reach_R: jax.Array, bounds: list[jax.Array]) -> Range:
        """By one pass over the keys; bounds ascend."""
        found = list(zip(bounds, reaching(bounds), strict=True))
        for bound_R, bound_reach_R in found:
            enough_R = bound_reach_R >= number
            low_R, reach_R = jnp.where(enough_R, bound_R, low_R), jnp.where(enough_R, bound_reach_R, reach_R)
        for bound_R, bound_reach_R in reversed(found):
            high_R = jnp.where(bound_reach_R < number, bound_R, high_R)
        return low_R, high_R, reach_R

    def unsettled(state: Range) -> jax.Array:
        low_R, high_R, reach_R = state
        return ((low_R + 1 < high_R) & (reach_R > most)).any()

    halvings = 1 if platform() == "cpu" else HALVINGS
    # Many scores may be exactly zero, so its two sides come first.
    least_R, zero_R, one_R = (jnp.zeros_like(like) + bound for bound in (HIDDEN + 1, 0, 1))
    most_R = jnp.zeros_like(like) + np.iinfo(np.int32).max
    state = narrow(least_R, most_R, jnp.zeros_like(like), [least_R, zero_R, one_R])
    low_R, _, reach_R = jax.lax.while_loop(
        unsettled, lambda state: narrow(*state, _between(state[0], state[1], halvings)), state
    )
    return low_R, reach_R


def _between(low_R: jax.Array, high_R: jax.Array, halvings: int) -> list[jax.Array]:
    """Bounds that halve a range, and its halves, and so on."""
    if not halvings:
        return []
    middle_R = (low_R & high_R) + ((low_R ^ high_R) >> 1)  # their mean, without overflow
    return [*_between(low_R, middle_R, halvings - 1), middle_R, *_between(middle_R, high_R, halvings - 1)]


def _packed(flag_RS: jax.Array) -> jax.Array:
    """Bits [R, S / 32], uint32; the lowest is the first."""
    bit_RPs = flag_RS.reshape(flag_RS.shape[0], -1, WORD).astype(jnp.uint32)
    return jnp.sum(bit_RPs << jnp.arange(WORD, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)


def _places(word_RP: jax.Array, rank_RC: jax.Array) -> jax.Array:
    """Where the bit of each rank stands, 0 being the first that is set; the number of bits where there are not so many."""
    words = word_RP.shape[1]
    upto_RP = jnp.cumsum(jax.lax.population_count(word_RP).astype(jnp.int32), axis=1)
    find = functools.partial(jnp.searchsorted, side="right", method="scan_unrolled")
    which_RC = jnp.minimum(jax.vmap(find)(upto_RP, rank_RC), words - 1).astype(jnp.int32)
    word_RC = _take(word_RP, which_RC)
    rest_RC = rank_RC - (_take(upto_RP, which_RC) - jax.lax.population_count(word_RC).astype(jnp.int32))
    place_RC = which_RC * WORD
    half = WORD // 2
    while half:  # is it in the lower half of the bits that are left?
        lower_RC = word_RC & jnp.uint32((1 << half) - 1)
        below_RC = jax.lax.population_count(lower_RC).astype(jnp.int32)
        up_RC = rest_RC >= below_RC
        rest_RC, place_RC = jnp.where(up_RC, rest_RC - below_RC, rest_RC), jnp.where(up_RC, place_RC + half, place_RC)
        word_RC = jnp.where(up_RC, word_RC >> half, lower_RC)
        half //= 2
    return jnp.where(rank_RC < upto_RP[:, -1:], place_RC, words * WORD)


def _take(a_RS: jax.Array, place_RC: jax.Array) -> jax.Array:
    return jnp.take_along_axis(a_RS, place_RC, axis=1, mode="promise_in_bounds")
