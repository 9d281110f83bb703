"""Exact choice of the largest scores in each row, by counting: for some hundred of many thousands, with places in order.

A threshold is found by bisection over the bits of the scores, and the places of what reaches it are read off packed bits: a dozen
passes that count. XLA:CPU's top-k of 512 takes ten times the processor time, of 2K keys and of 8K.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

WORD = 32  # bits; rows are padded to whole words
SPARE = 1.25  # candidates for each key to be chosen: a threshold that may be so far off is found in half of the passes
WORTH = 4  # keys for each key to be chosen, from which on candidates are worth their place
HIDDEN = np.iinfo(np.int32).min


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
    """(low, how many keys reach it), [R]: `number` to `most` of them, or all if there are fewer.

    If it is more than `most`, less than `number` are above low: the others are ties.
    """

    def reaching(bound_R: jax.Array) -> jax.Array:
        def add(piece_Rs: jax.Array, count_R: jax.Array) -> jax.Array:
            return count_R + jnp.sum(piece_Rs >= bound_R[:, None], axis=1, dtype=jnp.int32)

        return over_pieces(add, jnp.zeros_like(like))

    def unsettled(state: tuple[jax.Array, ...]) -> jax.Array:
        _, low_R, high_R, reach_R = state
        return ((low_R + 1 < high_R) & (reach_R > most)).any()

    def halve(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        step, low_R, high_R, reach_R = state
        middle_R = (low_R & high_R) + ((low_R ^ high_R) >> 1)  # their mean, without overflow
        # Many scores may be exactly zero, so its two sides come first.
        middle_R = jnp.where((step < 2) & (low_R < 1 - step) & (1 - step < high_R), 1 - step, middle_R)
        middle_reach_R = reaching(middle_R)
        enough_R = middle_reach_R >= number
        low_R, high_R = jnp.where(enough_R, middle_R, low_R), jnp.where(enough_R, high_R, middle_R)
        return step + 1, low_R, high_R, jnp.where(enough_R, middle_reach_R, reach_R)

    low_R = jnp.zeros_like(like) + (HIDDEN + 1)
    high_R = jnp.zeros_like(like) + np.iinfo(np.int32).max
    state = (jnp.int32(0), low_R, high_R, reaching(low_R))
    _, low_R, _, reach_R = jax.lax.while_loop(unsettled, halve, state)
    return low_R, reach_R


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
