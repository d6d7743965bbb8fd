"""Draws what a trained model reconstructs of given pictures, or of its own evaluation images.

    python main.py --config=configs/reconstruct.py --config.init_from=runs/digits
    python main.py --config=configs/reconstruct.py --config.init_from=runs/mine --config.data.path=PICTURE_OR_FOLDER

The model and the way pictures are prepared come from the checkpoint. Settings that matter: evaluate.pictures,
evaluate.mask_ratio, seed (of the masks), data.path. The picture is WORKDIR/reconstructions/STEP.png; result.json has
the masked loss, the mean over all the pictures.
"""

import ml_collections

from configs import common


def get_config() -> ml_collections.ConfigDict:
    config = common.get_config()
    config.task = "reconstruct"
    config.data.name = None  # the checkpoint's
    return config
