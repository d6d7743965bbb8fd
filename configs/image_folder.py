"""One's own pictures: a folder of class folders, or a flat folder without labels; ViT-Ti at 224 pixels.

    python main.py --config=configs/image_folder.py --config.data.path=FOLDER --workdir=runs/mine

Pictures in FOLDER/train and FOLDER/validation (or Training, val, valid, test, ..., in any case) are used as such;
without such sub-folders a tenth of each class is held out. Sized for one GPU or a patient CPU (2 shared cores: 11 to 20
images a second); a larger encoder is one line, `config.model.update(SIZES["small"])`.
"""

import ml_collections

from configs import common
from mae_jax.models.config import SIZES


def get_config() -> ml_collections.ConfigDict:
    config = common.get_config()
    config.model.update(SIZES["tiny"])
    config.model.update(decoder_width=192, decoder_depth=4, decoder_num_heads=3)
    config.data.update(name="image_folder", batch_size=64)
    config.train.update(epochs=400.0, log_every_steps=10)
    config.checkpoint.every_steps = 500
    return config
