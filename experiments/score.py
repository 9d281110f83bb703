"""Writes the logits and log-probabilities of given tokens.

    python -m experiments.score --checkpoint=runs/tiny --text='import os' --out=scores.npz
    python -m experiments.score --checkpoint=path/to/DeepSeek-V2-Lite --input_ids=ids.npy --out=scores.npz --compute=bfloat16

What is written is float32, whatever it is computed in.
"""

import dataclasses
import os
import pathlib
from typing import TYPE_CHECKING, Literal

import numpy as np

from experiments.cli import parse_flags, run_main
from experiments.errors import UserError

if TYPE_CHECKING:
    from experiments.loading import ModelSource


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreFlags:
    checkpoint: str  # Hugging Face directory, run directory, or one step of a run
    out: str  # .npz file: input_ids [B, T], logits [B, T, V] and logprobs [B, T-1] in float32, loss (minus their mean)
    input_ids: str | None = None  # .npy file of integers [B, T], no padding
    text: str | None = None  # one text, through the checkpoint's tokenizer, behind BOS as in training
    text_file: str | None = None  # like --text, from a UTF-8 file
    ema: bool = False  # use the averaged parameters of the run
    compute: Literal["float32", "bfloat16"] = "float32"  # float32 is exact; bfloat16 is faster on accelerators
    batch_size: int = 8  # rows computed at once, rounded up to fill the devices

    def __post_init__(self):
        if [self.input_ids, self.text, self.text_file].count(None) != 2:
            raise ValueError("give one of --input_ids=FILE.npy, --text=TEXT and --text_file=FILE")
        if self.batch_size < 1:
            raise ValueError(f"--batch_size={self.batch_size}: must be at least 1")


def main(argv: list[str]) -> int:
    """Writes what `ScoreFlags.out` says. Raises UserError before the weights are read for whatever can be known by then."""
    flags = parse_flags(argv, ScoreFlags)
    out = pathlib.Path(flags.out)
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out={out}: the directory {out.absolute().parent} does not exist")

    from experiments.backend import set_up_backend
    from experiments.loading import find_model

    source = find_model(flags.checkpoint, ema=flags.ema).computing_in(flags.compute)
    input_ids_BT = _read_ids(flags.input_ids) if flags.input_ids else _encode(flags, source)
    _check(input_ids_BT, source.config.vocab_size, source.config.max_position_embeddings)

    from experiments.scoring import score

    set_up_backend()
    scores = score(source.load(), input_ids_BT, flags.batch_size)
    unfinished = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as stream:
            np.savez(
                stream, input_ids=input_ids_BT, logits=scores.logits_BTV, logprobs=scores.logprobs_BT, loss=scores.loss
            )
        unfinished.replace(out)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise UserError(f"--out={out}: cannot be written ({error.strerror})") from error
    B, T = input_ids_BT.shape
    print(f"loss {scores.loss:.6f} over {B} x {T - 1} predicted tokens; wrote {out}")
    return 0


def _read_ids(path: str) -> np.ndarray:
    try:
        ids = np.load(path, allow_pickle=False)
    except OSError as error:
        raise UserError(f"--input_ids={path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, EOFError) as error:
        raise UserError(f"--input_ids={path}: not a .npy file of integers ({error})") from error
    if not isinstance(ids, np.ndarray):
        raise UserError(f"--input_ids={path}: holds several arrays; save one with numpy.save")
    if not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"--input_ids={path}: has dtype {ids.dtype}; token ids are integers")
    if ids.ndim != 2:
        raise UserError(f"--input_ids={path}: has shape {list(ids.shape)}; [rows, tokens] is expected")
    return ids


def _encode(flags: ScoreFlags, source: "ModelSource") -> np.ndarray:
    tokenizer = source.tokenizer()
    if tokenizer is None:
        raise UserError(f"--checkpoint={flags.checkpoint}: holds no tokenizer.json; give --input_ids instead of text")
    if flags.text is not None:
        text = flags.text
    else:
        try:
            text = pathlib.Path(str(flags.text_file)).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"--text_file={flags.text_file}: cannot be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise UserError(
                f"--text_file={flags.text_file}: not UTF-8 ({error.reason} at byte {error.start})"
            ) from error
    return np.array([tokenizer.encode(text, bos=source.begins_with_bos(tokenizer))], np.int64).reshape(1, -1)


def _check(input_ids_BT: np.ndarray, vocab_size: int, max_length: int) -> None:
    rows, length = input_ids_BT.shape
    if rows < 1 or length < 2:
        raise UserError(f"input of shape [{rows}, {length}]: at least one row of two tokens is needed")
    if length > max_length:
        raise UserError(f"rows of {length} tokens are longer than max_position_embeddings={max_length}; cut them")
    low, high = input_ids_BT.min(), input_ids_BT.max()
    if low < 0 or high >= vocab_size:
        raise UserError(f"token id {low if low < 0 else high} is not between 0 and vocab_size - 1 = {vocab_size - 1}")


if __name__ == "__main__":
    run_main(main)
