"""The length of pre-training (He et al. 2021, Figure 7).

    python main.py --config=configs/ablations/schedule.py                              # the digits
    python main.py --config=configs/ablations/schedule.py:vit_large --config.data.path=DATA_DIR

The paper, with ViT-L on ImageNet: both protocols still gain from 800 to 1,600 epochs (84.9 to 85.1 % fine-tuned, 73.5
to 75.1 % linear). Each run is as long as its own schedule. The lengths are an eighth of the base's to twice it.
"""

import ml_collections

from configs.ablations import base as bases

SHARES = (0.125, 0.25, 0.5, 1.0, 2.0)
PAPERS = (100, 200, 400, 800, 1600)


def get_config(base: str = "digits") -> ml_collections.ConfigDict:
    config = bases.begin(base)
    config.ablate.update(
        grid=(("train.epochs", tuple(share * config.train.epochs for share in SHARES)),),
        paper=bases.curves(PAPERS, (82.3, 83.3, 84.3, 84.9, 85.1), (57.3, 64.4, 69.7, 73.5, 75.1)),
        title="epochs of pre-training",
        source="He et al. 2021, Figure 7",
    )
    return config
