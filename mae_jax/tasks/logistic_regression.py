"""Logistic regression on frozen features, for each penalty strength."""

from pathlib import Path

from ml_collections import ConfigDict

from mae_jax.evaluation.linear_probe import LinearProbe
from mae_jax.runtime.console import say
from mae_jax.runtime.signals import StopSignal
from mae_jax.tasks.measuring import open_encoder, with_random_encoder, write_sweep

NAME = "logistic_regression"


def run(config: ConfigDict, workdir: Path, stop: StopSignal) -> None:
    """Prints the accuracies and writes result.json."""
    data, state = open_encoder(config, workdir)
    settings = data.config.evaluate
    sweep = LinearProbe(data.config, data).sweep(state, sorted({settings.probe_c, *settings.probe_sweep_c}))
    for row in sweep:
        say("C {c:<8} top-1 {top1:.2%}  top-5 {top5:.2%}".format_map(row))
    usual, best = next(row for row in sweep if row["c"] == settings.probe_c), max(sweep, key=lambda row: row["top1"])
    say("best: C {c}: top-1 {top1:.2%} (chosen on the evaluation images themselves, so optimistic)".format_map(best))
    result = {"step": state.step} | {f"{NAME}/{key}": usual[key] for key in ("top1", "top5")}
    result |= {f"{NAME}/best_top1": best["top1"], f"{NAME}/best_c": best["c"]}
    if settings.random_encoder:
        other, random_state = with_random_encoder(data)
        (row,) = LinearProbe(data.config, other).sweep(random_state, [settings.probe_c])
        result |= {f"random_encoder/{NAME}/{key}": row[key] for key in ("top1", "top5")}
        say("an encoder with random weights, C {c}: top-1 {top1:.2%}  top-5 {top5:.2%}".format_map(row))
    method = "multinomial logistic regression by L-BFGS; best: the best C on the evaluation images themselves"
    write_sweep(workdir, data, result, sweep, method)
