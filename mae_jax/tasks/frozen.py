"""The tasks knn, logistic_regression, few_shot and probe_sweep: scores of a frozen encoder."""

import functools
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mae_jax.evaluation.evaluator import EvaluationData, Trained
from mae_jax.evaluation.features import KNN, rankme
from mae_jax.evaluation.few_shot import FewShot
from mae_jax.evaluation.linear_probe import METHODS, LinearProbe
from mae_jax.evaluation.probe_sweep import ProbeSweep
from mae_jax.evaluation.scores import MAIN, TOLD, tell
from mae_jax.models.mae import init_params, make_bind
from mae_jax.runtime.console import say
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.mesh import create
from mae_jax.runtime.seeds import make_key
from mae_jax.runtime.signals import StopSignal
from mae_jax.tasks.measuring import find_sources, open_checkpoint, open_data, write_measurement
from mae_jax.workdir.reporting import provenance
from mae_jax.workdir.writing import finite_or_null, write_csv, write_json


def run(config: ConfigDict, workdir: Path, stop: StopSignal) -> None:
    """Prints what the task measures, and writes result.json."""
    measure = {
        "knn": sweep_knn, "logistic_regression": sweep_logistic_regression, "few_shot": sweep_few_shot,
        "probe_sweep": sweep_probes,
    }  # fmt: skip
    weights, config = open_checkpoint(config, workdir)
    sources = find_sources(weights, config, labelled=True)
    data, state = open_data(weights, config, *sources)
    write_json(workdir / "config.json", config.to_dict() | provenance())
    result, method = measure[config.task](data, state, workdir)
    seen = data.images if config.task == "probe_sweep" else data.description
    protocol = "; ".join(filter(None, [seen, method]))
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

    main = MAIN[data.evaluation.label_kind]

    def measure(data: EvaluationData, state: Trained) -> tuple[dict[str, float], list[dict]]:
        sweep = KNN(data.config, data).sweep(state, ks, temperatures)
        usual = next(r for r in sweep if (r["k"], r["temperature"]) == (settings.knn_k, settings.knn_temperature))
        scores = {f"knn/{name}": usual[name] for name in TOLD if name in usual}
        scores |= {f"knn/best_{name}": value for name, value in max(sweep, key=lambda row: row[main]).items()}
        return scores | {"rankme": rankme(data.features(state, "train")[0])}, sweep

    result, sweep = measure(data, state)
    title, form = TOLD[main]
    say(f"{title + ', k':<13}" + "".join(f"T {temperature:<8}" for temperature in temperatures))
    for k in ks:
        say(f"{k:>8}     " + "".join(f"{format(row[main], form):<10}" for row in sweep if row["k"] == k))
    say(f"k {settings.knn_k}, temperature {settings.knn_temperature}: {title} {result[f'knn/{main}']:{form}}")
    best = f"k {result['knn/best_k']}, temperature {result['knn/best_temperature']}"
    best += f": {title} {result[f'knn/best_{main}']:{form}}"
    say(f"best: {best} (chosen on the evaluation images themselves, so optimistic)")
    if settings.random_encoder:
        scores, _ = measure(*with_random_encoder(data))
        result |= {f"random_encoder/{name}": value for name, value in scores.items()}
        say(f"an encoder with random weights: {title} {scores[f'knn/{main}']:{form}}")
    method = "k-NN: L2-normalised, cosine; best: the best pair on the evaluation images themselves"
    return result | {"sweep": sweep}, method


def sweep_logistic_regression(data: EvaluationData, state: Trained, workdir: Path) -> tuple[dict[str, Any], str]:
    """Logistic regression for each penalty strength (ridge for numbers); returns scores, and the method in words."""
    settings, name, kind = data.config.evaluate, "logistic_regression", data.evaluation.label_kind
    main = MAIN[kind]
    sweep = LinearProbe(data.config, data).sweep(state, sorted({settings.probe_c, *settings.probe_sweep_c}))
    for row in sweep:
        say(f"C {row['c']:<8} {tell(row)}")
    usual, best = next(row for row in sweep if row["c"] == settings.probe_c), max(sweep, key=lambda row: row[main])
    told = f"C {best['c']}: {tell({main: best[main]})}"
    say(f"best: {told} (chosen on the evaluation images themselves, so optimistic)")
    result = {f"{name}/{key}": usual[key] for key in TOLD if key in usual}
    result |= {f"{name}/best_{main}": best[main], f"{name}/best_c": best["c"]}
    if settings.random_encoder:
        other, random_state = with_random_encoder(data)
        (row,) = LinearProbe(data.config, other).sweep(random_state, [settings.probe_c])
        result |= {f"random_encoder/{name}/{key}": row[key] for key in TOLD if key in row}
        say(f"an encoder with random weights, C {row['c']}: {tell(row)}")
    method = {"class": "multinomial logistic regression by L-BFGS"}.get(kind, METHODS[kind])
    return result | {"sweep": sweep}, f"{method}; best: the best C on the evaluation images themselves"


