import math

import jax
import numpy as np
import pytest

from benchmarks import chip_cost, plain_step
from benchmarks.chip_cost import OURS, Program, dearest, default_batch, origin, table
from mae_jax.models.config import SIZES, MAEConfig
from mae_jax.models.mae import abstract_params
from mae_jax.models.parameters import count_parameters
from mae_jax.runtime import hlo
from mae_jax.runtime.chips import CHIPS
from mae_jax.runtime.cost import read_kernels

# Two copies of one line of ours, as unrolled blocks make them, and a larger one of a library's.
TEXT = f"""\
HloModule jit_step

FileNames
1 "{OURS}/benchmarks/chip_cost.py"
2 "{OURS}/mae_jax/models/encoder.py"
3 "{OURS}/mae_jax/models/layers.py"
4 "{OURS}/venv/site-packages/einops/einops.py"

FileLocations
1 {{file_name_id=1 function_name_id=1 line=1}}
2 {{file_name_id=2 function_name_id=1 line=2}}
3 {{file_name_id=3 function_name_id=1 line=3}}
4 {{file_name_id=3 function_name_id=1 line=4}}
5 {{file_name_id=4 function_name_id=1 line=5}}

StackFrames
1 {{file_location_id=1 parent_frame_id=1}}
2 {{file_location_id=2 parent_frame_id=2}}
3 {{file_location_id=3 parent_frame_id=3}}
4 {{file_location_id=4 parent_frame_id=4}}
5 {{file_location_id=5 parent_frame_id=5}}

ENTRY %main (a: f32[1000]) -> f32[1000] {{
  %a = f32[1000]{{0}} parameter(0)
  %big = f32[1500]{{0}} pad(%a, %a), metadata={{op_name="jit(step)/pad"}}
  %one = f32[1000]{{0}} copy(%a), metadata={{op_name="jit(step)/transpose(jvp())/reshape" stack_frame_id=5}}
  ROOT %two = f32[1000]{{0}} copy(%one), metadata={{op_name="jit(step)/transpose(jvp())/reshape" stack_frame_id=5}}
}}
"""


@pytest.fixture
def program():
    module = hlo.parse(TEXT)
    return Program("tiny", module, read_kernels(module), 2**30, 3.0)


def test_a_kernel_is_told_by_the_lines_of_our_two_innermost_files(program):
    instructions = {kernel.instruction.name: kernel.instruction for kernel in program.kernels}
    assert origin(program.module, instructions["one"]) == "layers.py:4 < encoder.py:2 (backward) reshape"
    assert origin(program.module, instructions["big"]) == "? pad"


def test_like_kernels_of_one_line_are_one_row_and_the_dearest_is_first(program):
    rows = dearest(program, CHIPS["h200"])[2:]
    assert [row.split(" | ")[1] for row in rows] == ["2", "1"]
    assert rows[0].endswith("| f32[1000] | one | layers.py:4 < encoder.py:2 (backward) reshape |")


def test_a_program_is_summed_and_what_does_not_fit_is_told(program):
    *_, row = table([program], CHIPS["h200"], batch=8)
    rate = 8 / ((2 * 8000 + 10000) / 4.2e12)
    assert row == f"| tiny | 0.0 | 0.00 | 3 | {rate:,.0f} | 1.0 | 3 |"
    assert table([program._replace(memory=2**40)], CHIPS["h200"], 8)[-1] == "(tiny does not fit into 106 GiB)"


@pytest.mark.parametrize(
    "model, chip, batch",
    [("vit_base", "h200", 512), ("finetune_vit_large", "a100-40", 256), ("vit_huge", "h100", 128),
     ("vit_base", "v6e", 128)],
)  # fmt: skip
def test_a_batch_fits_the_size_of_the_model(model, chip, batch):
    assert default_batch(model, CHIPS[chip]) == batch


@pytest.mark.parametrize("given", ["--model=finetune_vit_base", "--what=features"])
def test_the_control_stands_beside_pre_training_alone(monkeypatch, capsys, given):
    monkeypatch.setattr("sys.argv", ["chip_cost", "--against=plain", given])
    with pytest.raises(SystemExit):
        chip_cost.main()
    assert "--against=plain is a step of pre-training" in capsys.readouterr().err


def test_the_control_has_as_many_parameters_as_the_model():
    config = MAEConfig(**SIZES["base"])
    positions = config.num_patches * (config.width + config.decoder_width)  # ours are constants
    plain = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(plain_step.abstract_params(config)))
    assert plain - positions == count_parameters(abstract_params(config))


def test_the_control_that_predicts_zero_loses_the_variance_of_normalised_patches():
    config = MAEConfig(image_size=16, patch_size=4, width=8, depth=1, num_heads=2, decoder_width=8, decoder_depth=1,
                       decoder_num_heads=2)  # fmt: skip
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), plain_step.abstract_params(config))
    images = rng.integers(0, 256, (2, 16, 16, 3), np.uint8)
    loss_fn = jax.jit(plain_step.make_loss(config, plain_step.xla_attention, scan=True))
    assert loss_fn(params, images, jax.random.key(0)) == pytest.approx(1, abs=1e-3)
