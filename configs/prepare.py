"""Any data as ArrayRecord shards, which are read quickly and in any order; both splits, with a description.

    python main.py --config=configs/prepare.py --config.data.name=image_folder --config.data.path=FOLDER --workdir=DIR

and then --config.data.name=prepared --config.data.path=DIR in place of the folder. Pictures stay as they are, to the
bit, unless --config.prepare.short_side=256 reduces them once to JPEGs with a shorter side of 256 pixels. A command that
was stopped goes on where it was. `cd DIR && sha256sum --check SHA256SUMS` verifies a copy."""

from configs import common


def get_config():
    config = common.get_config()
    config.task = "prepare"
    return config
