"""JPEGs in pieces: their header, and parts that are decoded without the rest."""

import math
import struct
from typing import NamedTuple

import numpy as np

from mae_jax.data.transforms import Box

_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive
_TABLES = (0xC4, 0xDB, 0xFE, 0xE0, 0xEE)  # Huffman, quantisation, comments, JFIF, Adobe
_SCAN, _RESTARTS = 0xDA, 0xDD


class Header(NamedTuple):
    """The header of a JPEG that needs no turning: grey or of three colours, without EXIF or further pictures."""

    height: int
    width: int
    unit: tuple[int, int]  # height and width of what is coded together, pixels
    frame: int  # where the frame's segment begins
    end: int  # where the coded pixels begin
    is_cut: bool  # whether units can be decoded one by one: baseline, with a restart marker after each


def read_header(data: bytes) -> Header | None:
    """None for all other JPEGs, other formats and damaged headers."""
    if data[:2] != b"\xff\xd8":
        return None
    place, restarts, found = 2, 0, None
    try:
        while True:
            start, kind, length = struct.unpack_from(">BBH", data, place)
            if start != 0xFF:
                return None
            if kind in _FRAMES:
                bits, height, width, components = struct.unpack_from(">BHHB", data, place + 4)
                factors = [data[place + 11 + 3 * n] for n in range(components)]
                found, baseline = (place, bits, height, width, factors), kind == _FRAMES[0]
            elif kind == _RESTARTS:
                restarts = struct.unpack_from(">H", data, place + 4)[0]
            elif kind == _SCAN:
                break
            elif kind not in _TABLES:  # EXIF, profiles, several pictures
                return None
            place += 2 + length
        whole = found is not None and data[place + 4] == len(found[4])  # all components in one scan
    except (struct.error, IndexError):
        return None
    if not found or found[1] != 8 or len(found[4]) not in (1, 3) or not found[2] or not found[3]:
        return None
    frame, _, height, width, factors = found
    rows, columns = max(f & 15 for f in factors), max(f >> 4 for f in factors)
    unit = (8, 8) if len(factors) == 1 else (8 * rows, 8 * columns)  # a single component is not interleaved
    return Header(height, width, unit, frame, place + 2 + length, baseline and restarts == 1 and whole)


def part_of(data: bytes, header: Header, box: Box) -> tuple[bytes, Box]:
    """A JPEG of the units around a box, and the box in it: its pixels are those of the whole one.

    A unit more is taken where the box touches its end: smoothly enlarged colours depend on the next pixel. The JPEG as
    it is if it is not cut into units, or all of them are needed.
    """
    top, left, height, width = box
    rows, columns = math.ceil(header.height / header.unit[0]), math.ceil(header.width / header.unit[1])
    first_row, first_column = max(0, top - 1) // header.unit[0], max(0, left - 1) // header.unit[1]
    end_row = min(rows, (top + height) // header.unit[0] + 1)
    end_column = min(columns, (left + width) // header.unit[1] + 1)
    needed = (end_row - first_row) * (end_column - first_column)
    if not header.is_cut or needed == rows * columns:
        return data, box
    coded = np.frombuffer(data, np.uint8, offset=header.end)
    ends = np.flatnonzero(coded[:-1] == 0xFF)
    after = coded[ends + 1]
    ends = ends[(after >= 0xD0) & (after <= 0xD9)]  # where each unit ends: RST0 to 7, or the picture's end
    if len(ends) != rows * columns:  # damaged
        return data, box
    starts = np.concatenate([[0], ends[:-1] + 2])
    line = np.arange(first_row, end_row) * columns
    begins, stops = starts[line + first_column], ends[line + end_column - 1] + 2
    head = bytearray(data[: header.end])
    new_height = min(header.height, end_row * header.unit[0]) - first_row * header.unit[0]
    new_width = min(header.width, end_column * header.unit[1]) - first_column * header.unit[1]
    struct.pack_into(">HH", head, header.frame + 5, new_height, new_width)
    lines = [data[header.end + a : header.end + b] for a, b in zip(begins.tolist(), stops.tolist(), strict=True)]
    whole = np.frombuffer(bytearray().join([head, *lines]), np.uint8)
    # The markers between units count from 0 to 7 again.
    shifts = len(head) + np.cumsum(stops - begins) - stops
    markers = (ends[line[:, None] + np.arange(first_column, end_column)] + shifts[:, None]).ravel()
    whole[markers + 1] = 0xD0 + np.arange(needed) % 8
    whole[-1] = 0xD9  # the end of the picture
    return whole.tobytes(), (top - first_row * header.unit[0], left - first_column * header.unit[1], height, width)
