"""The nearest pictures of an index to each query: the table, the sheet, the page in a browser, and the scores."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import average_precision_score
from sklearn.neighbors import NearestNeighbors

import mae_jax
from tests.digit_files import write_digits
from tests.runs import mistake, one_device, read_json, run_task

pytestmark = pytest.mark.slow
CHROMIUM = "/usr/bin/chromium"
HOSTILE = "<script>document.title='owned'<&quot;> <img src=x onerror=alert(1)>.png"
ODD = "<i>other"  # a class


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """50 digits to search and 11 queries as PNGs in class folders, a query of an unknown class, two bad files."""
    root = tmp_path_factory.mktemp("digits")
    write_digits(root, 61, lambda n, digit: f"{'index' if n < 50 else 'queries'}/class {digit % 5}")
    (root / "queries" / ODD).mkdir()
    shutil.copy(root / "index/class 0/00.png", root / "queries" / ODD / HOSTILE)
    shutil.copy(root / "index/class 1/01.png", root / "index/class 1" / HOSTILE)
    (root / "index/class 1/damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    (root / "queries/class 2/empty.png").touch()
    return root


def retrieve(pretrained, workdir, **settings):
    return run_task("retrieve", workdir, init_from=str(pretrained), **settings)


@pytest.fixture(scope="module")
def retrieved(pretrained, folder, tmp_path_factory):
    """On eight devices."""
    workdir = tmp_path_factory.mktemp("runs") / "retrieved"
    sides = dict(retrieve__index=str(folder / "index"), retrieve__queries=str(folder / "queries"))
    return retrieve(pretrained, workdir, retrieve__k=6, evaluate__batch_size=16, **sides)


def table_of(workdir):
    return list(csv.DictReader((workdir / "neighbours.csv").open()))


def page_data(workdir):
    page = (workdir / "neighbours.html").read_text()
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1])


@pytest.fixture(scope="module")
def sides(pretrained, folder):
    """(files, features by the Python API) of index and queries."""
    model, found = mae_jax.load(pretrained), []
    for side in ("index", "queries"):
        files = [
            str(file)
            for file in sorted((folder / side).rglob("*.png"))
            if file.name not in ("damaged.png", "empty.png")
        ]
        found.append((files, np.asarray(model.encode(model.processor(files))[:, 1:].mean(axis=1), np.float64)))
    return found


def test_neighbours_are_scikit_learns_of_the_python_apis_features(sides, retrieved):
    (files, features), (query_files, queries) = sides
    distances, rows = NearestNeighbors(n_neighbors=6, metric="cosine").fit(features).kneighbors(queries)
    table = table_of(retrieved)
    assert list(table[0]) == ["query", "rank", "neighbour", "score", "query_label", "neighbour_label"]
    assert len(table) == 6 * len(query_files) == 6 * 12
    found = {(row["query"], int(row["rank"])): row for row in table}
    for query, name in enumerate(query_files):
        for rank in range(6):
            row = found[name, rank + 1]
            # Copies, and what float32 does not tell apart, may come in any order.
            assert float(row["score"]) == pytest.approx(1 - distances[query, rank], abs=2e-6)
            there = 1 - distances[query][rows[query] == files.index(row["neighbour"])]
            assert not len(there) or there[0] == pytest.approx(float(row["score"]), abs=2e-6)
            assert row["neighbour_label"] == Path(row["neighbour"]).parent.name
            assert row["query_label"] == Path(name).parent.name


def test_scores_are_those_of_scikit_learn_and_numpy(sides, retrieved):
    (files, features), (query_files, queries) = sides
    labels, wanted = ([Path(file).parent.name for file in names] for names in (files, query_files))
    unit, unit_queries = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (features, queries))
    scored = [query for query, label in enumerate(wanted) if label in labels]
    precisions, ranks = [], []
    for query in scored:
        cosines, right = unit @ unit_queries[query], np.array(labels) == wanted[query]
        precisions.append(average_precision_score(right, cosines))
        ranks.append(np.flatnonzero(right[np.argsort(-cosines)])[0])
    result = read_json(retrieved / "result.json")
    assert (
        (result["index_images"], result["query_images"], result["scored_queries"])
        == (51, 12, 11)
        == (len(files), len(query_files), len(scored))
    )
    assert result["retrieve/map"] == pytest.approx(np.mean(precisions), abs=2e-3)  # float32 cosines
    for k in (1, 5, 10):
        assert result[f"retrieve/recall_at_{k}"] == pytest.approx(np.mean(np.array(ranks) < k))


def test_bad_pictures_are_left_out_and_told(retrieved):
    bad = {
        (Path(one["file"]).name, one["side"]): one["error"] for one in read_json(retrieved / "result.json")["left_out"]
    }
    assert bad.keys() == {("damaged.png", "index"), ("empty.png", "queries")}
    assert bad["empty.png", "queries"] == "the file is empty"


def test_one_device_finds_the_same(pretrained, folder, retrieved, tmp_path):
    sides = dict(retrieve__index=str(folder / "index"), retrieve__queries=str(folder / "queries"))
    with one_device():
        alone = retrieve(pretrained, tmp_path / "run", retrieve__k=6, retrieve__pictures=0, **sides)
    assert not (alone / "neighbours.html").exists()
    for ours, theirs in zip(table_of(alone), table_of(retrieved), strict=True):
        assert float(ours.pop("score")) == pytest.approx(float(theirs.pop("score")), abs=2e-6)
        assert ours == theirs


def test_without_settings_evaluation_pictures_are_looked_up_among_the_training_pictures(pretrained, tmp_path):
    with one_device():
        workdir = retrieve(
            pretrained, tmp_path, evaluate__max_train_examples=60, evaluate__max_examples=9, retrieve__pictures=4
        )
    table = table_of(workdir)
    assert len(table) == 90 and table[0]["query"].startswith("digits eval #")
    assert all(row["neighbour"].startswith("digits train #") for row in table)
    data = page_data(workdir)
    assert len(data["queries"]) == 4 and all(item["picture"] for item in data["items"] + data["queries"])


def test_a_table_serves_as_both_sides_even_if_pictures_are_gone(pretrained, folder, tmp_path):
    shutil.copytree(folder / "queries", tmp_path / "pictures")
    settings = dict(init_from=str(pretrained), data__name="image_folder", data__path=str(tmp_path / "pictures"))
    with one_device():
        run_task("features", tmp_path / "table", **settings)
        gone = tmp_path / "pictures" / ODD / HOSTILE
        gone.unlink()
        table = dict(
            retrieve__index=str(tmp_path / "table"), retrieve__queries=str(tmp_path / "table/features.parquet")
        )
        workdir = retrieve(pretrained, tmp_path / "run", retrieve__k=11, **table)
        told = mistake("retrieve", tmp_path / "no", init_from=str(pretrained), evaluate__token="class", **table)
    rows = table_of(workdir)
    assert len(rows) == 12 * 11 and all(row["query"] != row["neighbour"] for row in rows)
    data = page_data(workdir)
    assert [item["name"] for item in data["queries"] if not item["picture"]] == [str(gone)]
    assert "retrieve.index=" in told and "token=mean, here class" in told and "configs/features.py" in told


def test_mistakes_are_told(pretrained, folder, tmp_path):
    assert f"retrieve.index={tmp_path}/none cannot be read" in mistake(
        "retrieve", tmp_path / "a", init_from=str(pretrained), retrieve__index=f"{tmp_path}/none"
    )
    both = dict(retrieve__index=str(folder / "index"), retrieve__queries=str(folder / "queries"))
    told = mistake("retrieve", tmp_path / "b", init_from=str(pretrained), data__name="digits", **both)
    assert "data.name=digits is not used with both" in told


def test_the_page_shows_neighbours_on_a_click_in_a_browser_and_asks_for_nothing(retrieved):
    if not Path(CHROMIUM).exists():
        pytest.skip(f"{CHROMIUM} is missing")
    from playwright.sync_api import sync_playwright

    data, requests, problems, failures = page_data(retrieved), [], [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=180_000)
        page = browser.new_page()
        page.set_default_timeout(120_000)
        page.on("request", lambda request: requests.append(request.url))
        for event in ("console", "pageerror", "dialog"):
            page.on(event, lambda problem: problems.append(str(problem)))
        page.goto(f"file://{retrieved}/neighbours.html")
        loaded = "images => images.every(image => image.complete && image.naturalWidth > 0)"
        hostile = next(n for n, query in enumerate(data["queries"]) if query["name"].endswith(HOSTILE))
        for place in (3, hostile):
            page.locator("#grid button").nth(place).click()
            query = data["queries"][place]
            assert query["name"] in page.locator("#query").inner_text()
            captions = page.locator("#near figure").all_inner_texts()
            assert len(captions) == 6
            for (row, score), caption in zip(query["near"], captions, strict=True):
                item = data["items"][row]
                assert f"{score:.3f}" in caption and item["label"] in caption
                assert Path(item["name"]).name in caption
            assert page.locator("#near img").count() == 6 and page.locator("img").evaluate_all(loaded)
        page.fill("#search", "other")
        assert page.locator("#grid button:visible").count() == 1
        assert page.title() == "Nearest neighbours" and page.locator("body script").count() == 2
        asked = [url for url in requests if not url.startswith("data:")]
        # The policy forbids what the page itself does not do: such a request is seen here, but is not sent.
        page.on("requestfailed", lambda request: failures.append(request.failure))
        page.evaluate("new Image().src = 'http://127.0.0.1:9/x.png'")
        blocked = page.evaluate("fetch('http://127.0.0.1:9/x').then(() => 'sent', () => 'refused')")
        page.wait_for_timeout(500)
        browser.close()
    assert blocked == "refused" and asked == [f"file://{retrieved}/neighbours.html"]
    assert set(failures) <= {"csp"}
    assert all("Content Security Policy" in problem for problem in problems), problems
