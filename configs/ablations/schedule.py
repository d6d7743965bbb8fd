"""The length of pre-training, each with its own schedule (He et al. 2021, Figure 7: 1,600 epochs still beat 800).

python main.py --config=configs/ablations/schedule.py[:BASE]"""

from configs.ablations import base as bases

PAPER = bases.curves((100, 200, 400, 800, 1600), (82.3, 83.3, 84.3, 84.9, 85.1), (57.3, 64.4, 69.7, 73.5, 75.1))


def get_config(base: str = "digits"):
    config = bases.begin(base)
    epochs = tuple(share * config.train.epochs for share in (0.125, 0.25, 0.5, 1.0, 2.0))
    return bases.vary(config, ("train.epochs", epochs), "epochs of pre-training", PAPER, "Figure 7")
