"""Checkpoints of whole training states, by Orbax: written in the background, complete or not there at all.

Each has a manifest of its files, so that one that was damaged later is found; the one before it is used then. A save
that fails, most often for lack of space, is told and leaves nothing behind; the next one is tried as if it were the
first.
"""

import contextlib
import itertools
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from mae_jax.runtime.console import say
from mae_jax.runtime.errors import NotSaved, UserError, first_line, reason
from mae_jax.runtime.mesh import put
from mae_jax.runtime.processes import from_main, is_main, wait_for_all
from mae_jax.training.state import TrainState
from mae_jax.workdir.checksums import find_damage, has_manifest, write_manifest
from mae_jax.workdir.fitting import changed_settings, check_fits
from mae_jax.workdir.orbax_noise import silence_orbax

LAYOUT = 2  # of the parameters; 1 (not noted): queries, keys and values side by side in their kernel


class Checkpoints:
    """The checkpoints/ folder of a workdir: a folder for each saved step.

    In it lie params, opt_state, about (the step and the config), what the state has of frozen, statistics, average; and
    the manifest.
    """

    def __init__(self, workdir: Path, settings: ConfigDict, config: dict[str, Any]):
        """Opens or creates the folder. `config` is the run's resolved config, saved with each step."""
        self._config = config
        self._settings = settings
        self._folder = Path(workdir).absolute() / "checkpoints"
        self._being_saved: int | None = None
        self._failed: tuple[int, str] | None = None  # the last save: step and reason, if it has failed
        self._swept = True  # whether nothing half written can lie about
        self._seconds: list[float] = []  # that the loop stood still for, one for each save
        silence_orbax()
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._settings.keep,
            keep_period=self._settings.keep_every_steps,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,  # what was being written when a run was killed or the disk was full
            lightweight_initialize=True,  # what else it would read may be damaged
            async_options=ocp.AsyncOptions(
                post_finalization_callback=self._list_files,
                # Otherwise, if one cannot be created, threads wait minutes for it, and the program for them.
                create_directories_asynchronously=False,
            ),
        )
        return ocp.CheckpointManager(self._folder, options=options)

    def latest_step(self) -> int | None:
        """The newest step with a complete checkpoint, or one that is being written."""
        return self._manager.latest_step()

    def newest_whole(self) -> int | None:
        """The newest step whose checkpoint is as it was written; None if there is no checkpoint.

        Damaged ones that are newer are moved to checkpoints_set_aside/, and each is told.

        Raises:
          UserError: if none is whole, or one was saved with settings that do not fit. Then nothing is moved.
        """
        damaged = {}
        for step in from_main(sorted(self._manager.all_steps(), reverse=True)):
            wrong, about = from_main(self._examine(step) if is_main() else None)
            if wrong is None:
                self._check_fits(step, about)
                for other, why in damaged.items():
                    moved = self._move_aside(other)
                    say(f"checkpoint {other} is damaged: {why}; moved to {moved}, going on from checkpoint {step}")
                return step
            damaged[step] = wrong
        if damaged:
            newest = max(damaged)
            raise UserError(
                f"no checkpoint in {self._folder} is whole; the newest, {newest}: {damaged[newest]}. Put back a copy, "
                "or start again in another --workdir"
            )
        return None

    def _examine(self, step: int) -> tuple[str | None, dict[str, Any] | None]:
        """What is wrong with a step's files, if anything, and what is noted about it."""
        folder = self._folder / str(step)
        wrong, about = find_damage(folder), None
        try:
            about = json.loads((folder / "about" / "metadata").read_text())
        except (OSError, ValueError) as error:
            return wrong or first_line(error), None
        # An earlier version listed no files; its checkpoints are refused by their layout.
        is_earlier = isinstance(about, dict) and "layout" not in about and not has_manifest(folder)
        return (None if is_earlier else wrong), about

    def due(self, step: int) -> bool:
        """Whether a regular save falls on this step."""
        return step > 0 and step % self._settings.every_steps == 0

    def save(self, step: int, state: TrainState) -> float | None:
        """Starts saving; returns when the state has been copied and may change. A step that is saved is left alone.

        If it fails, `check` tells it, or the next save, or `wait` raises it.

        Returns:
          For how many seconds the caller stood still; None for a step that is saved.
        """
        start = time.perf_counter()
        self._finish()
        self._tell_failure()
        if step == self.latest_step():
            return None
        items = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}
        about = {
            "step": step,
            "skipped": int(state.skipped),
            "layout": LAYOUT,
            "config": self._config,
        }
        items["about"] = ocp.args.JsonSave(about)
        self._being_saved = step
        try:
            self._manager.save(step, args=ocp.args.Composite(**items))
        except Exception as error:
            self._give_up(error)
        seconds = time.perf_counter() - start
        self._seconds.append(seconds)
        return seconds

    def summary(self) -> str:
        """A line on the saves so far; empty if there were none."""
        count, total = len(self._seconds), sum(self._seconds)
        if not count:
            return ""
        return f"saved {count} checkpoints; the loop waited {total:.2f} s for them, {total / count:.3f} s each"

    def check(self) -> None:
        """Tells of a save that has failed in the background, as soon as this is called after it."""
        if jax.process_count() > 1:  # which would find it at different steps, but must open the folder again together
            return
        if self._being_saved is not None and not self._manager.is_saving_in_progress():
            self._finish()
            self._tell_failure()
        elif self._being_saved is None and not self._swept:
            self._sweep()

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
          NotSaved: if the last save has failed.
        """
        self._finish()
        if self._failed:
            (step, why), self._failed = self._failed, None
            raise self._not_saved(step, why)

    def _not_saved(self, step: int, why: str) -> NotSaved:
        latest = self.latest_step()
        start = f"from checkpoint {latest}" if latest else "from the beginning"
        return NotSaved(
            f"checkpoint {step} cannot be saved: {why}; free space in {self._folder} or mend what else is wrong "
            f"there, the same command goes on {start}"
        )

    def _list_files(self) -> None:
        """Orbax's background thread calls it when the files are written, before it gives the folder its final name."""
        [folder] = self._folder.glob(f"{self._being_saved}.orbax-checkpoint-tmp*")
        write_manifest(folder, skip=["_CHECKPOINT_METADATA"])  # the time is written into it after this

    def _finish(self) -> None:
        """Waits for the save in the background."""
        step = self._being_saved
        if step is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._give_up(error)
            return
        self._being_saved, self._failed, self._swept = None, None, True
        self._complete_manifest(step)

    def _complete_manifest(self, step: int) -> None:
        """Lists what is not listed yet: what Orbax adds last, or everything in a folder of an earlier version."""
        with contextlib.suppress(OSError):  # without it nothing is lost but a check
            if is_main():
                write_manifest(self._folder / str(step))

    def _give_up(self, error: Exception) -> None:
        """Leaves a save that has failed. Its files are deleted, and Orbax's list of what there is is made again.

        Raises:
          NotSaved: if there are several processes, which cannot do that together: some wait for those that failed.
        """
        step, why = self._being_saved, reason(error)
        self._being_saved = None
        with contextlib.suppress(Exception):  # the same error
            self._manager.close()
        self._sweep()
        if jax.process_count() > 1:
            raise self._not_saved(step, why) from error
        self._failed = step, why
        self._manager = self._open()

    def _sweep(self) -> None:
        """Deletes what is half written; again later, since writes that were under way make the folder anew."""
        self._swept = False
        if is_main():
            for folder in self._folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(folder, ignore_errors=True)

    def _tell_failure(self) -> None:
        if self._failed:
            (step, why), self._failed = self._failed, None
            latest = self.latest_step()
            kept = f"checkpoint {latest} is kept" if latest else "there is none yet"
            say(f"checkpoint {step} cannot be saved: {why}; {kept}, the run goes on and tries again at the next one")

    def changed_settings(self, step: int) -> dict[str, tuple[Any, Any]]:
        """Settings that differ from those of a saved step: {key: (then, now)}.

        Raises:
          UserError: if a setting that must not change has changed; it names the setting.
        """
        about = self._read_about(step)
        self._check_fits(step, about)
        return changed_settings(about["config"], self._config)

    def _check_fits(self, step: int, about: dict[str, Any]) -> None:
        name = f"checkpoint {step} in {self._folder}"
        if (own := about.get("step")) != step:
            raise UserError(f"{name} is one of step {own}: rename its folder to {own}, or move it away")
        check_fits(about["config"], self._config, name)
        if about.get("layout") != LAYOUT:
            raise UserError(
                f"{name} is an earlier version's, which this one cannot go on from; its weights can start a new run: "
                f"--config.init_from={self._folder.parent} with another --workdir"
            )

    def _read_about(self, step: int) -> dict[str, Any]:
        with self._readable(step):
            return self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore())).about

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state of a saved step, laid out as `abstract` says.

        Raises:
          UserError: if the checkpoint cannot be read.
        """
        items = {name: ocp.args.StandardRestore(tree) for name, tree in _items(abstract).items()}
        with self._readable(step):
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
            values = {name: restored[name] for name in items}
        self._complete_manifest(step)
        numbers = {"step": step, "skipped": self._read_about(step)["skipped"]}
        return abstract._replace(**values, **put(jax.tree.map(np.int32, numbers), abstract.step.sharding))

    def set_aside(self, step: int) -> None:
        """Moves a step whose loss was not finite to checkpoints_set_aside/, so that no run goes on from it."""
        self._finish()
        if from_main((self._folder / str(step)).is_dir()):
            self._move_aside(step)

    def _move_aside(self, step: int) -> Path:
        """Moves a step's folder out of the way, under a name that is free; returns it."""
        folder = self._folder.with_name("checkpoints_set_aside")
        names = itertools.chain([str(step)], (f"{step}.{number}" for number in itertools.count(1)))
        target = Path(from_main(str(next(folder / name for name in names if not (folder / name).exists()))))
        if is_main():
            folder.mkdir(exist_ok=True)
            (self._folder / str(step)).rename(target)
        wait_for_all()
        self._manager.reload()
        return target

    @contextlib.contextmanager
    def _readable(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax raises many types for a damaged checkpoint
            raise UserError(
                f"checkpoint {self._folder}/{step} cannot be read ({first_line(error)}); "
                "move it away to go on from the one before it"
            ) from error

    def close(self) -> None:
        """Waits, then frees the background threads."""
        self._finish()
        if self._failed:
            say(f"checkpoint {self._failed[0]} cannot be saved: {self._failed[1]}")
        self._manager.close()
        if not self._swept:
            self._sweep()


def _items(state: TrainState) -> dict[str, Any]:
    """The trees of a state, each an item of the checkpoint, without the empty ones."""
    trees = {name: tree for name, tree in state._asdict().items() if name not in ("step", "skipped")}
    return {name: tree for name, tree in trees.items() if name == "opt_state" or tree}
