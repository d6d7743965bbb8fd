"""CIFAR-10 through TFDS: ViT-Ti with patches of 2 pixels (256 patches), pixels as targets, no crops.

    python main.py --config=configs/cifar10.py --config.data.path=DATA_DIR

Patches of 4 pixels (`--config.model.patch_size=4`) need a quarter of the tokens: the choice for a first look, and for a
CPU. Sizes, mask ratio and targets are those of the CIFAR-10 example that many start from
(github.com/IcarusWizard/MAE), which reports 89.8 % after fine-tuning where training from scratch gives 74.1 %
(2,000 epochs at batch 4096). The base rate is higher than the paper's, since the batch is small. Not run
to its end here; README.md has a first look.
"""

import ml_collections

from configs import common
from mae_jax.models.config import SIZES


def get_config() -> ml_collections.ConfigDict:
    config = common.get_config()
    config.model.update(SIZES["tiny"])
    config.model.update(
        image_size=32, patch_size=2, decoder_width=192, decoder_depth=4, decoder_num_heads=3, normalize_targets=False,
        dtype="float32",  # on every chip, as what docs/results.md reports
    )  # fmt: skip
    config.data.update(
        name="cifar10", eval_split="test", batch_size=512, mean=(0.5,), std=(0.5,),
        crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), eval_crop=1.0,
    )  # fmt: skip
    config.train.epochs = 400.0
    config.optimizer.base_learning_rate = 1e-3
    return config
