"""What happens to the pictures of pre-training (He et al. 2021, Table 1e).

    python main.py --config=configs/ablations/augmentation.py                              # the digits
    python main.py --config=configs/ablations/augmentation.py:vit_large --config.data.path=DATA_DIR

The paper, with ViT-L on ImageNet: crops of random size do best; even without any augmentation fine-tuning reaches
84.0 %, for masks make each step's task a new one; jittered colours do harm (84.3 %). Digits are not mirrored here.
"""

import ml_collections

from configs.ablations import base as bases

PAPERS = ("none", "crop, fixed size", "crop, random size", "crop + colours")


def get_config(base: str = "digits") -> ml_collections.ConfigDict:
    config = bases.begin(base)
    flip = base != "digits"
    fixed = {"data.crop_scale": (0.766, 0.766), "data.crop_ratio": (1.0, 1.0)}  # 224 x 224 of 256 x 256 pixels
    random = {"data.crop_scale": (0.2, 1.0), "data.crop_ratio": (3 / 4, 4 / 3)}
    crop = {"data.crop_rule": "retry", "data.flip": flip, "data.color_jitter": 0.0}
    rows = {
        "none": fixed | {"data.crop_rule": "centre", "data.flip": False, "data.color_jitter": 0.0},
        "crop, fixed size": fixed | crop,
        "crop, random size": random | crop,
        "crop + colours": random | crop | {"data.color_jitter": 0.4},
    }
    config.ablate.update(
        grid=(bases.named_rows(config, rows),),
        paper=bases.curves(PAPERS, (84.0, 84.7, 84.9, 84.3), (65.7, 73.1, 73.5, 71.9)),
        title="augmentation",
        source="He et al. 2021, Table 1e",
    )
    return config
