"""PNG files of any header, valid or not, written byte by byte."""

import struct
import zlib


def png(width, height, bits, kind, rows=b""):
    """A PNG file from its rows of bytes; kind 0 grey, 2 colour, 4 grey with alpha, 6 colour with alpha."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    start, body, end = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + start + body + end
