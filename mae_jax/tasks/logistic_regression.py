"""Logistic regression on frozen features, for every strength of the penalty."""

from pathlib import Path

import ml_collections
import numpy as np

from mae_jax.evaluation.probes import class_scores, fit_logistic_regression
from mae_jax.evaluation.representations import describe_features
from mae_jax.runtime.console import say
from mae_jax.runtime.signals import StopSignal
from mae_jax.tasks.frozen import FrozenEncoder
from mae_jax.tasks.measuring import write_measurement


def run(config: ml_collections.ConfigDict, workdir: Path, stop: StopSignal) -> None:
    """Prints the accuracies and writes result.json.

    Raises:
      UserError: without a checkpoint, or for pictures without labels.
    """
    frozen = FrozenEncoder(config, workdir)
    settings = frozen.config.evaluate

    def measure(extract, cs) -> list[dict]:
        (train, train_labels), (test, test_labels) = (extract(s) for s in (frozen.train_source, frozen.eval_source))
        rows = []
        for c in cs:
            fitted = fit_logistic_regression(train, train_labels, num_classes=frozen.num_classes, c=c, mesh=frozen.mesh)
            best = np.argsort(-class_scores(test, *fitted), axis=1, kind="stable")[:, :5]
            hits = best == test_labels[:, None]
            rows.append({"c": c, "top1": float(np.mean(hits[:, 0])), "top5": float(np.mean(hits.any(axis=1)))})
        return rows

    sweep = measure(frozen.extract, sorted({settings.probe_c, *settings.probe_sweep_c}))
    usual = next(row for row in sweep if row["c"] == settings.probe_c)
    best = max(sweep, key=lambda row: row["top1"])
    name = "logistic_regression"
    result = {"step": frozen.step} | {f"{name}/{key}": usual[key] for key in ("top1", "top5")}
    result |= {f"{name}/best_top1": best["top1"], f"{name}/best_c": best["c"]}
    for row in sweep:
        say(f"C {row['c']:<8} top-1 {row['top1']:.2%}  top-5 {row['top5']:.2%}")
    say(f"best: C {best['c']}: top-1 {best['top1']:.2%} (chosen on the evaluation images themselves, so optimistic)")
    if settings.random_encoder:
        (row,) = measure(frozen.extract_random, [settings.probe_c])
        result |= {f"random_encoder/{name}/{key}": row[key] for key in ("top1", "top5")}
        say(f"an encoder with random weights, C {row['c']}: top-1 {row['top1']:.2%}  top-5 {row['top5']:.2%}")
    protocol = (
        f"{describe_features(settings, frozen.train_source, frozen.eval_source)}; multinomial logistic regression by "
        "L-BFGS; best: the best C on the evaluation images themselves"
    )
    write_measurement(workdir, frozen.config, result | {"sweep": sweep, "protocol": protocol})
    say(protocol, f"see {workdir}/result.json")
