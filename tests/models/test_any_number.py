"""Masks whose number of visible patches is known only at run time, against masks that fix it while compiling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.models.mae import MAEConfig, make_bind
from mae_jax.models.masking import masks_of_any_number
from tests.reference import max_relative, random_batch, random_params

SIZE = dict(image_size=(8, 12), patch_size=4, channels=1, width=16, depth=1, num_heads=2, decoder_width=16)
SIZE |= dict(decoder_depth=1, decoder_num_heads=2)
HIDDEN = np.array([[1, 1, 1, 0, 1, 1], [0, 1, 0, 1, 0, 1], [0, 0, 0, 0, 0, 1]])  # 1, 3 and 5 of 6 patches visible
KINDS = {
    "the paper's": {},
    "two class tokens, registers, cross-attention": dict(class_tokens=2, registers=3, decoder_attention="cross"),
    "mask tokens in the encoder": dict(encoder_mask_tokens=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_program_for_every_number_of_visible_patches_gives_the_numbers_of_one_for_each(kind):
    config = MAEConfig(**SIZE, **KINDS[kind])
    bind, params, images = make_bind(config), random_params(config), random_batch(config, 3)[0]
    run = jax.jit(lambda params, hidden: bind(params)(images, mask=masks_of_any_number(hidden)))
    run(params, 1 - HIDDEN)
    found = run(params, HIDDEN)
    for n, hidden in enumerate(HIDDEN):
        expected = bind(params)(images[n : n + 1], mask=hidden)
        assert max_relative(found.prediction[n], expected.prediction[0]) < 1e-5
        assert found.example_loss[n] == pytest.approx(float(expected.loss), rel=1e-5)
        np.testing.assert_array_equal(found.mask[n], hidden)
        np.testing.assert_array_equal(found.ids_restore[n], expected.ids_restore[0])
    assert run._cache_size() == 1


def test_hidden_patches_get_no_attention_and_do_not_change_the_features():
    config = MAEConfig(**SIZE, registers=1)
    model, images = make_bind(config)(random_params(config)), random_batch(config, 2)[0]
    found = model.encode(images, mask=masks_of_any_number(jnp.asarray(HIDDEN[:2])), output_attentions=True)
    for n, visible in enumerate((1, 3)):
        expected = model.encode(images[n : n + 1], mask=HIDDEN[n], output_attentions=True)
        seen = slice(0, 2 + visible)  # with the class token and the register
        assert max_relative(found.attentions[:, n, :, seen, seen], expected.attentions[:, 0]) < 1e-5
        assert not np.any(found.attentions[:, n, :, :, 2 + visible :])
        assert max_relative(found.features[n, : 1 + visible], expected.features[0]) < 1e-5
