"""How the hidden patches are chosen (He et al. 2021, Table 1f: at random is best; a grid makes the task too easy).

python main.py --config=configs/ablations/mask_sampling.py[:BASE]"""

from configs.ablations import base as bases

ROWS = {
    "random 75 %": {"model.mask_sampling": "random", "model.mask_ratio": 0.75},
    "block 50 %": {"model.mask_sampling": "block", "model.mask_ratio": 0.5},
    "block 75 %": {"model.mask_sampling": "block", "model.mask_ratio": 0.75},
    "grid 75 %": {"model.mask_sampling": "grid", "model.mask_ratio": 0.75},
}
PAPER = bases.curves(tuple(ROWS), (84.9, 83.9, 82.8, 84.0), (73.5, 72.3, 63.9, 66.0))


def get_config(base: str = "digits"):
    return bases.vary(bases.begin(base), ROWS, "mask sampling", PAPER, "Table 1f")
