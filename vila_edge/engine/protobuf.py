"""As much of protobuf's wire format as it takes to look into an ONNX graph without a library for it.

https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

from collections.abc import Iterator

LENGTH_DELIMITED = 2  # the wire type of strings and messages


def fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and content of each length-delimited field; fields of other wire types are passed over.

    Raises ValueError or IndexError if the message is damaged.
    """
    return ((number, content) for number, content, _ in pieces(message) if content is not None)


def pieces(message: memoryview) -> Iterator[tuple[int, memoryview | None, memoryview]]:
    """Of each field its number, its content if it is length-delimited, and all of its bytes. Raises as `fields`."""
    position = 0
    while position < len(message):
        start, content = position, None
        tag, position = _varint(message, position)
        wire_type = tag & 7
        if wire_type == 0:
            _, position = _varint(message, position)
        elif wire_type == 1:
            position += 8
        elif wire_type == LENGTH_DELIMITED:
            length, position = _varint(message, position)
            content = message[position : position + length]
            position += length
        elif wire_type == 5:
            position += 4
        else:
            raise ValueError(f"wire type {wire_type}")
        if position > len(message):
            raise ValueError("a field reaches beyond its message")
        yield tag >> 3, content, message[start:position]


def field(number: int, content: bytes) -> bytes:
    """A length-delimited field."""
    return _encoded(number << 3 | LENGTH_DELIMITED) + _encoded(len(content)) + content


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number of more than 10 bytes")


def _encoded(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])
