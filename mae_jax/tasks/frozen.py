"""The tasks knn, logistic_regression and features: scores of a frozen encoder, or its features on disk."""

import contextlib
import functools
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mae_jax.evaluation.evaluator import EvaluationData, Trained
from mae_jax.evaluation.features import KNN, LinearProbe, rankme
from mae_jax.models.mae import init_params, make_bind
from mae_jax.runtime.console import say
from mae_jax.runtime.errors import escaped
from mae_jax.runtime.mesh import create
from mae_jax.runtime.processes import is_main
from mae_jax.runtime.seeds import make_key
from mae_jax.runtime.signals import StopSignal
from mae_jax.tasks.measuring import find_sources, open_checkpoint, open_data, write_measurement
from mae_jax.workdir.reporting import provenance
from mae_jax.workdir.writing import replacing, write_json


def run(config: ConfigDict, workdir: Path, stop: StopSignal) -> None:
    """Prints what the task measures, and writes result.json."""
    measure = {"knn": sweep_knn, "logistic_regression": sweep_logistic_regression, "features": write_features}
    weights, config = open_checkpoint(config, workdir)
    sources = find_sources(weights, config, labelled=config.task != "features")
    data, state = open_data(weights, config, *sources)
    write_json(workdir / "config.json", config.to_dict() | provenance())
    result, method = measure[config.task](data, state, workdir)
    protocol = "; ".join(filter(None, [data.description, method]))
    write_measurement(workdir, data.config, {"step": state.step} | result | {"protocol": protocol})
    say(protocol, f"see {workdir}/result.json")


def with_random_encoder(data: EvaluationData) -> tuple[EvaluationData, Trained]:
    """The same images, and a randomly initialised encoder of the same size."""
    data.forget()
    params = create(functools.partial(init_params, data.model), make_key(data.config.seed, "init"), data.mesh)
    bind = make_bind(data.model)
    return EvaluationData(data.config, bind, data.mesh, data.train, data.evaluation), Trained(0, params, "random")


def sweep_knn(data: EvaluationData, state: Trained, workdir: Path) -> tuple[dict[str, Any], str]:
    """k-NN for each pair of k and temperature; returns scores, and the method in words."""
    settings = data.config.evaluate
    ks = sorted({settings.knn_k, *settings.knn_sweep_k})
    temperatures = sorted({settings.knn_temperature, *settings.knn_sweep_temperature})

    def measure(data: EvaluationData, state: Trained) -> tuple[dict[str, float], list[dict]]:
        sweep = KNN(data.config, data).sweep(state, ks, temperatures)
        top1 = {(row["k"], row["temperature"]): row["top1"] for row in sweep}
        scores = {"knn/top1": top1[settings.knn_k, settings.knn_temperature]}
        scores |= {f"knn/best_{name}": value for name, value in max(sweep, key=lambda row: row["top1"]).items()}
        return scores | {"rankme": rankme(data.features(state, "train")[0])}, sweep

    result, sweep = measure(data, state)
    say("top-1, k     " + "".join(f"T {temperature:<8}" for temperature in temperatures))
    for k in ks:
        say(f"{k:>8}     " + "".join(f"{row['top1']:<10.2%}" for row in sweep if row["k"] == k))
    say(f"k {settings.knn_k}, temperature {settings.knn_temperature}: top-1 {result['knn/top1']:.2%}")
    best = "k {knn/best_k}, temperature {knn/best_temperature}: top-1 {knn/best_top1:.2%}".format_map(result)
    say(f"best: {best} (chosen on the evaluation images themselves, so optimistic)")
    if settings.random_encoder:
        scores, _ = measure(*with_random_encoder(data))
        result |= {f"random_encoder/{name}": value for name, value in scores.items()}
        say(f"an encoder with random weights: top-1 {scores['knn/top1']:.2%}")
    method = "k-NN: L2-normalised, cosine; best: the best pair on the evaluation images themselves"
    return result | {"sweep": sweep}, method


def sweep_logistic_regression(data: EvaluationData, state: Trained, workdir: Path) -> tuple[dict[str, Any], str]:
    """Logistic regression for each penalty strength; returns scores, and the method in words."""
    settings, name = data.config.evaluate, "logistic_regression"
    sweep = LinearProbe(data.config, data).sweep(state, sorted({settings.probe_c, *settings.probe_sweep_c}))
    for row in sweep:
        say("C {c:<8} top-1 {top1:.2%}  top-5 {top5:.2%}".format_map(row))
    usual, best = next(row for row in sweep if row["c"] == settings.probe_c), max(sweep, key=lambda row: row["top1"])
    say("best: C {c}: top-1 {top1:.2%} (chosen on the evaluation images themselves, so optimistic)".format_map(best))
    result = {f"{name}/{key}": usual[key] for key in ("top1", "top5")}
    result |= {f"{name}/best_top1": best["top1"], f"{name}/best_c": best["c"]}
    if settings.random_encoder:
        other, random_state = with_random_encoder(data)
        (row,) = LinearProbe(data.config, other).sweep(random_state, [settings.probe_c])
        result |= {f"random_encoder/{name}/{key}": row[key] for key in ("top1", "top5")}
        say("an encoder with random weights, C {c}: top-1 {top1:.2%}  top-5 {top5:.2%}".format_map(row))
    method = "multinomial logistic regression by L-BFGS; best: the best C on the evaluation images themselves"
    return result | {"sweep": sweep}, method


def write_features(data: EvaluationData, state: Trained, workdir: Path) -> tuple[dict[str, Any], str]:
    """Writes {train,eval}_features.npy [N, D] float32 and {train,eval}_labels.npy [N] (-1: no label), all or none."""
    result, written = {}, []
    with contextlib.ExitStack() as files:
        for split, source in (("train", data.train), ("eval", data.evaluation)):
            if source is None:
                continue
            shape, out = (len(source), data.model.width), None
            if is_main():
                features = files.enter_context(replacing(workdir / f"{split}_features.npy"))
                out = np.lib.format.open_memmap(features, mode="w+", dtype=np.float32, shape=shape)
            _, labels = data.extract(state, source, out)
            if is_main():
                out.flush()
                with files.enter_context(replacing(workdir / f"{split}_labels.npy")).open("wb") as file:
                    np.save(file, labels)
            result[f"{split}_features"] = list(shape)
            written += [f"wrote {workdir}/{split}_{kind}.npy" for kind in ("features", "labels")]
        if data.train is None and is_main():
            for kind in ("features", "labels"):
                (workdir / f"train_{kind}.npy").unlink(missing_ok=True)
    say(*written)
    names = data.evaluation.class_names
    return result | {"class_names": names and [escaped(name) for name in names]}, ""
