"""The task prepare: any data as shards that are read quickly (data.name=prepared), in the workdir."""

from pathlib import Path

from ml_collections import ConfigDict

from mae_jax.data.prepared import SPLITS
from mae_jax.data.preparing import SUMS, prepare
from mae_jax.data.statistics import DESCRIPTION
from mae_jax.runtime.console import say
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.processes import is_main
from mae_jax.runtime.signals import StopSignal
from mae_jax.workdir.reporting import provenance
from mae_jax.workdir.writing import read_object, write_json


def run(config: ConfigDict, workdir: Path, stop: StopSignal) -> None:
    """Prepares the pictures of `data.name`, in process 0; the same command goes on where it was stopped."""
    if config.data.name is None:
        raise UserError("data.name is not set: which pictures? For example --config.data.name=image_folder")
    if not is_main():
        return
    if not (workdir / DESCRIPTION).exists():
        write_json(workdir / "config.json", config.to_dict() | provenance())
    about = prepare(config, workdir)
    if about is None:
        say(f"{workdir} is prepared already: nothing to do")
        about = read_object(workdir / DESCRIPTION)
    counts = {split: about["splits"][split]["examples"] for split in SPLITS}
    left_out = sum(len(about["splits"][split]["left_out"]) for split in SPLITS)
    size = sum(shard["bytes"] for split in SPLITS for shard in about["splits"][split]["shards"])
    write_json(workdir / "result.json", {"images": counts, "left_out": left_out, "bytes": size})
    shards = sum(len(about["splits"][split]["shards"]) for split in SPLITS)
    say(
        f"{counts['train']:,} training and {counts['eval']:,} evaluation pictures in {shards:,} shards, "
        f"{size / 2**20:,.1f} MiB, {left_out:,} bad ones left out; see {DESCRIPTION} and {SUMS}",
        f"train on them with --config.data.name=prepared --config.data.path={workdir}",
    )
