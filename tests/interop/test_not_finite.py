"""NaN and infinity in weights: one line that names the tensor, wherever the weights come from and go to."""

import jax
import numpy as np
import pytest

import mae_jax
from mae_jax.interop.formats import export
from mae_jax.interop.transfer import find_start, fitting_params
from mae_jax.interop.weights import read_weights
from mae_jax.runtime.errors import UserError
from mae_jax.training.step import TrainState
from mae_jax.workdir.checkpoints import Checkpoints
from tests.interop.others import ASKED, facebook_state, hugging_face, our_classifier, refusal, save_torch
from tests.interop.test_transfer import small
from tests.reference import random_params


def spoilt(state, name, value=np.nan):
    values = state[name].copy()
    values.flat[values.size // 3] = value
    return state | {name: values}


@pytest.mark.parametrize("name", facebook_state())
def test_whatever_tensor_of_a_file_is_not_finite_it_is_named(write_model, name):
    message = refusal(write_model(spoilt(facebook_state(), name)), **ASKED)
    assert f"model.safetensors: tensor {name} holds NaN or infinity" in message


@pytest.mark.parametrize(
    "name",
    [
        "vit.encoder.layer.1.attention.attention.key.weight", "vit.encoder.layer.0.attention.attention.value.bias",
        "vit.embeddings.position_embeddings", "decoder.mask_token", "vit.layernorm.bias",
    ],
)  # fmt: skip
def test_a_tensor_of_hugging_face_is_named_as_in_its_file(write_model, name):
    state, config = hugging_face()
    assert f"tensor {name} holds NaN" in refusal(write_model(spoilt(state, name, np.inf), config))


def test_the_first_of_several_is_named_and_so_is_a_value_that_float32_does_not_hold(tmp_path):
    state = {name: values.astype(np.float64) for name, values in facebook_state().items()}
    path = save_torch(tmp_path / "model.pth", {"model": spoilt(state, "blocks.0.mlp.fc1.weight", 1e300)})
    assert "tensor blocks.0.mlp.fc1.weight holds NaN or infinity (in float32)" in refusal(path, **ASKED)
    both = spoilt(spoilt(state, "patch_embed.proj.bias"), "norm.weight")
    path = save_torch(tmp_path / "model.pth", {"model": both})
    assert "tensor norm.weight holds" in refusal(path, **ASKED)


def test_a_tensor_that_no_parameter_takes_may_hold_what_it_likes(write_model):
    with pytest.warns(UserWarning, match="left over: extra"):
        mae_jax.load(write_model(facebook_state() | {"extra": np.full(3, np.nan, np.float32)}), **ASKED)


def test_statistics_of_a_classifier_count_too(tmp_path):
    weights = our_classifier("class", batch_norm=True)
    weights.params["head"]["batch_norm"]["variance"][2] = np.inf
    export(weights, tmp_path, "facebook")
    assert "tensor head.0.running_var holds NaN or infinity" in refusal(tmp_path)


# ----------------------------------------------------------------------------------------------------- our workdirs


@pytest.fixture(scope="module")
def dead(tmp_path_factory):
    """A workdir whose checkpoint 12 is in order, and 20 holds a NaN."""
    config, folder = small("pretrain"), tmp_path_factory.mktemp("dead")
    params = random_params(mae_jax.MAEConfig(**config.model))
    checkpoints = Checkpoints(folder, config.checkpoint, config.to_dict())
    for step in (12, 20):
        if step == 20:
            params["encoder"]["blocks"]["mlp"]["fc1"]["kernel"][1, 0, 3] = np.nan
        checkpoints.save(step, TrainState(np.int32(step), jax.tree.map(np.array, params), {"count": np.int32(step)}))
        checkpoints.wait()
    checkpoints.close()
    return folder


@pytest.mark.parametrize("name", ["load", "pre-training", "classification"])
def test_a_checkpoint_with_a_nan_is_refused_by_all_that_begin_with_it(dead, tmp_path, name):
    config = small()
    config.init_from = str(dead)
    begin = {
        "load": lambda: mae_jax.load(dead),
        "pre-training": lambda: fitting_params(read_weights(dead), small("pretrain").to_dict()),
        "classification": lambda: find_start(config, tmp_path),
    }
    with pytest.raises(UserError) as error:
        begin[name]()
    assert str(error.value) == (
        f"checkpoint {dead}/checkpoints/20: encoder/blocks/mlp/fc1/kernel holds NaN or infinity; its training had "
        f"failed; take an earlier one, such as {dead}/checkpoints/12"
    )
    mae_jax.load(dead / "checkpoints" / "12")
