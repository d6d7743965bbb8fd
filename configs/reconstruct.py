"""Draws a trained model's reconstructions of given pictures, or of its own evaluation images.

    python main.py --config=configs/reconstruct.py --config.init_from=runs/mine [--config.data.path=PICTURE_OR_FOLDER]

Writes reconstructions/STEP.png, and the mean masked loss to result.json. evaluate.pictures, mask_ratio and mask say
how many pictures and which masks; seed draws the masks.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.task = "reconstruct"
    config.data.name = None  # the checkpoint's
    return config
