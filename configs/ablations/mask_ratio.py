"""The share of hidden patches (He et al. 2021, Figure 5: 75 % is good for both protocols).

python main.py --config=configs/ablations/mask_ratio.py[:BASE]"""

from configs.ablations import base as bases

DIGITS = (0.125, 0.375, 0.5, 0.75, 0.875)  # of 16 patches 14, 10, 8, 4 and 2 stay visible
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9)
FINETUNED = (83.2, 83.4, 83.4, 84.7, 84.9, 85.0, 84.9, 84.9, 84.5, 83.0)
PROBED = (54.6, 58.9, 61.7, 67.0, 69.9, 71.8, 73.2, 73.5, 71.8, 66.1)
PAPER = bases.curves(RATIOS, FINETUNED, PROBED)


def get_config(base: str = "digits"):
    ratios = DIGITS if base == "digits" else RATIOS
    return bases.vary(bases.begin(base), ("model.mask_ratio", ratios), "mask ratio", PAPER, "Figure 5")
