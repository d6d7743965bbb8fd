"""Checkpoints of whole training states, by Orbax: written in the background, complete or not there at all."""

import contextlib
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from mae_jax.config import flatten
from mae_jax.errors import UserError, first_line
from mae_jax.training.state import TrainState

# A run goes on only if these settings are as they were: they define the parameters, the objective, or one's place in
# the data. Compute settings among them may differ.
FIXED = (
    "task", "seed", "model.", "classifier.", "data.name", "data.batch_size", "data.seed", "data.label_fraction",
    "optimizer.name", "train.ema_decay", "class_names",
)  # fmt: skip
FREE = ("model.dtype", "model.remat", "model.scan_unroll")


class Checkpoints:
    """The checkpoints/ folder of a workdir: a folder for each saved step.

    In it lie params, opt_state, about (the step and the config), and what the state has of frozen, statistics, average.
    """

    def __init__(self, workdir: Path, settings: ConfigDict, config: dict[str, Any]):
        """Opens or creates the folder. `config` is the run's resolved config, saved with each step."""
        self._config = config
        self._every_steps = settings.every_steps
        options = ocp.CheckpointManagerOptions(
            max_to_keep=settings.keep,
            keep_period=settings.keep_every_steps,
            enable_async_checkpointing=True,
        )
        self._manager = ocp.CheckpointManager(Path(workdir).absolute() / "checkpoints", options=options)

    def latest_step(self) -> int | None:
        """The newest step with a complete checkpoint."""
        return self._manager.latest_step()

    def due(self, step: int) -> bool:
        """Whether a regular save falls on this step."""
        return step > 0 and step % self._every_steps == 0

    def save(self, step: int, state: TrainState) -> None:
        """Starts saving; returns when the state has been copied and may change. A step that is saved is left alone."""
        if step == self.latest_step():
            return
        items = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}
        items["about"] = ocp.args.JsonSave({"step": step, "config": self._config})
        self._manager.save(step, args=ocp.args.Composite(**items))

    def changed_settings(self, step: int) -> dict[str, tuple[Any, Any]]:
        """Settings that differ from those of a saved step: {key: (then, now)}.

        Raises:
          UserError: if a setting that must not change has changed; it names the setting.
        """
        with self._readable(step):
            saved = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore())).about["config"]
        check_fits(saved, self._config, f"checkpoint {step} in {self._manager.directory}")
        return changed_settings(saved, self._config)

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state of a saved step, laid out as `abstract` says.

        Raises:
          UserError: if the checkpoint is damaged.
        """
        items = {name: ocp.args.StandardRestore(tree) for name, tree in _items(abstract).items()}
        with self._readable(step):
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        values = {name: restored[name] for name in items}
        return abstract._replace(step=jax.device_put(jnp.int32(step), abstract.step.sharding), **values)

    def set_aside(self, step: int) -> None:
        """Moves a step whose loss was not finite to checkpoints_set_aside/, so that no run goes on from it."""
        self.wait()
        source = Path(self._manager.directory) / str(step)
        if source.is_dir():
            target = source.parent.with_name("checkpoints_set_aside") / str(step)
            target.parent.mkdir(exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            source.rename(target)
            self._manager.reload()

    def wait(self) -> None:
        """Returns when everything is on disk."""
        self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _readable(self, step: int):
        try:
            yield
        except Exception as error:  # Orbax raises many types for a damaged checkpoint
            raise UserError(
                f"checkpoint {self._manager.directory}/{step} cannot be read ({first_line(error)}); "
                "move it away to go on from the one before it"
            ) from error

    def close(self) -> None:
        """Waits, then frees the background threads."""
        self._manager.close()


def _items(state: TrainState) -> dict[str, Any]:
    """The trees of a state, each an item of the checkpoint, without the empty ones."""
    trees = {name: tree for name, tree in state._asdict().items() if name != "step"}
    return {name: tree for name, tree in trees.items() if name == "opt_state" or tree}


def changed_settings(saved: dict, config: dict) -> dict[str, tuple[Any, Any]]:
    """Settings that differ: {key: (saved value, present value)}; those that did not exist when it was saved do not."""
    old, new = flatten(saved), flatten(config)
    return {key: (value, new.get(key)) for key, value in old.items() if value != new.get(key)}


def check_fits(saved: dict, config: dict, name: str) -> None:
    """Raises UserError if a run with this config cannot go on from a checkpoint that was saved with another."""
    for key, (old, new) in changed_settings(saved, config).items():
        if key.startswith(FIXED) and key not in FREE:
            raise UserError(
                f"{name} does not fit: it has {key}={old!r}, this run {key}={new!r}; "
                f"set --config.{key} back, or start in another --workdir (with --config.init_from to keep the weights)"
            )
