"""What the decoder predicts (He et al. 2021, Table 1d).

    python main.py --config=configs/ablations/targets.py                              # the digits
    python main.py --config=configs/ablations/targets.py:vit_large --config.data.path=DATA_DIR

The paper, with ViT-L on ImageNet: pixels normalised patch by patch do best (85.4 % fine-tuned, 73.9 % linear); the
tokens of a dVAE, which needs an own pre-training on more data, do no better (85.3 and 71.6 %). That row is left out
here, as it needs the weights of DALL-E's dVAE, which this project does not have; the paper's panels show it.
"""

import ml_collections

from configs.ablations import base as bases

COMPONENTS = {"digits": 2, "cifar10": 4}  # of 4 and 12 values in a patch; the paper: 96 of 768
NAMES = ("pixels", "normalised pixels", "PCA", "dVAE tokens")


def get_config(base: str = "digits") -> ml_collections.ConfigDict:
    config = bases.begin(base)
    rows = {
        "pixels": {"model.normalize_targets": False},
        "normalised pixels": {"model.normalize_targets": True},
        "PCA": {"model.normalize_targets": False, "model.pca_targets": COMPONENTS.get(base, 96)},
    }
    config.ablate.update(
        grid=(bases.named_rows(config, rows),),
        paper=bases.curves(NAMES, (84.9, 85.4, 84.6, 85.3), (73.5, 73.9, 72.3, 71.6)),
        title="targets",
        source="He et al. 2021, Table 1d",
    )
    return config
