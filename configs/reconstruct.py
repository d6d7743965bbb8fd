"""Draws what a trained model reconstructs of given pictures, or of its own evaluation images.

    python main.py --config=configs/reconstruct.py --config.init_from=runs/mine [--config.data.path=PICTURE_OR_FOLDER]

Writes reconstructions/STEP.png, and the mean masked loss of all pictures into result.json. Settings that matter:
evaluate.pictures, evaluate.mask_ratio, evaluate.mask, and seed, which draws the masks.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.task = "reconstruct"
    config.data.name = None  # the checkpoint's
    return config
