"""The task retrieve: the nearest pictures of an index to each query."""

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from mae_jax.data.image_folder import PictureFiles
from mae_jax.data.sources import Source
from mae_jax.evaluation.evaluator import TOKENS, EvaluationData, Trained
from mae_jax.evaluation.feature_table import FeatureTable, check_encoder, describe_encoder, read_features
from mae_jax.evaluation.gallery import Files, Gallery, is_table, number_labels, of_pictures, of_table
from mae_jax.evaluation.neighbours_page import make_page
from mae_jax.evaluation.neighbours_sheet import SHEET_QUERIES, draw_sheet, read_shown, spread
from mae_jax.evaluation.retrieval import RECALL_AT, Neighbours, average_precisions, find_others, find_own, score
from mae_jax.interop.workdirs import Weights
from mae_jax.runtime.console import say
from mae_jax.runtime.errors import UserError, escaped
from mae_jax.runtime.processes import is_main
from mae_jax.runtime.signals import StopSignal
from mae_jax.tasks.measuring import find_sources, open_checkpoint, open_data, write_measurement
from mae_jax.workdir.reporting import provenance
from mae_jax.workdir.writing import save_picture, write_atomically, write_json, writing_table

TABLE, SHEET, PAGE = "neighbours.csv", "neighbours.png", "neighbours.html"
SIDES = ("index", "queries")
SHOWN_BAD = 3
COLUMNS = ("query", "rank", "neighbour", "score", "query_label", "neighbour_label")


def run(config: ConfigDict, workdir: Path, stop: StopSignal) -> None:
    """Writes neighbours.csv, neighbours.png, neighbours.html and result.json."""
    given = {side: config.retrieve[side] for side in SIDES}
    check_data_are_used(config)
    tables = {side: read_features(path) for side, path in given.items() if is_table(path)}
    weights, config = open_checkpoint(config, workdir, needs_data=None in given.values())
    for side, table in tables.items():
        check_encoder(table, describe_encoder(config, weights.step), f"retrieve.{side}={given[side]}")
    sources = open_sources(weights, config, tables)
    data, state = open_data(weights, config, sources["index"], sources["queries"], describe)
    write_json(workdir / "config.json", config.to_dict() | provenance())
    index, queries, left_out = open_galleries(data, state, sources, tables)
    own = find_own(index.keys, queries.keys)
    neighbours = find_others(index.vectors, queries.vectors, own, max(config.retrieve.k, *RECALL_AT), data.mesh)
    scores, scored = measure(index, queries, own, neighbours)
    layer = "" if config.evaluate.layer is None else f" of block {config.evaluate.layer}"
    caption = [
        f"{state.name}: {TOKENS[config.evaluate.token]}{layer}",
        *describe(data.train, data.evaluation),
        *tell(scores, scored),
    ]
    files = write_files(config, workdir, index, queries, neighbours, caption)
    result = {"step": weights.step, "index_images": len(index.names), "query_images": len(queries.names)}
    result |= {"scored_queries": scored} | {f"retrieve/{name}": value for name, value in scores.items()}
    write_measurement(workdir, config, result | {"left_out": left_out, "retrieve": given})
    say(*tell(scores, scored), f"see {', '.join(f'{workdir}/{file}' for file in files)}")


def check_data_are_used(config: ConfigDict) -> None:
    if None not in (config.retrieve.index, config.retrieve.queries):
        for name in ("name", "path"):
            if config.data[name] is not None:
                raise UserError(
                    f"data.{name}={config.data[name]} is not used with both retrieve.index and retrieve.queries: leave "
                    "it out"
                )


def open_sources(weights: Weights, config: ConfigDict, tables: dict[str, FeatureTable]) -> dict[str, Source]:
    """Index and queries: of None, the data's pictures for training (or all, if none are) and for evaluation."""
    given, found = {side: config.retrieve[side] for side in SIDES}, {}
    if None in given.values():
        train, evaluation = find_sources(weights, config)
        found = {"index": train or evaluation, "queries": evaluation}
    for side, path in given.items():
        if side in tables:
            found[side] = Files(tables[side].files, f"of {path}")
        elif path is not None and given["index"] == path and side != "index":
            found[side] = found["index"]
        elif path is not None:
            found[side] = PictureFiles(path, None, f"retrieve.{side}", config.data.extensions)
    return {side: found[side] for side in SIDES}


