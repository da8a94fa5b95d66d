"""Just enough of protocol buffers to read and edit a SentencePiece model (protobuf.dev/programming-guides/encoding)."""

from collections.abc import Iterable


def varint(data: bytes, at: int) -> tuple[int, int]:
    """(the number that begins at this byte, where the next thing begins)."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def field(number: int, body: bytes) -> bytes:
    """A field of a message, of a type that has a length: text, bytes, a message."""
    size, head = len(body), bytes([number << 3 | 2])
    while size > 127:
        head += bytes([size & 127 | 128])
        size >>= 7
    return head + bytes([size]) + body


def fields(data: bytes) -> Iterable[tuple[int, bytes | int]]:
    """(field number, body) of a protocol buffer message, in order."""
    at = 0
    while at < len(data):
        tag, at = varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = varint(data, at)
            yield number, value
            continue
        if wire == 2:
            size, at = varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError("not a protocol buffer")
        if at + size > len(data):
            raise ValueError("not a whole protocol buffer")
        yield number, data[at : at + size]
        at += size
