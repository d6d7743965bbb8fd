"""What runs on a GPU or TPU is lowered for it on this machine: no branch of `runtime.platform` is forgotten."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from configs import attentive_probe_digits, digits, finetune_digits, linear_probe_digits
from mae_jax.models.classifier import ClassifierConfig, abstract_variables, make_bind_classifier
from mae_jax.models.config import MAEConfig
from mae_jax.models.mae import abstract_params, make_bind
from mae_jax.objectives.classify import Classification
from mae_jax.objectives.pretrain import Pretraining
from mae_jax.runtime import platform
from mae_jax.training.plan import make_plan
from tests.meshes import device_mesh
from tests.runs import TINY_SETTINGS

# Each option stands in one of the steps.
STEPS = {
    "AdamW, parts, an average": (digits, {"train.accumulate_steps": 2, "train.ema_decay": 0.9}),
    "cross-attention, several masks, Muon": (
        digits,
        {"model.decoder_attention": "cross", "model.masks_per_image": 2, "optimizer.name": "muon"},
    ),
    "mask tokens in the encoder, recomputed blocks, all other options": (
        digits,
        {"model.encoder_mask_tokens": True, "model.remat": True, "model.qk_norm": True, "model.registers": 1,
         "model.class_tokens": 2, "model.uniformity": 0.01, "model.mask_sampling": "block", "train.skip_nonfinite": 1},
    ),
    "fine-tuning": (finetune_digits, {"data.augmentation": "rand_augment", "data.erasing": 0.25}),
    "partial fine-tuning": (finetune_digits, {"classifier.trained_blocks": 0.5}),
    "linear probe with BatchNorm, LARS": (linear_probe_digits, {}),
    "attentive probe of changing pictures": (attentive_probe_digits, {"data.flip": True}),
}  # fmt: skip
AS_ON_CHIPS = {"model.dtype": "bfloat16", "model.scan_unroll": 1}
MODEL = MAEConfig(8, 2, 1, 16, 2, 2, decoder_width=16, decoder_depth=1, decoder_num_heads=2, dtype="bfloat16")
CLASSIFIER = ClassifierConfig(MODEL, 10, "mean_norm", None, True)
IMAGES, NOISE = jax.ShapeDtypeStruct((4, 8, 8, 1), jnp.float32), jax.ShapeDtypeStruct((4, 16), jnp.float32)
AUTOENCODER = make_bind(MODEL), abstract_params(MODEL)
TRAINED_CLASSIFIER = make_bind_classifier(CLASSIFIER), abstract_variables(CLASSIFIER)
CALLS = {
    "reconstruct": (*AUTOENCODER, lambda model, images, noise: model(images, noise=noise)),
    "encode": (*AUTOENCODER, lambda model, images, noise: model.encode(images)),
    "encode what is visible, with attention": (
        *AUTOENCODER,
        lambda model, images, noise: model.encode(images, noise=noise, output_attentions=True),
    ),
    "classify": (*TRAINED_CLASSIFIER, lambda model, images, noise: model(images)),
    "encode with a classifier": (*TRAINED_CLASSIFIER, lambda model, images, noise: model.encode(images)),
}


def lowered(fn, *arguments, chips=("cuda", "tpu")) -> list[str]:
    """The programs of each chip, traced once."""
    traced = jax.jit(fn).trace(*arguments)
    return [traced.lower(lowering_platforms=(chip,)).as_text() for chip in chips]


def lowered_step(module, settings: dict, workdir, **chips) -> list[str]:
    config, mesh = module.get_config(), device_mesh()
    config.update_from_flattened_dict(TINY_SETTINGS | AS_ON_CHIPS | settings)
    objective = (Pretraining if config.task == "pretrain" else Classification)(config, workdir, mesh)
    plan = make_plan(config, objective, mesh)
    return lowered(plan.step_fn, plan.abstract, objective.batch, jax.eval_shape(jax.random.key, 0), **chips)


@pytest.fixture(autouse=True)
def large_inputs(monkeypatch):
    """Attention treats inputs as small as these as it treats large ones."""
    monkeypatch.setattr(platform, "WORTH_GROUPS", 0)


@pytest.mark.parametrize("name", STEPS)
def test_each_training_step_is_lowered_for_gpus_and_tpus_without_the_barriers_of_a_cpu(name, tmp_path):
    module, settings = STEPS[name]
    for text in lowered_step(module, settings, tmp_path):
        # One is before the gradient's norm, and one makes sure that a single block is recomputed.
        assert text.count("optimization_barrier") <= 1 + settings.get("model.remat", False)


def test_on_a_cpu_products_have_barriers(tmp_path):
    (text,) = lowered_step(*STEPS["linear probe with BatchNorm, LARS"], tmp_path, chips=("cpu",))
    assert text.count("optimization_barrier") > 1


def test_a_gpu_s_step_has_the_pallas_kernel_of_attention_forward_and_backward(tmp_path):
    # Its lowering asks for the kind of GPU.
    chip = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H200", None, "cuda"))
    with jax.sharding.use_abstract_mesh(chip):
        (text,) = lowered_step(digits, {"model.attention": "pallas"}, tmp_path, chips=("cuda",))
    assert {"mha_forward", "mha_backward"} <= set(re.findall(r"mha_\w+ward", text)) and "triton" in text


@pytest.mark.parametrize("name", CALLS)
def test_each_use_of_a_trained_model_is_lowered_for_gpus_and_tpus(name):
    bind, variables, call = CALLS[name]
    for text in lowered(lambda variables, *x: call(bind(variables), *x), variables, IMAGES, NOISE):
        assert "bf16" in text and "optimization_barrier" not in text
