"""The operations that a run reports (train_flops x batch) against XLA's count of the whole compiled step."""

import functools
from pathlib import Path

import jax
import pytest

from configs.common import get_config
from mae_jax.objectives.pretrain import Pretraining
from mae_jax.training.plan import compile_train_step, make_plan
from tests.meshes import device_mesh

BATCH = 32


@functools.cache
def counts(batch: int, remat: bool = False, unroll: int = 2) -> tuple[float, float]:
    """(XLA's count, ours) of the step as a run compiles it: flips, masks, forward, backward, AdamW.

    The blocks are unrolled, since XLA counts a loop's body once; they are wide, so that norms, softmax and GELU, which
    grow with the width and not with its square, are small beside their products.
    """
    config, mesh = get_config(), device_mesh(1)
    config.model.update(image_size=128, width=384, depth=2, num_heads=6, decoder_width=256, decoder_depth=2,
                        decoder_num_heads=4, scan_unroll=unroll, remat=remat)  # fmt: skip
    config.data.update(name="synthetic", batch_size=batch)
    objective = Pretraining(config, Path("nowhere"), mesh)
    plan = make_plan(config, objective, mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    compiled = compile_train_step(plan.step_fn, plan.abstract, objective.batch, key, mesh)
    return compiled.cost_analysis()["flops"], objective.train_flops(objective.model.image_size) * batch


@pytest.mark.slow
def test_the_operations_of_a_whole_training_step_are_those_that_xla_counts():
    whole, ours = counts(BATCH)
    assert ours == pytest.approx(whole, rel=0.02)
    # An update of AdamW and the gradient's norm take some operations a parameter, however many images there are. What
    # a larger batch has more is the images' alone, and the rest is less than a hundredth of it.
    smaller, _ = counts(BATCH // 2)
    per_image = (whole - smaller) / (BATCH // 2)
    assert ours / BATCH == pytest.approx(per_image, rel=0.02)
    assert 0 < whole - BATCH * per_image < 0.01 * ours


@pytest.mark.slow
def test_what_remat_repeats_is_work_for_xla_but_not_for_us():
    # In loops: of blocks that are unrolled XLA merges a part of what remat repeats with what it repeats.
    (plain, ours), (remat, ours_with_remat) = (counts(BATCH, remat, unroll=1) for remat in (False, True))
    assert ours_with_remat == ours
    assert remat > 1.15 * plain
