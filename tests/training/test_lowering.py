"""What runs on a GPU or TPU is lowered for it on this machine: no branch of `runtime.platform` is forgotten."""

import dataclasses

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
from mae_jax.runtime import mesh as mesh_module
from mae_jax.runtime import platform
from mae_jax.training.plan import make_plan
from tests.meshes import device_mesh
from tests.runs import TINY_SETTINGS

# Each option stands in one of the steps.
STEPS = {
    "AdamW, parts, an average, mask tokens in the encoder, recomputed blocks": (
        digits,
        {"train.accumulate_steps": 2, "train.ema_decay": 0.9, "model.encoder_mask_tokens": True, "model.remat": True,
         "model.qk_norm": True, "model.registers": 1, "model.class_tokens": 2, "model.mask_sampling": "block"},
    ),
    "Muon, cross-attention, several masks": (
        digits,
        {"optimizer.name": "muon", "train.skip_nonfinite": 1, "model.decoder_attention": "cross",
         "model.masks_per_image": 2, "model.uniformity": 0.01},
    ),
    "fine-tuning": (finetune_digits, {"data.augmentation": "rand_augment", "data.erasing": 0.25}),
    "partial fine-tuning": (finetune_digits, {"classifier.trained_blocks": 0.5}),
    "linear probe with BatchNorm, LARS": (linear_probe_digits, {}),
    "attentive probe of changing pictures": (attentive_probe_digits, {"data.flip": True}),
}  # fmt: skip
# As on these chips, with heads as wide as the kernels need.
AS_ON_CHIPS = {
    "model.dtype": "bfloat16", "model.remat": False, "model.scan_unroll": 1, "model.num_heads": 1,
    "model.decoder_num_heads": 1,
}  # fmt: skip
ATTENTION = {"cuda": "pallas", "tpu": "xla", "cpu": "xla"}  # what these platforms' chips take with bfloat16
FORWARD, BACKWARD = (f'name = "{name}"' for name in ("attention", "attention_gradient"))  # of the GPU's kernels
H200 = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H200", None, "cuda"))  # kernels ask for the chip

MODEL = MAEConfig(8, 2, 1, 16, 2, 1, decoder_width=16, decoder_depth=1, decoder_num_heads=1, dtype="bfloat16")
IMAGES, NOISE = jax.ShapeDtypeStruct((4, 8, 8, 1), jnp.float32), jax.ShapeDtypeStruct((4, 16), jnp.float32)
CALLS = {
    "reconstruct": lambda model, images, noise: model(images, noise=noise),
    "encode": lambda model, images, noise: model.encode(images),
    "encode what is visible, with attention": lambda model, images, noise: model.encode(
        images, noise=noise, output_attentions=True
    ),
    "classify": lambda model, images, noise: model(images),
    "encode with a classifier": lambda model, images, noise: model.encode(images),
}


@pytest.fixture(autouse=True)
def large_inputs(monkeypatch):
    """Attention treats inputs as small as these as it treats large ones."""
    monkeypatch.setattr(platform, "WORTH_GROUPS", 0)


def lowered(chip: str, fn, *arguments) -> str:
    """The program of a platform that this machine lacks."""
    with jax.sharding.use_abstract_mesh(H200 if chip == "cuda" else AbstractMesh((), ())):
        return jax.jit(fn).trace(*arguments).lower(lowering_platforms=(chip,)).as_text()


def lowered_step(chip: str, name: str, workdir, monkeypatch) -> str:
    monkeypatch.setattr(mesh_module, "fitting_attention", lambda *_: ATTENTION[chip])
    module, settings = STEPS[name]
    config, mesh = module.get_config(), device_mesh()
    config.update_from_flattened_dict(TINY_SETTINGS | AS_ON_CHIPS | settings)
    objective = (Pretraining if config.task == "pretrain" else Classification)(config, workdir, mesh)
    plan = make_plan(config, objective, mesh)
    return lowered(chip, plan.step_fn, plan.abstract, objective.batch, jax.eval_shape(jax.random.key, 0))


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("chip", ["cuda", "tpu"])
def test_each_training_step_is_lowered_for_gpus_and_tpus_with_their_attention(chip, name, tmp_path, monkeypatch):
    text = lowered_step(chip, name, tmp_path, monkeypatch)
    # On a CPU products have barriers. Here one is before the gradient's norm, one makes a single block be recomputed.
    assert text.count("optimization_barrier") <= 1 + STEPS[name][1].get("model.remat", False)
    has_blocks = "BatchNorm" not in name  # that probe's features are computed once, before
    assert (FORWARD in text) == (chip == "cuda" and has_blocks)
    assert (BACKWARD in text) == (chip == "cuda" and "probe" not in name)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("chip", ["cuda", "tpu"])
def test_each_use_of_a_trained_model_is_lowered_for_gpus_and_tpus(chip, name):
    model = dataclasses.replace(MODEL, attention=ATTENTION[chip])
    bind, variables = make_bind(model), abstract_params(model)
    if "classif" in name:
        classifier = ClassifierConfig(model, 10, "mean_norm", None, True)
        bind, variables = make_bind_classifier(classifier), abstract_variables(classifier)
    text = lowered(chip, lambda variables, *x: CALLS[name](bind(variables), *x), variables, IMAGES, NOISE)
    assert "bf16" in text and "optimization_barrier" not in text and (FORWARD in text) == (chip == "cuda")