def describe(index: Source, queries: Source) -> list[str]:
    """Lines for users: the pictures of both sides, and notes."""
    sides = [
        f"{side}: {len(source):,} picture{'s' * (len(source) != 1)} {source.place}".rstrip()
        for side, source in (("index", index), ("queries", queries))
    ]
    return [escaped(line) for line in ("; ".join(sides), *dict.fromkeys([*index.notes, *queries.notes]))]


def open_galleries(
    data: EvaluationData, state: Trained, sources: dict[str, Source], tables: dict[str, FeatureTable]
) -> tuple[Gallery, Gallery, list[dict[str, str]]]:
    """Index, queries, and the bad pictures, which are told and left out."""
    found, left_out = {}, []
    for side, source in (("queries", data.evaluation), ("index", data.train)):
        if side in tables:
            found[side] = of_table(tables[side], source)
        elif side == "index" and sources["index"] is sources["queries"] and len(source) == len(data.evaluation):
            found[side] = found["queries"]
        else:
            found[side], bad = of_pictures(source, data, state)
            left_out += [{"file": file, "side": side, "error": why} for file, why in bad.items()]
        if not found[side].names:
            raise UserError(f"none of the pictures for retrieve.{side} {source.place} can be used: give others")
    for bad in left_out[:SHOWN_BAD]:
        say(f"bad: {bad['file']}: {bad['error']}")
    if left_out:
        say(f"bad pictures that are left out: {len(left_out):,}; result.json names them")
    return found["index"], found["queries"], left_out


def measure(index: Gallery, queries: Gallery, own: np.ndarray, neighbours: Neighbours) -> tuple[dict[str, float], int]:
    """The `score`, and of how many queries."""
    labels = number_labels(index, queries)
    precisions = average_precisions(index.vectors, queries.vectors, own, *labels)
    return score(neighbours, precisions, *labels), int(np.isfinite(precisions).sum())


def tell(scores: dict[str, float], scored: int) -> list[str]:
    """The scores as a line for users; none without labels."""
    words = [f"recall@{k} {scores[f'recall_at_{k}']:.1%}" for k in RECALL_AT if scores]
    named = f"{scored:,} quer{'y' if scored == 1 else 'ies'} whose label others have"
    return [f"{named}: {', '.join(words)}, mAP {scores['map']:.1%}"] if scores else []


def write_files(
    config: ConfigDict, workdir: Path, index: Gallery, queries: Gallery, neighbours: Neighbours, caption: list[str]
) -> list[str]:
    """The table, the sheet and the page; returns their names."""
    k, pictures = config.retrieve.k, config.retrieve.pictures
    with writing_table(workdir / TABLE, COLUMNS) as write_row:
        for query, name in enumerate(queries.names):
            for rank, row in enumerate(neighbours.rows[query, :k].tolist(), 1):
                if row >= 0:
                    labels = queries.labels[query] or "", index.labels[row] or ""
                    write_row([name, rank, index.names[row], f"{neighbours.cosine[query, rank - 1]:.6f}", *labels])
    neighbours = Neighbours(neighbours.cosine[:, :k], neighbours.rows[:, :k])
    if is_main():
        shown = read_shown(config, index, queries, neighbours, spread(len(queries.names), max(pictures, SHEET_QUERIES)))
        if config.retrieve.index and not shown.index_pictures:
            say(f"note: no picture of retrieve.index={config.retrieve.index} can be read: its frames are empty")
        sheet = draw_sheet(index, queries, neighbours, shown.first(SHEET_QUERIES), caption)
        save_picture(workdir / SHEET, sheet)
        if pictures:
            page = make_page(index, queries, neighbours, shown.first(pictures), caption)
            write_atomically(workdir / PAGE, page)
    return [TABLE, SHEET, *([PAGE] if pictures else [])]
