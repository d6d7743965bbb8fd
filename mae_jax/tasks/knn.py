"""k-NN classification of frozen features, for each pair of k and temperature."""

from pathlib import Path

from ml_collections import ConfigDict

from mae_jax.evaluation.evaluator import EvaluationData, Trained
from mae_jax.evaluation.neighbours import KNN
from mae_jax.evaluation.rankme import rankme
from mae_jax.runtime.console import say
from mae_jax.runtime.signals import StopSignal
from mae_jax.tasks.measuring import open_encoder, with_random_encoder, write_sweep


def run(config: ConfigDict, workdir: Path, stop: StopSignal) -> None:
    """Prints a table of top-1 accuracies and writes result.json."""
    data, state = open_encoder(config, workdir)
    settings = data.config.evaluate
    ks = sorted({settings.knn_k, *settings.knn_sweep_k})
    temperatures = sorted({settings.knn_temperature, *settings.knn_sweep_temperature})

    def measure(data: EvaluationData, state: Trained) -> tuple[dict[str, float], list[dict]]:
        sweep = KNN(data.config, data).sweep(state, ks, temperatures)
        top1 = {(row["k"], row["temperature"]): row["top1"] for row in sweep}
        scores = {"knn/top1": top1[settings.knn_k, settings.knn_temperature]}
        scores |= {f"knn/best_{name}": value for name, value in max(sweep, key=lambda row: row["top1"]).items()}
        return scores | {"rankme": rankme(data.features(state, "train")[0])}, sweep

    scores, sweep = measure(data, state)
    say("top-1, k     " + "".join(f"T {temperature:<8}" for temperature in temperatures))
    for k in ks:
        say(f"{k:>8}     " + "".join(f"{row['top1']:<10.2%}" for row in sweep if row["k"] == k))
    say(f"k {settings.knn_k}, temperature {settings.knn_temperature}: top-1 {scores['knn/top1']:.2%}")
    best = "k {knn/best_k}, temperature {knn/best_temperature}: top-1 {knn/best_top1:.2%}".format_map(scores)
    say(f"best: {best} (chosen on the evaluation images themselves, so optimistic)")
    result = {"step": state.step} | scores
    if settings.random_encoder:
        scores, _ = measure(*with_random_encoder(data))
        result |= {f"random_encoder/{name}": value for name, value in scores.items()}
        say(f"an encoder with random weights: top-1 {scores['knn/top1']:.2%}")
    method = "k-NN: L2-normalised, cosine; best: the best pair on the evaluation images themselves"
    write_sweep(workdir, data, result, sweep, method)
