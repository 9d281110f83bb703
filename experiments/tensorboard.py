"""TensorBoard event files in pure Python: TFRecords of hand-written protocol buffers, scalars only.

Field numbers are those of tensorflow/core/util/event.proto and framework/summary.proto.
"""

import os
import pathlib
import socket
import struct
import time
from collections.abc import Mapping

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_SESSION_START = 1


class EventWriter:
    """Appends scalars to a new event file in `directory`; a context manager.

    `resume_step`: the first step that will be written again; readers drop what older files hold from there on.
    """

    def __init__(self, directory: str | os.PathLike, *, resume_step: int | None = None):
        name = f"events.out.tfevents.{time.time_ns() // 1_000_000_000:010d}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(pathlib.Path(directory) / name, "ab")  # noqa: SIM115
        self._write(_field(3, b"brain.Event:2"))
        if resume_step is not None:
            self._write(_field(2, resume_step) + _field(7, _field(1, _SESSION_START)))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One event that holds all values of a step."""
        summary = b"".join(
            _field(1, _field(1, tag.encode()) + _key(2, _FIXED32) + struct.pack("<f", value))
            for tag, value in values.items()
        )
        self._write(_field(2, step) + _field(5, summary))

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "EventWriter":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def _write(self, event: bytes) -> None:
        event = _key(1, _FIXED64) + struct.pack("<d", time.time()) + event
        length = struct.pack("<Q", len(event))
        self._file.write(length + _masked_crc(length) + event + _masked_crc(event))
        self._file.flush()


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _key(number, _VARINT) + _varint(value)
    return _key(number, _BYTES) + _varint(len(value)) + value


def _key(number: int, wire_type: int) -> bytes:
    return _varint(number << 3 | wire_type)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)  # the Castagnoli polynomial, bits reversed
        table.append(byte)
    return table


_CRC_TABLE = _crc_table()


def crc32c(data: bytes) -> int:
    """CRC-32C (RFC 3720, appendix B.4)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC_TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def _masked_crc(data: bytes) -> bytes:
    """Rotated and shifted, as TFRecord stores it."""
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
