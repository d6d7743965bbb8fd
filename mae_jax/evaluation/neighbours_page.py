"""Queries and their nearest neighbours as one HTML page that needs nothing else."""

import base64
import hashlib
import html
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from mae_jax.evaluation.gallery import Gallery
from mae_jax.evaluation.neighbours_sheet import Shown
from mae_jax.evaluation.retrieval import Neighbours

QUALITY = 85  # of the JPEGs

STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --soft: #f3f4f6; --line: #d0d7de; --ink: #1f2328; --faint: #59636e;
        --right: #1a7f37; --wrong: #cf222e; --mark: #0969da; }
@media (prefers-color-scheme: dark) {
  :root { --back: #0d1117; --soft: #161b22; --line: #30363d; --ink: #e6edf3; --faint: #9198a1;
          --right: #3fb950; --wrong: #f85149; --mark: #58a6ff; }
}
* { box-sizing: border-box; }
html, body { height: 100%; }
body { margin: 0; display: flex; flex-direction: column; background: var(--back); color: var(--ink);
       font: 14px/1.4 system-ui, sans-serif; }
header { padding: 12px 20px; border-bottom: 1px solid var(--line); }
h1 { margin: 0; font-size: 18px; }
h2 { margin: 0 0 12px; font-size: 15px; }
header p { margin: 2px 0 0; color: var(--faint); overflow-wrap: anywhere; }
main { flex: 1; min-height: 0; display: grid; grid-template-columns: minmax(280px, 2fr) 3fr; }
main > section { overflow: auto; padding: 16px 20px; }
#left { background: var(--soft); border-right: 1px solid var(--line); }
.tools { display: flex; flex-wrap: wrap; gap: 6px 14px; align-items: center; margin-bottom: 12px; }
.tools input[type=search] { flex: 1; min-width: 130px; padding: 6px 10px; border: 1px solid var(--line);
  border-radius: 6px; background: var(--back); color: inherit; font: inherit; }
#grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(92px, 1fr)); gap: 8px; }
#near { display: grid; grid-template-columns: repeat(auto-fill, minmax(118px, 1fr)); gap: 14px; }
button.tile { padding: 3px; border: 0; border-radius: 8px; background: none; color: inherit; font: inherit;
  text-align: left; cursor: pointer; min-width: 0; }
button.tile:hover { background: var(--line); }
button.tile[aria-pressed=true] { outline: 3px solid var(--mark); }
button.tile:focus-visible { outline: 3px solid var(--mark); }
.picture { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 6px;
  background: var(--line); }
.gone { display: flex; align-items: center; justify-content: center; padding: 6px; background: none;
  border: 1px dashed var(--faint); color: var(--faint); font-size: 12px; text-align: center; overflow: hidden;
  overflow-wrap: anywhere; }
.one-line { display: block; overflow: hidden; white-space: nowrap; text-overflow: ellipsis; font-size: 12px; }
figure { margin: 0; min-width: 0; }
figure .picture { border: 4px solid var(--line); }
figure.right .picture { border-color: var(--right); }
figure.wrong .picture { border-color: var(--wrong); }
.right b { color: var(--right); }
.wrong b { color: var(--wrong); }
figcaption { overflow-wrap: anywhere; font-size: 12px; }
figcaption .name { color: var(--faint); }
#query { display: flex; gap: 16px; align-items: flex-start; margin-bottom: 18px; }
#query .picture { flex: none; width: 168px; }
#query div { min-width: 0; overflow-wrap: anywhere; }
#query .name { color: var(--faint); }
[hidden] { display: none !important; }
@media (max-width: 700px) {
  body, html { height: auto; }
  main { display: block; }
  #left { max-height: 50vh; border-right: 0; border-bottom: 1px solid var(--line); }
}
"""

# What the data say is only ever set as text, so that no name is taken for HTML.
SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const grid = document.getElementById("grid"), near = document.getElementById("near");
const query = document.getElementById("query"), search = document.getElementById("search");
const missed = document.getElementById("missed"), count = document.getElementById("count");

function add(parent, tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}
function addPicture(parent, item) {
  if (!item.picture) return add(parent, "span", "picture gone", item.name.split("/").pop());
  const image = add(parent, "img", "picture");
  image.src = item.picture;
  image.alt = item.label === null ? item.name : item.label + ": " + item.name;
  return image;
}
function judge(label, wanted) {
  return label === null || wanted === null ? "" : label === wanted ? "right" : "wrong";
}
function show(place) {
  const chosen = data.queries[place];
  tiles.forEach((tile, other) => tile.setAttribute("aria-pressed", other === place));
  query.replaceChildren();
  addPicture(query, chosen);
  const words = add(query, "div");
  add(words, "h2", "", chosen.label === null ? "Query" : "Query: " + chosen.label);
  add(words, "div", "name", chosen.name);
  const verdicts = chosen.near.map(([row]) => judge(data.items[row].label, chosen.label));
  if (verdicts.some(Boolean)) {
    const right = verdicts.filter(verdict => verdict === "right").length;
    add(words, "p", "", right + " of " + verdicts.length + " neighbours have this label");
  }
  near.replaceChildren();
  chosen.near.forEach(([row, score], rank) => {
    const item = data.items[row], figure = add(near, "figure", verdicts[rank]);
    addPicture(figure, item).title = item.name;
    const caption = add(figure, "figcaption");
    caption.append(rank + 1 + " · " + score.toFixed(3) + " ");
    const marks = {right: "✓ ", wrong: "✗ ", "": ""};
    if (item.label !== null) add(caption, "b", "", marks[verdicts[rank]] + item.label);
    add(caption, "div", "name", item.name.split("/").pop()).title = item.name;
  });
}
const tiles = data.queries.map((item, place) => {
  const tile = add(grid, "button", "tile");
  tile.type = "button";
  tile.title = item.name;
  addPicture(tile, item);
  const first = item.near.length ? judge(data.items[item.near[0][0]].label, item.label) : "";
  tile.dataset.first = first;
  const caption = add(tile, "span", "one-line " + first);
  if (first) add(caption, "b", "", first === "right" ? "✓ " : "✗ ");
  caption.append(item.label === null ? item.name.split("/").pop() : item.label);
  tile.addEventListener("click", () => show(place));
  return tile;
});
const visible = () => tiles.filter(tile => !tile.hidden);
function filter() {
  const wanted = search.value.toLowerCase();
  tiles.forEach((tile, place) => {
    const item = data.queries[place], text = (item.name + " " + (item.label || "")).toLowerCase();
    tile.hidden = !text.includes(wanted) || missed.checked && tile.dataset.first !== "wrong";
  });
  count.textContent = visible().length + " of " + tiles.length;
}
search.addEventListener("input", filter);
missed.addEventListener("change", filter);
missed.parentElement.hidden = !tiles.some(tile => tile.dataset.first);
document.addEventListener("keydown", event => {
  const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  if (!step || event.target === search) return;
  const shown = visible(), at = shown.findIndex(tile => tile.getAttribute("aria-pressed") === "true");
  const next = shown[at < 0 ? 0 : at + step];
  if (next) { next.click(); next.focus(); event.preventDefault(); }
});
filter();
if (tiles.length) show(0);
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Nearest neighbours</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<header><h1>Nearest neighbours</h1>{about}</header>
<main>
<section id="left">
<div class="tools"><input type="search" id="search" placeholder="Name or label" aria-label="Name or label">
<label><input type="checkbox" id="missed"> nearest is wrong</label><span id="count"></span></div>
<div id="grid"></div>
</section>
<section id="right" aria-live="polite"><div id="query"></div><div id="near"></div></section>
</main>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def make_page(index: Gallery, queries: Gallery, neighbours: Neighbours, shown: Shown, about: Sequence[str]) -> str:
    """The page: lines of text, a grid of the queries that are `shown`, and of the chosen one the neighbours.

    Pictures are in it; its policy forbids requests and all scripts but its own.
    """
    rows = np.unique(neighbours.rows[shown.queries])
    rows = rows[rows >= 0].tolist()
    items = {row: number for number, row in enumerate(rows)}
    found = []
    for query in shown.queries:
        near = zip(neighbours.rows[query].tolist(), neighbours.cosine[query].tolist(), strict=False)
        scores = [[items[row], round(cosine, 6)] for row, cosine in near if row >= 0]
        found.append(_item(queries, query, shown.query_pictures) | {"near": scores})
    data = {"queries": found, "items": [_item(index, row, shown.index_pictures) for row in rows]}
    policy = "; ".join([
        "default-src 'none'", "img-src data:", f"style-src '{_digest(STYLE)}'", f"script-src '{_digest(SCRIPT)}'",
        "base-uri 'none'", "form-action 'none'",
    ])  # fmt: skip
    lines = "".join(f"<p>{html.escape(line)}</p>" for line in [*about, shown.how] if line)
    return PAGE.format(policy=policy, style=STYLE, script=SCRIPT, about=lines, data=_inside_script(data))


def _item(gallery: Gallery, row: int, pictures: dict[int, np.ndarray]) -> dict[str, Any]:
    picture = pictures.get(row)
    url = None if picture is None else _to_url(picture)
    return {"name": gallery.names[row], "label": gallery.labels[row], "picture": url}


def _to_url(picture: np.ndarray) -> str:
    jpeg = io.BytesIO()
    Image.fromarray(picture).save(jpeg, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _inside_script(data: Any) -> str:
    """JSON in which nothing ends or opens an element."""
    found = json.dumps(data, separators=(",", ":"))
    return found.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
