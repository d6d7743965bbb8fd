"""What the decoder predicts (He et al. 2021, Table 1d). The dVAE is drawn but not run: its weights are not here.

python main.py --config=configs/ablations/targets.py[:BASE]"""

from configs.ablations import base as bases

COMPONENTS = {"digits": 2, "cifar10": 4}  # of 4 and 12 values in a patch; the paper: 96 of 768
NAMES = ("pixels", "normalised pixels", "PCA", "dVAE tokens")
PAPER = bases.curves(NAMES, (84.9, 85.4, 84.6, 85.3), (73.5, 73.9, 72.3, 71.6))


def get_config(base: str = "digits"):
    rows = {
        "pixels": {"model.normalize_targets": False},
        "normalised pixels": {"model.normalize_targets": True},
        "PCA": {"model.normalize_targets": False, "model.pca_targets": COMPONENTS.get(base, 96)},
    }
    return bases.vary(bases.begin(base), rows, "targets", PAPER, "Table 1d")
