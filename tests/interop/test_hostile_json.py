"""JSON of other programs with absurd content: one line, at once, and no memory is asked for."""

import copy
import json

import pytest

import mae_jax
from mae_jax.interop.formats import export
from mae_jax.interop.tensors import LARGEST_JSON
from mae_jax.interop.weights import read_weights
from mae_jax.models.config import MAEConfig
from mae_jax.runtime.errors import UserError
from tests.interop.others import hugging_face, our_classifier, our_weights, refusal

DEEP = "[" * 3000 + "]" * 3000
ABSURD = [
    "1" * 400, "-" + "1" * 400, "1" * 5000, "1e999", "-1e999", "NaN", "1e-300", "1e308", str(2**40), str(2**63), "0",
    "-1", "2.5", "true", "null", '""', '"a\\nb"', "[]", "{}", "[null]", '["x"]', '[[1, 2], [3]]', '{"0": 3}', DEEP,
    f"[{'1' * 400}, 20]", f'{{"height": {"1" * 400}, "width": 2}}', "[1e999, 1e999, 1e999]", "[true, true, true]",
]  # fmt: skip


def places_in(value, path=()):
    """All keys and indices of nested dicts and lists, as paths."""
    for key in value if isinstance(value, dict) else range(len(value) if isinstance(value, list) else 0):
        yield (*path, key)
        yield from places_in(value[key], (*path, key))


def with_raw(value, path, raw):
    """The JSON of a value in which one part is the text `raw`."""
    value = copy.deepcopy(value)
    part = value
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = "@@"
    return json.dumps(value).replace('"@@"', raw)


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Folders of each format that has JSON, by a name."""
    kinds = {
        "autoencoder": (our_weights(), "huggingface"),
        "classifier": (our_classifier("class"), "huggingface"),
        "timm": (our_classifier("mean"), "timm"),
    }
    folders = {}
    for name, (weights, format) in kinds.items():
        folders[name] = tmp_path_factory.mktemp(name)
        export(weights, folders[name], format)
    return folders


@pytest.mark.parametrize(
    "kind, file",
    [
        ("autoencoder", "config.json"), ("autoencoder", "preprocessor_config.json"), ("classifier", "config.json"),
        ("timm", "config.json"),
    ],
)  # fmt: skip
def test_whatever_value_is_absurd_it_is_refused_in_one_line_or_makes_no_difference(exports, kind, file):
    folder, refused = exports[kind], 0
    whole = (folder / file).read_text()
    usual = read_weights(folder)
    model = MAEConfig(**usual.config["model"])
    try:
        for number, path in enumerate(places_in(json.loads(whole))):
            for raw in ABSURD[number % 4 :: 4]:  # a quarter each, for speed
                (folder / file).write_text(with_raw(json.loads(whole), path, raw))
                try:
                    found = read_weights(folder)
                except UserError as error:
                    assert "\n" not in str(error), (path, raw[:50])
                    refused += 1
                    continue
                assert MAEConfig(**found.config["model"]).grid == model.grid
                data = found.config["data"]
                mae_jax.Processor(model.image_size, 3, data["mean"], data["std"], data["eval_crop"])
                json.dumps(found.config | {"notes": found.notes}, allow_nan=False)
    finally:
        (folder / file).write_text(whole)
    assert refused > 10


@pytest.mark.parametrize("digits", [20, 400, 5000])
@pytest.mark.parametrize("name", ["image_size", "hidden_size", "num_hidden_layers", "layer_norm_eps", "norm_pix_loss"])
def test_an_integer_of_many_digits_is_refused_where_it_counts(write_model, name, digits):
    path = write_model(*hugging_face())
    (path.parent / "config.json").write_text(with_raw(hugging_face()[1], (name,), "1" * digits))
    if name == "layer_norm_eps" and digits == 20:
        return  # no whole number is asked for, and float32 holds it
    words = {"image_size": "model.image_size", "norm_pix_loss": "is no bool", "num_hidden_layers": "depth"}
    usual = {"hidden_size": "width", "layer_norm_eps": "norm_epsilon"}
    text = refusal(path.parent)
    assert "is not readable JSON" in text if digits == 5000 else (words | usual)[name] in text


def test_a_step_beyond_all_counting_is_not_believed(write_model):
    path = write_model(*hugging_face())
    (path.parent / "config.json").write_text(json.dumps(hugging_face()[1])[:-1] + f', "step": {"1" * 400}}}')
    assert read_weights(path.parent).step == 0


def test_a_json_file_too_large_to_be_one_is_refused_unread(write_model):
    path = write_model(*hugging_face())
    for name in ("config.json", "preprocessor_config.json"):
        whole = (path.parent / name).read_bytes() if (path.parent / name).exists() else None
        with (path.parent / name).open("wb") as file:
            file.truncate(LARGEST_JSON + 1 + 2**40)  # sparse
        assert f"{name} is not readable JSON (an object of at most {LARGEST_JSON:,} bytes)" in refusal(path.parent)
        (path.parent / name).write_bytes(whole or b"{}")


def test_an_index_of_shards_is_read_as_carefully(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(f'{{"metadata": {{"total_size": 5}}, "weight_map": {{"w": {"1" * 400}}}}}')
    assert "has no weight_map from names of tensors" in refusal(tmp_path)
    with index.open("wb") as file:
        file.truncate(2**40)
    assert "is not readable JSON (an object of at most" in refusal(tmp_path)
