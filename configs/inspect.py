"""A first look at any data before training: what they hold, their values by band, slow and bad files, an overview.

    python main.py --config=configs/inspect.py --config.data.name=image_folder --config.data.path=FOLDER --workdir=DIR

or, with the crops of a training config, --config=configs/NAME.py --config.task=inspect. Writes to the workdir

    overview.png     training crops as the model sees them
    statistics.json  mean, std and limits of each band, for --config.data.statistics=DIR/statistics.json
    classes.csv      pictures of each class
    files.csv        the slowest, the largest and all bad files

--config.inspect.max_examples=10000 looks at so many random pictures of each split, always the same."""

from configs import common


def get_config():
    config = common.get_config()
    config.task = "inspect"
    return config
