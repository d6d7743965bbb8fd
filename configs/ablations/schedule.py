"""The length of pre-training (He et al. 2021, Figure 7).

    python main.py --config=configs/ablations/schedule.py[:BASE]

The paper (ViT-L, ImageNet): from 800 to 1,600 epochs both protocols still gain (84.9 to 85.1 % fine-tuned, 73.5 to
75.1 % linear). The lengths are an eighth of the base's to twice it, each with a schedule of its own.
"""

from configs.ablations import base as bases

PAPER = bases.curves((100, 200, 400, 800, 1600), (82.3, 83.3, 84.3, 84.9, 85.1), (57.3, 64.4, 69.7, 73.5, 75.1))


def get_config(base: str = "digits"):
    config = bases.begin(base)
    epochs = tuple(share * config.train.epochs for share in (0.125, 0.25, 0.5, 1.0, 2.0))
    return bases.vary(config, ("train.epochs", epochs), "epochs of pre-training", PAPER, "Figure 7")
