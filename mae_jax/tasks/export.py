"""Exports a checkpoint to files that other programs load."""

from pathlib import Path

from ml_collections import ConfigDict

from mae_jax.interop.formats import FILES, FORMATS, export, fit
from mae_jax.models.parameters import count_parameters
from mae_jax.runtime.console import say
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.processes import is_main
from mae_jax.runtime.signals import StopSignal
from mae_jax.tasks.measuring import open_checkpoint
from mae_jax.workdir.reporting import provenance
from mae_jax.workdir.writing import read_object, write_json

NOTE = "export.json"  # marks a folder that an export may overwrite


def run(config: ConfigDict, workdir: Path, stop: StopSignal) -> None:
    """Writes `config.init_from` to the workdir in `config.format`, and result.json."""
    if config.format not in FORMATS:
        raise UserError(f"format={config.format!r} is not one of {', '.join(FORMATS)}: --config.format={FORMATS[0]}")
    weights, config = open_checkpoint(config, workdir, needs_data=False, computes=False)
    if not is_main():
        return
    _check_folder(config, workdir)
    weights = weights._replace(config=weights.config | {"data": config.data.to_dict()})
    weights = fit(weights, config.format, encoder_only=config.encoder_only)
    for note in weights.notes:
        say(f"note: {note}")
    # result.json means that all files are complete, and no earlier weights may stand beside this export's settings.
    for earlier in ("result.json", *FILES):
        (workdir / earlier).unlink(missing_ok=True)
    source = {"format": config.format, "init_from": config.init_from}
    write_json(workdir / NOTE, source)
    files = export(weights, workdir, config.format)
    result = {
        "step": weights.step, **source, "parameters": count_parameters(weights.params),
        "parts": sorted(weights.params), "files": [file.name for file in files], "notes": list(weights.notes),
    }  # fmt: skip
    write_json(workdir / "result.json", result | provenance())
    for file in files:
        say(f"{file}  {file.stat().st_size:,} bytes")


def _check_folder(config: ConfigDict, workdir: Path) -> None:
    files = sorted(file.name for file in workdir.iterdir() if not file.name.startswith("."))
    earlier = (read_object(workdir / NOTE) or {}).get("format")
    source = Path(config.init_from).resolve()
    if files and (earlier != config.format or workdir.resolve() in (source, *source.parents)):
        what = f"holds init_from, or files other than an earlier export as {config.format}: {', '.join(files[:2])}, ..."
        raise UserError(f"--workdir={workdir} {what}; choose another folder")
