"""Checkpoints of the complete training state, by Orbax: written in the background, atomically, with checksums."""

import contextlib
import errno
import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from mae_jax.runtime.console import say
from mae_jax.runtime.errors import NotSaved, UserError, first_line, reason, with_patience
from mae_jax.runtime.mesh import put
from mae_jax.runtime.processes import from_main, is_main, wait_for_all
from mae_jax.settings.fields import flatten
from mae_jax.workdir.writing import free_name, read_object, write_atomically

CHECKSUMS = "SHA256SUMS"
THREADS = 4  # hashing releases the GIL
LAYOUT = 2  # of the parameters; 1 (not recorded): kernels with queries, keys and values side by side
# A run resumes only with these settings unchanged: they define the parameters, the objective, or the order of the data.
FIXED = (
    "task", "seed", "model.", "classifier.", "data.name", "data.batch_size", "data.seed", "data.label_fraction",
    "data.stratify", "data.bands", "data.dtype", "data.value_range", "optimizer.name", "train.ema_decay", "class_names",
    "label_kind",
)  # fmt: skip
FREE = ("model.dtype", "model.attention", "model.remat", "model.scan_unroll")  # exceptions, which may change
State = Any  # a NamedTuple of pytrees, with the int32 scalars `step` and `skipped`


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Never: training asks for itself, and Orbax would compare times that `lightweight_initialize` leaves out."""
        return False


class Checkpoints:
    """The folder checkpoints/: for each step its non-empty trees, `about` (step, config) and checksums."""

    def __init__(self, workdir: Path, settings: ConfigDict, config: dict[str, Any]):
        self._settings, self._config = settings, config
        self._folder = Path(workdir).absolute() / "checkpoints"
        self._background = ThreadPoolExecutor(1)
        self._saving = Future()
        self._saving.set_result(None)
        self._seconds: list[float] = []  # that the loop waited for each save
        options = ocp.CheckpointManagerOptions(
            max_to_keep=settings.keep, keep_period=settings.keep_every_steps,
            cleanup_tmp_directories=True,  # of a killed run or a full disk
            lightweight_initialize=True,  # otherwise it reads files that may be damaged
            # Otherwise the program waits minutes for a folder that cannot be created.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )  # fmt: skip
        self._manager = _Manager(self._folder, options=options)

    def latest_step(self) -> int | None:
        """The newest step with a checkpoint that is complete or being written."""
        return self._manager.latest_step()

    def newest_whole(self) -> int | None:
        """The newest undamaged step; moves damaged ones to checkpoints_set_aside/ if an earlier one fits."""
        damaged: dict[int, str] = {}
        for step in from_main(sorted(self._manager.all_steps(), reverse=True)):
            about = from_main(self._read_about(step))
            damage = find_damage(self._folder / str(step)) if is_main() else None
            if not damage and not isinstance(about.get("config"), dict):
                damage = "about/metadata cannot be read"
            if damage := from_main(damage):
                damaged[step] = damage
                continue
            name = f"checkpoint {step} in {self._folder}"
            if (own := about.get("step")) != step:
                raise UserError(f"{name} belongs to step {own}: rename its folder to {own}, or move it away")
            check_fits(about["config"], self._config, name)
            if about.get("layout") != LAYOUT:
                raise UserError(
                    f"{name} is an earlier version's, which this one cannot go on from; its weights can start a new "
                    f"run: --config.init_from={self._folder.parent} with another --workdir"
                )
            for other, why in damaged.items():
                moved = self._move_aside(other)
                say(f"checkpoint {other} is damaged: {why}; moved to {moved}, going on from checkpoint {step}")
            return step
        if damaged:
            newest = max(damaged)
            raise UserError(
                f"no checkpoint in {self._folder} is intact; the newest, {newest}: {damaged[newest]}. Put back a copy, "
                "or start again in another --workdir"
            )
        return None

    def _read_about(self, step: int) -> dict[str, Any]:
        return read_object(self._folder / str(step) / "about" / "metadata") or {}

    def changed_settings(self, step: int) -> dict[str, tuple[Any, Any]]:
        """Settings that differ from those of a saved step and still exist: {key: (saved, present value)}."""
        changed = changed_settings(from_main(self._read_about(step))["config"], self._config)
        return {key: changed[key] for key in flatten(self._config) if key in changed}

    def due(self, step: int) -> bool:
        return step > 0 and step % self._settings.every_steps == 0

    def save(self, step: int, state: State) -> float:
        """Starts saving; returns the seconds until the state may change, 0 if it is saved already."""
        start = time.perf_counter()
        self.wait()
        if step == self.latest_step():
            return 0
        trees = _items(state)
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        about = {"step": step, "skipped": int(state.skipped), "layout": LAYOUT, "config": self._config}
        with self._failing_as_not_saved(step):
            needed = sum(leaf.nbytes for leaf in jax.tree.leaves(trees)) + 2**17  # files besides arrays
            free = from_main(shutil.disk_usage(self._folder).free)
            if free < needed:  # Orbax would print a thousand lines about it
                reached = f"({needed:,} bytes are needed, {free:,} free)"
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} {reached}")
            self._manager.save(step, args=ocp.args.Composite(**items, about=ocp.args.JsonSave(about)))
        self._saving = self._background.submit(self._finish, step)
        self._seconds.append(time.perf_counter() - start)
        return self._seconds[-1]

    def _finish(self, step: int) -> None:
        with self._failing_as_not_saved(step):
            self._manager.wait_until_finished()
            if is_main():
                write_checksums(self._folder / str(step))

    @contextlib.contextmanager
    def _failing_as_not_saved(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax raises many types
            self._manager.reload()
            latest = self.latest_step()
            start = "starts from the beginning" if latest is None else f"resumes from checkpoint {latest}"
            what = "the checksums of checkpoint" if latest == step else "checkpoint"
            raise NotSaved(
                f"{what} {step} cannot be saved: {reason(error)}; free space in {self._folder} or fix what else "
                f"is wrong there; then the same command {start}"
            ) from error

    def check(self) -> None:
        """Raises NotSaved if the save in the background has failed."""
        if self._saving.done():
            self._saving.result()

    def wait(self) -> None:
        """Waits until everything is on disk; NotSaved if that fails."""
        self._saving.result()

    def summary(self) -> str:
        """A line about the saves so far; empty if there were none."""
        count, total = len(self._seconds), sum(self._seconds)
        return f"saved {count} checkpoint{'s' * (count > 1)}; the loop waited {total:.2f} s" if count else ""

    def restore(self, step: int, abstract: State) -> State:
        """The state of a saved step, with the shardings of `abstract`; UserError if it cannot be read."""
        items = {name: ocp.args.StandardRestore(tree) for name, tree in _items(abstract).items()}
        folder = self._folder / str(step)
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
            values = {name: restored[name] for name in items}
        except Exception as error:  # Orbax raises many types for a damaged checkpoint
            raise UserError(
                f"checkpoint {folder} cannot be read ({first_line(error)}); move it away to resume from another"
            ) from error
        if is_main() and not (folder / CHECKSUMS).exists():  # the run was killed before it wrote them
            with contextlib.suppress(OSError):
                write_checksums(folder)
        numbers = {"step": np.int32(step), "skipped": np.int32(from_main(self._read_about(step))["skipped"])}
        return abstract._replace(**values, **put(numbers, abstract.step.sharding))

    def set_aside(self, step: int) -> None:
        """Moves a checkpoint whose loss was not finite to checkpoints_set_aside/, so that no run resumes from it."""
        self.wait()
        if from_main((self._folder / str(step)).is_dir()):
            self._move_aside(step)

    def _move_aside(self, step: int) -> Path:
        target = Path(from_main(str(free_name(self._folder.with_name("checkpoints_set_aside") / str(step)))))
        if is_main():
            target.parent.mkdir(exist_ok=True)
            (self._folder / str(step)).rename(target)
        wait_for_all()
        self._manager.reload()
        return target

    def close(self) -> None:
        """Waits for a save in progress, and ends the background threads."""
        self._background.shutdown()
        with contextlib.suppress(Exception):  # `wait` has raised it already
            self._manager.close()


def _items(state: State) -> dict[str, Any]:
    """The non-empty trees of a state, each an item of the checkpoint."""
    trees = {name: tree for name, tree in state._asdict().items() if name not in ("step", "skipped")}
    return {name: tree for name, tree in trees.items() if name == "opt_state" or tree}


def changed_settings(saved: dict, config: dict) -> dict[str, tuple[Any, Any]]:
    """Settings that differ: {key: (saved, present value)}, without those that the saved config lacks."""
    old, new = flatten(saved), flatten(config)
    # `given` lists the keys on the command line, and is no setting itself.
    return {key: (value, new.get(key)) for key, value in old.items() if value != new.get(key) and key != "given"}


def check_fits(saved: dict, config: dict, name: str) -> None:
    """Raises UserError if a run with `config` cannot resume from a checkpoint with the config `saved`."""
    for key, (old, new) in changed_settings(saved, config).items():
        if key.startswith(FIXED) and key not in FREE:
            raise UserError(
                f"{name} does not fit: it has {key}={old!r}, this run {key}={new!r}; "
                f"set --config.{key} back, or start in another --workdir (with --config.init_from to keep the weights)"
            )


def write_checksums(folder: Path) -> None:
    """Writes a folder's digests for `sha256sum --check`; the last, a comment, is that of the lines before."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and CHECKSUMS not in path.name]
    with ThreadPoolExecutor(THREADS) as pool:
        pairs = zip(pool.map(_digest, files), files, strict=True)
        lines = "".join(f"{digest}  {file.relative_to(folder).as_posix()}\n" for digest, file in pairs)
    write_atomically(folder / CHECKSUMS, f"{lines}# {hashlib.sha256(lines.encode()).hexdigest()}\n")


def find_damage(folder: Path, parts: Iterable[str] | None = None) -> str | None:
    """What is wrong with a folder's files; None: nothing, or it has no checksums. `parts`: sub-folders, None: all."""
    try:
        lines, _, seal = with_patience((folder / CHECKSUMS).read_bytes).rpartition(b"# ")
    except FileNotFoundError:
        return None  # the run was killed before it wrote them, or the checkpoint is of an earlier version
    except OSError as error:
        return f"{CHECKSUMS} cannot be read: {reason(error)}"
    if seal != hashlib.sha256(lines).hexdigest().encode() + b"\n":
        return f"{CHECKSUMS} has other bytes than were written"

    def check(line: str) -> str | None:
        digest, name = line.split("  ", 1)
        try:
            if parts is None or name.split("/")[0] in parts:
                same = with_patience(lambda: _digest(folder / name)) == digest
                return None if same else f"{name} has other bytes than were written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {reason(error)}"

    with ThreadPoolExecutor(THREADS) as pool:
        return next(filter(None, pool.map(check, lines.decode().splitlines())), None)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
