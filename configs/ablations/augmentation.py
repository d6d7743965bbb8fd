"""How pictures are augmented in pre-training (He et al. 2021, Table 1e); digits are never mirrored.

python main.py --config=configs/ablations/augmentation.py[:BASE]"""

from configs.ablations import base as bases

NAMES = ("none", "crop, fixed size", "crop, random size", "crop + colours")
PAPER = bases.curves(NAMES, (84.0, 84.7, 84.9, 84.3), (65.7, 73.1, 73.5, 71.9))
FIXED = {"data.crop_scale": (0.766, 0.766), "data.crop_ratio": (1.0, 1.0)}  # 224 x 224 of 256 x 256 pixels
RANDOM = {"data.crop_scale": (0.2, 1.0), "data.crop_ratio": (3 / 4, 4 / 3)}


def get_config(base: str = "digits"):
    none = {"data.crop_rule": "centre", "data.flip": False, "data.color_jitter": 0.0}
    crop = {"data.crop_rule": "retry", "data.flip": base != "digits", "data.color_jitter": 0.0}
    rows = (FIXED | none, FIXED | crop, RANDOM | crop, RANDOM | crop | {"data.color_jitter": 0.4})
    axis = dict(zip(NAMES, rows, strict=True))
    return bases.vary(bases.begin(base), axis, "augmentation", PAPER, "Table 1e")
