"""A page to look at what a model has learned: hide patches and see them reconstructed, attention, predictions.

    python main.py --config=configs/demo.py --config.init_from=runs/mine [--config.data.path=PICTURE_OR_FOLDER]

Then open the address that it prints, http://127.0.0.1:7860; Ctrl-C ends it. Only this machine reaches the page, and
nothing leaves the machine. --config.demo.index=FOLDER, with features.parquet of the same encoder, adds neighbours."""

from configs import common


def get_config():
    config = common.of_checkpoint("demo")
    config.evaluate.pictures = 16  # to choose from
    return config
