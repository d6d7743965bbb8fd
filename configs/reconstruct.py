"""Draws a trained model's reconstructions of given pictures, or of its evaluation images; measures the masked loss.

python main.py --config=configs/reconstruct.py --config.init_from=runs/mine [--config.data.path=PICTURE_OR_FOLDER]"""

from configs import common


def get_config():
    return common.of_checkpoint("reconstruct")
