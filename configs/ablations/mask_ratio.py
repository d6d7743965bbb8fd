"""The share of hidden patches (He et al. 2021, Figure 5).

    python main.py --config=configs/ablations/mask_ratio.py                              # the digits
    python main.py --config=configs/ablations/mask_ratio.py:vit_large --config.data.path=DATA_DIR

The paper, with ViT-L on ImageNet: 75 % is good for both protocols; the linear probe rises from 54.6 % at a ratio of
10 % to 73.5 %, and fine-tuning varies less: 40 to 80 % all do well.
"""

import ml_collections

from configs.ablations import base as bases

# The digits have 16 patches: 14, 10, 8, 4 and 2 of them stay visible.
RATIOS = {"digits": (0.125, 0.375, 0.5, 0.75, 0.875)}
PAPERS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9)
FINETUNED = (83.2, 83.4, 83.4, 84.7, 84.9, 85.0, 84.9, 84.9, 84.5, 83.0)
PROBED = (54.6, 58.9, 61.7, 67.0, 69.9, 71.8, 73.2, 73.5, 71.8, 66.1)


def get_config(base: str = "digits") -> ml_collections.ConfigDict:
    config = bases.begin(base)
    config.ablate.update(
        grid=(("model.mask_ratio", RATIOS.get(base, PAPERS)),),
        paper=bases.curves(PAPERS, FINETUNED, PROBED),
        title="mask ratio",
        source="He et al. 2021, Figure 5",
    )
    return config
