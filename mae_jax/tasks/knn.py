"""k-NN classification of frozen features, for each pair of k and temperature."""

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from mae_jax.evaluation.neighbours import KNN
from mae_jax.evaluation.rankme import rankme
from mae_jax.runtime.console import say
from mae_jax.runtime.signals import StopSignal
from mae_jax.tasks.frozen import open_encoder, with_random_encoder
from mae_jax.tasks.measuring import write_measurement


def run(config: ConfigDict, workdir: Path, stop: StopSignal) -> None:
    """Prints a table of top-1 accuracies and writes result.json."""
    data, state = open_encoder(config, workdir)
    settings = data.config.evaluate
    usual = settings.knn_k, settings.knn_temperature
    ks = sorted({settings.knn_k, *settings.knn_sweep_k})
    temperatures = sorted({settings.knn_temperature, *settings.knn_sweep_temperature})

    def measure(data, state) -> tuple[dict[str, float], list[dict]]:
        sweep = KNN(data.config, data).sweep(state, ks, temperatures)
        scores = {"knn/top1": next(row["top1"] for row in sweep if (row["k"], row["temperature"]) == usual)}
        best = max(sweep, key=lambda row: row["top1"])
        scores |= {f"knn/best_{name}": value for name, value in best.items()}
        return scores | {"rankme": rankme(data.features(state, "train")[0])}, sweep

    scores, sweep = measure(data, state)
    say(*draw_table(np.array([row["top1"] for row in sweep]).reshape(len(ks), len(temperatures)), ks, temperatures))
    say(f"k {usual[0]}, temperature {usual[1]}: top-1 {scores['knn/top1']:.2%}")
    best = "k {knn/best_k}, temperature {knn/best_temperature}: top-1 {knn/best_top1:.2%}".format_map(scores)
    say(f"best: {best} (chosen on the evaluation images themselves, so optimistic)")
    result = {"step": state.step} | scores
    if settings.random_encoder:
        random_scores, _ = measure(*with_random_encoder(data))
        result |= {f"random_encoder/{name}": value for name, value in random_scores.items()}
        say(f"an encoder with random weights: top-1 {random_scores['knn/top1']:.2%}")
    protocol = (
        f"{data.description}; k-NN: L2-normalised, cosine; best: the best pair on the evaluation images themselves"
    )
    write_measurement(workdir, data.config, result | {"sweep": sweep, "protocol": protocol})
    say(protocol, f"see {workdir}/result.json")


def draw_table(top1: np.ndarray, ks: list[int], temperatures: list[float]) -> list[str]:
    """Accuracies [ks, temperatures] as lines of text."""
    lines = ["top-1, k     " + "".join(f"T {temperature:<8}" for temperature in temperatures)]
    return lines + [f"{k:>8}     " + "".join(f"{x:<10.2%}" for x in row) for k, row in zip(ks, top1, strict=True)]
