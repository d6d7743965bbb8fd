"""Models of the hub, without a network."""

import os

import pytest

from mae_jax.interop.weights import fetch, find_weights, read_weights
from tests.interop.others import (
    check_same_params,
    facebook_state,
    hugging_face,
    refusal,
)


@pytest.fixture
def hub(monkeypatch):
    """Calls of huggingface_hub.snapshot_download, which `hub["answer"](name)` answers."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    calls = {"asked": [], "answer": None}

    def snapshot_download(name, **options):
        calls["asked"].append((name, options["revision"]))
        return calls["answer"](options["allow_patterns"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_a_model_of_the_hub_is_fetched_and_loaded(hub, write_model):
    path = write_model(*hugging_face())
    hub["answer"] = lambda patterns: str(path.parent)
    check_same_params(read_weights("hf://facebook/vit-mae-base").params, read_weights(path).params)
    assert fetch("hf://owner/name@v1.0") == path.parent
    assert hub["asked"] == [("facebook/vit-mae-base", None), ("owner/name", "v1.0")]


def test_files_of_pytorch_are_fetched_only_if_there_are_no_safetensors(hub, tmp_path):
    def answer(patterns):
        if "pytorch_model*.bin" in patterns:
            (tmp_path / "pytorch_model.bin").touch()
        return str(tmp_path)

    hub["answer"] = answer
    assert fetch("hf://owner/old") == tmp_path and len(hub["asked"]) == 2


def test_without_a_network_it_is_said_what_to_do_in_one_line(hub):
    def answer(patterns):
        raise ConnectionError("name resolution failed\nand more")

    hub["answer"] = answer
    message = refusal("hf://facebook/vit-mae-base")
    assert "hf://facebook/vit-mae-base cannot be downloaded" in message and "name resolution failed" in message


def test_a_model_of_the_hub_without_weights_is_refused(hub, tmp_path):
    hub["answer"] = lambda patterns: str(tmp_path)
    assert "has no weights" in refusal("hf://owner/empty")


@pytest.mark.parametrize("address", ["hf://", "hf://vit-mae-base", "hf://a/b/c", "hf://a/b@", "hf://a b/c", "hf:/x"])
def test_an_address_of_another_form_is_refused_before_anything_is_fetched(hub, address):
    assert "is not of the form hf://owner/name" in refusal(address)
    assert not hub["asked"]


def test_a_path_that_lost_a_slash_is_still_of_the_hub(hub, write_model):
    path = write_model(facebook_state())
    hub["answer"] = lambda patterns: str(path.parent)
    assert find_weights(os.path.normpath("hf://owner/name")) == path.parent
    assert hub["asked"] == [("owner/name", None)]
