"""Pictures and their nearest neighbours on a contact sheet."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageDraw, ImageFont

from mae_jax.evaluation.drawing import drawn_channels
from mae_jax.evaluation.gallery import Gallery, read_crops
from mae_jax.evaluation.overview import make_display, shortened, wrapped
from mae_jax.evaluation.retrieval import Neighbours

SIDE = 128  # pixels of a thumbnail's longer side; smaller pictures are enlarged without smoothing
SHEET_QUERIES, SHEET_NEIGHBOURS = 8, 10
RIGHT, WRONG, PLAIN = "#1a7f37", "#cf222e", "#8c959f"  # frames: the query's label, another one, not known
FRAME, GAP, LINE = 4, 6, 16  # pixels


class Shown(NamedTuple):
    """What is drawn: some queries and their neighbours, with thumbnails uint8 [h, w, 3] of those that can be read."""

    queries: list[int]  # rows of the gallery of queries
    query_pictures: dict[int, np.ndarray]
    index_pictures: dict[int, np.ndarray]
    how: str  # how channels are drawn, if they are no 8-bit colours

    def first(self, count: int) -> "Shown":
        """At most so many of the queries, evenly spread."""
        return self._replace(queries=[self.queries[place] for place in spread(len(self.queries), count)])


def spread(total: int, count: int) -> list[int]:
    """At most `count` of the numbers below `total`, evenly spread."""
    return np.unique(np.linspace(0, total - 1, min(total, count)).round().astype(int)).tolist() if count else []


def read_shown(
    config: ConfigDict, index: Gallery, queries: Gallery, neighbours: Neighbours, rows: Sequence[int]
) -> Shown:
    """Thumbnails of these rows of queries, and of their neighbours, as the model sees them."""
    near = neighbours.rows[rows]
    wanted = (queries, np.asarray(rows)), (index, near[near >= 0])
    channels, display, how, found = drawn_channels(config, config.model.channels), None, "", []
    for gallery, needed in wanted:
        found.append(thumbnails := {})
        for places, crops in read_crops(config, gallery, needed):
            if display is None:
                display, how = make_display(crops, channels)
            thumbnails |= zip(places, map(_to_thumbnail, display(crops)), strict=True)
    return Shown(list(rows), *found, how)


def _to_thumbnail(picture: np.ndarray) -> np.ndarray:
    height, width = picture.shape[:2]
    longer = max(height, width)
    scale = SIDE / longer if longer > SIDE else SIDE // longer
    size, smooth = (round(width * scale), round(height * scale)), Image.Resampling.LANCZOS
    if size == (width, height):
        return picture
    return np.asarray(Image.fromarray(picture).resize(size, smooth if scale < 1 else Image.Resampling.NEAREST))


def frame_of(label: str | None, query_label: str | None) -> str:
    """The colour around a neighbour."""
    if label is None or query_label is None:
        return PLAIN
    return RIGHT if label == query_label else WRONG


def draw_sheet(
    index: Gallery, queries: Gallery, neighbours: Neighbours, shown: Shown, caption: Sequence[str]
) -> np.ndarray:
    """A row for each query: the picture, then its neighbours with their cosines; uint8 [height, width, 3]."""
    thumbnails = [*shown.query_pictures.values(), *shown.index_pictures.values()]
    sides = np.max([picture.shape[:2] for picture in thumbnails], axis=0) if thumbnails else (SIDE, SIDE)
    high, wide = (int(side) + 2 * FRAME for side in sides)
    columns = min(neighbours.rows.shape[1], SHEET_NEIGHBOURS)
    step, down, after_query = wide + GAP, high + 2 * LINE + GAP, 3 * GAP
    font, total = ImageFont.load_default(12), GAP + step + after_query + columns * step
    if any(label is not None for label in queries.labels):
        caption = [*caption, "green frames: the query's label; red: another one; grey: not known"]
    lines = [line for part in [*caption, shown.how] if part for line in wrapped(part, font, total - 2 * GAP)]
    head = 2 * GAP + LINE * len(lines)
    sheet = Image.new("RGB", (total, head + down * len(shown.queries) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        draw.text((GAP, GAP + LINE * number), line, fill="black", font=font)

    def tile(x: int, y: int, picture: np.ndarray | None, colour: str, label: str, cosine: str, name: str) -> None:
        draw.rectangle((x, y, x + wide - 1, y + high - 1), outline=colour, width=FRAME)
        if picture is not None:
            left, top = (wide - picture.shape[1]) // 2, (high - picture.shape[0]) // 2
            sheet.paste(Image.fromarray(picture), (x + left, y + top))
        room = wide - font.getlength(cosine)
        draw.text((x + room, y + high + 1), cosine, fill="black", font=font)
        draw.text((x, y + high + 1), shortened(label, font, room - GAP), fill=colour, font=font)
        draw.text((x, y + high + 1 + LINE), shortened(name, font, wide), fill="black", font=font)

    for number, query in enumerate(shown.queries):
        y, label = head + down * number, queries.labels[query]
        name = os.path.basename(queries.names[query])
        tile(GAP, y, shown.query_pictures.get(query), "#0969da", label or "query", "", name)
        near = zip(neighbours.rows[query, :columns].tolist(), neighbours.cosine[query].tolist(), strict=False)
        for column, (row, cosine) in enumerate(near):
            if row >= 0:
                x, found, name = GAP + step + after_query + column * step, index.labels[row], index.names[row]
                words = found or "", f"{cosine:.3f}", os.path.basename(name)
                tile(x, y, shown.index_pictures.get(row), frame_of(found, label), *words)
    return np.asarray(sheet)
