"""The task demo: opens the model and some pictures, compiles, and serves the page until a signal ends it."""

import signal
import time
import webbrowser
from pathlib import Path

from ml_collections import ConfigDict

from mae_jax.data.depth import settle_depth
from mae_jax.data.image_folder import PictureFiles
from mae_jax.data.sources import Source
from mae_jax.evaluation.feature_table import describe_encoder
from mae_jax.interop.workdirs import Weights
from mae_jax.runtime.console import say
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.processes import process_count
from mae_jax.runtime.signals import Stopped, StopSignal
from mae_jax.settings.fields import defaults
from mae_jax.tasks.demo.compiled import CompiledModel
from mae_jax.tasks.demo.neighbours import Index
from mae_jax.tasks.demo.server import Server
from mae_jax.tasks.demo.viewer import Viewer
from mae_jax.tasks.measuring import find_sources, open_checkpoint

PAUSE_SECONDS = 0.1  # between looks for a signal


def run(config: ConfigDict, workdir: Path, stop: StopSignal) -> None:
    """Serves the page; Ctrl-C is the usual end, SIGTERM raises Stopped. UserError if the port is taken."""
    if process_count() > 1:
        raise UserError(f"{process_count()} processes: the page is served by one; start it without a launcher")
    weights, config, sources = open_model(config, workdir)
    about = describe_encoder(config, weights.step)
    index = Index(config.demo.index, about) if config.demo.index else None
    model = CompiledModel(weights, config)
    server = Server(Viewer(model, weights, config, sources, index), config.demo.port)  # first: the port may be taken
    model.compile()
    with stop.deferred():
        server.start()
        say(f"the page is at {server.address} until Ctrl-C")
        if config.demo.open:
            webbrowser.open(server.address)
        while stop.received is None:
            time.sleep(PAUSE_SECONDS)
        server.stop()
    if stop.received != signal.SIGINT:
        raise Stopped


def open_model(config: ConfigDict, workdir: Path) -> tuple[Weights, ConfigDict, dict[str, Source]]:
    """The weights, their config, and sources of pictures by split: those of `data.path`, or the checkpoint's own.

    A checkpoint whose data are not at hand has none, unless they are asked for: its page takes uploads only.
    """
    asked, usual = config.data, defaults().data
    if asked.name in (None, "image_folder") and asked.path:
        pictures, asked.path = asked.path, None
        weights, config = open_checkpoint(config, workdir, needs_data=False)
        config.data.name, config.data.path = None, pictures
        sources = {"eval": PictureFiles(pictures, extensions=config.data.extensions)}
    else:
        try:
            weights, found = open_checkpoint(config, workdir)
            train, evaluation = find_sources(weights, found, to_train=bool(config.demo.index))
            config, sources = found, {"eval": evaluation} | ({"train": train} if train else {})
        except UserError as error:
            if asked.name is not None or asked.path != usual.path:
                raise
            weights, config = open_checkpoint(config, workdir, needs_data=False)
            say(f"note: no pictures to choose from, only to upload ({error})")
            return weights, config, {}
    settle_depth(config.data, tuple(sources.values()), config.model.channels)
    return weights, config, sources
