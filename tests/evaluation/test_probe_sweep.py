"""The linear probes that are trained at once, against one at a time in PyTorch."""

import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
from ml_collections import ConfigDict

from mae_jax.data.sources import some_of_each_class
from mae_jax.evaluation import probe_sweep
from mae_jax.evaluation.probe_sweep import STD_FLOOR, ProbeSweep, mean_and_std
from mae_jax.runtime.errors import UserError
from tests.meshes import device_mesh

LAYERS, WIDTH, CLASSES = 2, 6, 3
RATES = (0.01, 0.3)


def clusters(count, seed):
    """(features [N, slots, D] of uneven scales, labels [N])"""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    centres = 0.7 * np.random.default_rng(0).normal(size=(CLASSES, 2 * LAYERS, WIDTH))
    x = centres[labels] + rng.normal(size=(count, 2 * LAYERS, WIDTH))
    return (x * np.logspace(-1, 1, WIDTH) + 3).astype(np.float32), labels


class Pictures(SimpleNamespace):
    def __len__(self):
        return len(self.split[1])


def sweep_of(devices=1, train=None, test=None, **settings):
    """A sweep of the last block and of both, on made up features."""
    sources = [
        Pictures(split=split or clusters(count, count), label_kind="class", num_classes=CLASSES)
        for split, count in ((train, 90), (test, 37))  # devices divide neither
    ]
    evaluate = dict(
        layers=((-1,), (1, 2)), probe_sweep_rates=RATES, probe_sweep_epochs=30.0, probe_sweep_batch_size=128,
        probe_sweep_held_out=0.2,
    )  # fmt: skip
    data = SimpleNamespace(
        train=sources[0], evaluation=sources[1], mesh=device_mesh(devices),
        model=SimpleNamespace(depth=LAYERS, width=WIDTH, class_tokens=1),
        extract=lambda state, source, encode_rows: source.split,
    )  # fmt: skip
    config = ConfigDict({"data": {"seed": 0, "prefetch_batches": 2}, "evaluate": evaluate | settings})
    return ProbeSweep(config, data)


@functools.cache
def usual():
    return sweep_of().run(None)


def by_name(rows):
    return {(row["layers"], row["token"], row["learning_rate"]): row for row in rows}


def test_every_head_is_the_one_that_pytorchs_sgd_finds_alone():
    torch = pytest.importorskip("torch")
    (x, labels), (test, test_labels) = clusters(90, 90), clusters(37, 37)
    held_out = some_of_each_class(labels, lambda _: 6, np.random.default_rng(0))
    fitted = np.setdiff1d(np.arange(90), held_out)
    found = by_name(usual())
    assert len(found) == 2 * 3 * len(RATES)
    mean, std = x[fitted].mean(axis=0), x[fitted].std(axis=0) + STD_FLOOR
    slots = {  # the class token of a block, then the mean of its patches
        ("2", "class"): [2], ("2", "mean"): [3], ("2", "class+mean"): [2, 3],
        ("1+2", "class"): [0, 2], ("1+2", "mean"): [1, 3], ("1+2", "class+mean"): [0, 1, 2, 3],
    }  # fmt: skip
    for (layers, token, rate), row in found.items():
        z, z_held, z_test = (
            torch.tensor(((rows - mean) / std)[:, slots[layers, token]].reshape(len(rows), -1))
            for rows in (x[fitted], x[held_out], test)
        )
        linear = torch.nn.Linear(z.shape[1], CLASSES)
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
        optimizer = torch.optim.SGD(linear.parameters(), lr=rate, momentum=0.9)
        for step in range(30):  # 72 examples fit into one batch, so that their order does not matter
            optimizer.param_groups[0]["lr"] = rate * 72 / 256 * 0.5 * (1 + math.cos(math.pi * step / 30))
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(linear(z), torch.tensor(labels[fitted])).backward()
            optimizer.step()
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(linear(z_held), torch.tensor(labels[held_out]))
            pairs = (z_held, labels[held_out]), (z_test, test_labels)
            right = [(linear(seen).argmax(1).numpy() == y).mean() for seen, y in pairs]
        assert row["held_out_loss"] == pytest.approx(float(loss), rel=1e-4)
        assert (row["held_out_top1"], row["top1"], row["top5"]) == pytest.approx((*right, 1.0))


def test_eight_devices_count_every_image_once_and_choose_the_same():
    one, eight = (sweep_of(devices, probe_sweep_batch_size=24).run(None) for devices in (1, 8))
    for ours, theirs in zip(one, eight, strict=True):
        assert ours.pop("held_out_loss") == pytest.approx(theirs.pop("held_out_loss"), rel=1e-5)
        assert ours == theirs
        for name, count in (("held_out_top1", 18), ("top1", 37)):
            assert ours[name] * count == pytest.approx(round(ours[name] * count), abs=1e-9)


def test_the_evaluation_images_do_not_decide():
    features, labels = clusters(37, 37)
    ours, other = usual(), sweep_of(test=(features, (labels + 1) % CLASSES)).run(None)
    assert list(by_name(ours)) == list(by_name(other)) and ours[0]["top1"] > 0.8 > 0.3 > other[0]["top1"]
    best = max(row["held_out_top1"] for row in ours)
    assert ours[0]["held_out_loss"] == min(row["held_out_loss"] for row in ours if row["held_out_top1"] == best)


def test_a_rate_at_which_a_head_diverges_spoils_no_other_and_comes_last():
    found = sweep_of(probe_sweep_rates=(*RATES, 3e38)).run(None)
    assert all(by_name(found)[name] == row for name, row in by_name(usual()).items())
    diverged = [math.isnan(row["top1"]) for row in found]
    assert any(diverged) and diverged == sorted(diverged)


def test_mean_and_deviation_are_numpys_in_blocks_of_rows(monkeypatch):
    monkeypatch.setattr(probe_sweep, "BLOCK", 7)
    features, rows = clusters(90, 1)[0], np.arange(3, 60, 2)
    mean, std = mean_and_std(features, rows)
    np.testing.assert_allclose(mean, features[rows].mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(std, features[rows].std(axis=0) + STD_FLOOR, rtol=1e-5)


def test_features_that_do_not_fit_and_unknown_blocks_are_refused_in_one_line(monkeypatch):
    with pytest.raises(UserError, match=r"^evaluate.layers: layer 3: the encoder has the blocks 1 to 2, or -2 to -1$"):
        sweep_of(layers=((3,),))
    monkeypatch.setattr(probe_sweep, "KEPT_FEATURES_GIB", 96 * 100 / 2**30)  # 2 blocks x 2 tokens x 6 x 4 bytes
    with pytest.raises(UserError, match=r"127 images and 2 blocks take .* at most 100 images") as error:
        sweep_of()
    assert "\n" not in str(error.value)
    sweep_of(layers=((-1,),))
