import argparse
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.inference import Ours, Setup, Theirs, difference, table, write_random
from benchmarks.turns import Turn
from mae_jax.models.config import CHOICES, MAEConfig

ATTENTIONS = tuple(filter(None, CHOICES["attention"]))


class FakeProgram:
    """A process on a chip with bfloat16: ours takes 4 ms, transformers' 8 (eager) and 6."""

    def __init__(self, make, folder, *case, environment=None):
        if make is Setup:
            self.facts = {"device": "1 x chip", "dtypes": ("float32", "bfloat16"), "attention": ATTENTIONS}
            return
        batch, dtype, attention = case
        if (dtype, attention) == ("float32", "cudnn"):
            raise RuntimeError("UserError: half precision | only\nmore")
        self.seconds = {"eager": 0.008, "sdpa": 0.006}.get(attention, 0.004)
        wrong = 1 + 0.01 * (attention == ATTENTIONS[1]) + 1e-6 * (make is Ours)
        self.facts = {"output": (np.array(2.0), np.array([1.0, -4.0]) * wrong)}

    def turn(self, count):
        return Turn(self.seconds, {"processor_seconds": self.seconds / 2})

    def close(self):
        pass


def test_a_row_has_each_program_s_time_or_the_reason_why_it_has_none_and_the_ratio_of_the_fastest():
    asked = argparse.Namespace(model=None, against="transformers", batch=(1, 8), rounds=3, seconds=0.0, clock="wall")
    about, header, rule, *rows = table(asked, Path("scratch"), FakeProgram)
    assert "1 x chip; medians of 3 turns" in about
    names = [f"mae_jax, {name}, ms" for name in ATTENTIONS] + ["transformers, eager, ms", "transformers, sdpa, ms"]
    assert header == f"| batch | precision | {' | '.join(names)} | ratio | difference |"
    exact, half = ([cell.strip() for cell in rows[row].split("|")[1:-1]] for row in (0, 3))
    assert exact[:3] == ["1", "float32", "4.0 (4.0, 4.0)"] and half[:3] == ["8", "bfloat16", "4.0 (4.0, 4.0)"]
    assert exact[3] == "failed: its prediction differs by 1.0e-02 of the largest value"  # bfloat16 may
    assert half[3] == "4.0 (4.0, 4.0)"
    assert exact[2 + ATTENTIONS.index("cudnn")] == "failed: UserError: half precision / only"
    assert exact[-3:] == ["6.0 (6.0, 6.0)", "1.50", "1.0e-02"]
    assert {row.count("|") for row in (header, rule, *rows)} == {len(names) + 5}


def test_without_transformers_there_is_no_ratio_and_the_clock_may_be_the_processor_s():
    asked = argparse.Namespace(model=None, against=None, batch=(2,), rounds=1, seconds=0.0, clock="processor")
    _, header, _, *rows = table(asked, Path("scratch"), FakeProgram)
    assert "transformers" not in header and all(row.endswith("|  |  |") for row in rows)
    assert all(row.split(" | ")[2] == "2.0 (2.0, 2.0)" for row in rows)


def test_on_a_cpu_only_float32_and_the_attention_of_xla_are_timed(tmp_path):
    facts = Setup(tmp_path, write=False).facts
    assert (facts["dtypes"], facts["attention"]) == (("float32",), ("xla",))


def test_with_the_same_weights_pictures_and_masks_both_programs_give_the_same_loss_and_prediction(tmp_path):
    pytest.importorskip("transformers")
    sizes = dict(image_size=16, patch_size=4, width=16, depth=1, num_heads=2)
    model = MAEConfig(**sizes, decoder_width=8, decoder_depth=1, decoder_num_heads=2, normalize_targets=False)
    write_random(tmp_path, model)
    ours, eager, sdpa = (
        make(tmp_path, 2, "float32", attention)
        for make, attention in ((Ours, "xla"), (Theirs, "eager"), (Theirs, "sdpa"))
    )
    assert max(difference(ours, eager), difference(sdpa, eager)) < 2e-6
    moved = SimpleNamespace(facts={"output": (ours.facts["output"][0], ours.facts["output"][1] + 0.1)})
    assert difference(moved, eager) > 0.01
    assert all(0 < program(2)["processor_seconds"] < 10 for program in (ours, eager))