def sweep_few_shot(data: EvaluationData, state: Trained, workdir: Path) -> tuple[dict[str, Any], str]:
    """Least squares on a few images of each class, for each penalty; returns scores, and the method in words."""
    settings, few_shot, result = data.config.evaluate, FewShot(data.config, data), {}
    check_classes(data)
    sweep = few_shot.sweep(state)
    penalties = "".join(f"L2 {penalty:<7g}" for penalty in sorted(settings.shot_penalties))
    say(f"{'top-1, shots':<14}{'by leave-one-out':<18}{penalties}")
    for shots in settings.shots:
        chosen, *others = (row for row in sweep if row["shots"] == shots)
        told = f"{chosen['top1']:.2%} ± {chosen['top1_std']:.2%}"
        say(f"{shots:>8}      {told:<18}" + "".join(f"{row['top1']:<10.2%}" for row in others))
        result |= {f"{shots}_shot/{name}": chosen[name] for name in ("top1", "top1_std")}
    if settings.random_encoder:
        other, random_state = with_random_encoder(data)
        for name, value in FewShot(data.config, other).run(random_state):
            result[f"random_encoder/{name}"] = value
        told = ", ".join(f"{shots} shots {result[f'random_encoder/{shots}_shot/top1']:.2%}" for shots in settings.shots)
        say(f"an encoder with random weights: {told}")
    return result | {"sweep": sweep}, few_shot.protocol


def sweep_probes(data: EvaluationData, state: Trained, workdir: Path) -> tuple[dict[str, Any], str]:
    """Linear probes of layers, tokens and rates, in sweep.csv too; returns scores, and the method in words."""
    settings, result = data.config.evaluate, {}
    check_classes(data)

    def measure(prefix: str, data: EvaluationData, state: Trained) -> list[dict[str, Any]]:
        sweep = ProbeSweep(data.config, data)
        if not prefix:
            say(f"trains {sweep.size}")
        rows = sweep.run(state)
        result.update({f"{prefix}probe_sweep/{name}": value for name, value in rows[0].items()})
        return rows

    rows = measure("", data, state)
    best, rates = rows[0], sorted(settings.probe_sweep_rates)
    write_csv(workdir / "sweep.csv", finite_or_null(rows))
    say(f"{'layers':<16}{'token':<12}{'best rate':<11}{'held-out top-1':<16}top-1")
    for one in sorted({(row["layers"], row["token"]): row for row in reversed(rows)}.values(), key=rows.index):
        scores = f"{one['held_out_top1']:<16.2%}{one['top1']:.2%}"
        say(f"{one['layers']:<16}{one['token']:<12}{one['learning_rate']:<11g}{scores}")
    say(f"the first is chosen, on the held-out training images: {tell(best)} on the evaluation images")
    if best["learning_rate"] in (rates[0], rates[-1]) and len(rates) > 1:
        say("note: its rate is at the end of evaluate.probe_sweep_rates: a wider range may find a better one")
    if settings.random_encoder:
        say(f"an encoder with random weights: {tell(measure('random_encoder/', *with_random_encoder(data))[0])}")
    method = (
        f"linear probes by SGD on standardised features of the named blocks, after the final norm, "
        f"{settings.probe_sweep_epochs:g} epochs, batch {settings.probe_sweep_batch_size}; the best on "
        f"{settings.probe_sweep_held_out:.0%} of each class's training images, on which it has not learned"
    )
    return result | {"sweep": rows}, method


def check_classes(data: EvaluationData) -> None:
    """Raises UserError if the labels are not one class of several."""
    task, kind = data.config.task, data.evaluation.label_kind
    if kind != "class":
        raise UserError(
            f"the task {task} takes labels of the kind class, not {kind}: use configs/logistic_regression.py"
        )
