"""Exports a checkpoint to files that other programs load."""

import hashlib
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mae_jax.interop.formats import FILES, FORMATS, export, fit
from mae_jax.interop.model_card import CARD, find_scores, make_card
from mae_jax.interop.weights import find_weights
from mae_jax.models.parameters import count_parameters
from mae_jax.runtime.console import say
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.processes import is_main
from mae_jax.runtime.signals import StopSignal
from mae_jax.tasks.measuring import open_checkpoint
from mae_jax.workdir.reporting import provenance
from mae_jax.workdir.writing import read_object, write_atomically, write_json

NOTE = "export.json"  # marks a folder that an export may overwrite


def run(config: ConfigDict, workdir: Path, stop: StopSignal) -> None:
    """Writes `config.init_from` to the workdir in `config.format`, and result.json."""
    if config.format not in FORMATS:
        raise UserError(f"format={config.format!r} is not one of {', '.join(FORMATS)}: --config.format={FORMATS[0]}")
    trained, config = open_checkpoint(config, workdir, needs_data=False, computes=False)
    if not is_main():
        return
    _check_folder(config, workdir)
    weights = trained._replace(config=trained.config | {"data": config.data.to_dict()})
    weights = fit(weights, config.format, encoder_only=config.encoder_only)
    for note in weights.notes:
        say(f"note: {note}")
    # result.json means that all files are complete, and no earlier weights may stand beside this export's settings.
    for earlier in ("result.json", *FILES[config.format]):
        (workdir / earlier).unlink(missing_ok=True)
    source = {"format": config.format, "init_from": config.init_from}
    card = None
    if config.format == "huggingface" and _may_write_card(workdir):
        scores = find_scores(find_weights(config.init_from), trained.step)
        card = make_card(weights, trained, scores, weights.notes)
    write_json(workdir / NOTE, source | ({"card": _digest(card.encode())} if card else _earlier(workdir, "card")))
    files = export(weights, workdir, config.format)
    if card:
        write_atomically(workdir / CARD, card)
        files.append(workdir / CARD)
    result = {
        "step": weights.step, **source, "parameters": count_parameters(weights.params),
        "parts": sorted(weights.params), "files": [file.name for file in files], "notes": list(weights.notes),
    }  # fmt: skip
    write_json(workdir / "result.json", result | provenance())
    for file in files:
        say(f"{file}  {file.stat().st_size:,} bytes")


def _may_write_card(workdir: Path) -> bool:
    """Removes the card of an earlier export; False if there is another one, which someone has written or changed."""
    card = workdir / CARD
    if card.is_file() and not card.is_symlink() and _earlier(workdir, "card") == {"card": _digest(card.read_bytes())}:
        card.unlink()
    if card.exists() or card.is_symlink():
        say(f"note: {card} is not an export's own, or was changed: it is left as it is")
        return False
    return True


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _earlier(workdir: Path, name: str) -> dict[str, Any]:
    """The entry of an earlier export's note, if there is one."""
    return {key: value for key, value in (read_object(workdir / NOTE) or {}).items() if key == name}


def _check_folder(config: ConfigDict, workdir: Path) -> None:
    files = sorted(file.name for file in workdir.iterdir() if not file.name.startswith("."))
    earlier = (read_object(workdir / NOTE) or {}).get("format")
    source = Path(config.init_from).resolve()
    if files and (earlier != config.format or workdir.resolve() in (source, *source.parents)):
        what = f"holds init_from, or files other than an earlier export as {config.format}: {', '.join(files[:2])}, ..."
        raise UserError(f"--workdir={workdir} {what}; choose another folder")
