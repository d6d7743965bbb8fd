"""k-NN classification of frozen features, for every pair of k and temperature."""

from pathlib import Path

import ml_collections
import numpy as np

from mae_jax.evaluation.neighbours import knn_sweep
from mae_jax.evaluation.rankme import rankme
from mae_jax.evaluation.representations import describe_features
from mae_jax.runtime.console import say
from mae_jax.runtime.signals import StopSignal
from mae_jax.tasks.frozen import FrozenEncoder
from mae_jax.tasks.measuring import write_measurement


def run(config: ml_collections.ConfigDict, workdir: Path, stop: StopSignal) -> None:
    """Prints a table of top-1 accuracies and writes result.json.

    Raises:
      UserError: without a checkpoint, or for pictures without labels.
    """
    frozen = FrozenEncoder(config, workdir)
    settings = frozen.config.evaluate
    ks = sorted({settings.knn_k, *settings.knn_sweep_k})
    temperatures = sorted({settings.knn_temperature, *settings.knn_sweep_temperature})

    def measure(extract) -> tuple[dict, list[dict]]:
        (train, train_labels), (test, test_labels) = (extract(s) for s in (frozen.train_source, frozen.eval_source))
        sweep = knn_sweep(
            train, train_labels, test, test_labels,
            num_classes=frozen.num_classes, ks=ks, temperatures=temperatures, mesh=frozen.mesh,
        )  # fmt: skip
        best = max(sweep, key=lambda row: row["top1"])
        usual = next(r for r in sweep if (r["k"], r["temperature"]) == (settings.knn_k, settings.knn_temperature))
        scores = {"knn/top1": usual["top1"]} | {f"knn/best_{name}": value for name, value in best.items()}
        return scores | {"rankme": rankme(train)}, sweep

    scores, sweep = measure(frozen.extract)
    result = {"step": frozen.step} | scores
    table = draw_table(np.array([row["top1"] for row in sweep]).reshape(len(ks), len(temperatures)), ks, temperatures)
    say(*table.split("\n"))
    say(f"k {settings.knn_k}, temperature {settings.knn_temperature}: top-1 {scores['knn/top1']:.2%}")
    best = "k {knn/best_k}, temperature {knn/best_temperature}: top-1 {knn/best_top1:.2%}".format_map(scores)
    say(f"best: {best} (chosen on the evaluation images themselves, so optimistic)")
    if settings.random_encoder:
        random_scores, _ = measure(frozen.extract_random)
        result |= {f"random_encoder/{name}": value for name, value in random_scores.items()}
        say(f"an encoder with random weights: top-1 {random_scores['knn/top1']:.2%}")
    protocol = describe_features(settings, frozen.train_source, frozen.eval_source)
    protocol = f"{protocol}; k-NN: L2-normalised, cosine; best: the best pair on the evaluation images themselves"
    write_measurement(workdir, frozen.config, result | {"sweep": sweep, "protocol": protocol})
    say(protocol, f"see {workdir}/result.json")


def draw_table(top1: np.ndarray, ks: list[int], temperatures: list[float]) -> str:
    """Accuracies [ks, temperatures] as text."""
    lines = ["top-1, k     " + "".join(f"T {temperature:<8}" for temperature in temperatures)]
    for k, row in zip(ks, top1, strict=True):
        lines.append(f"{k:>8}     " + "".join(f"{value:<10.2%}" for value in row))
    return "\n".join(lines)
