"""Blocks of the decoder (He et al. 2021, Table 1a: one is enough for fine-tuning, a linear probe needs more).

python main.py --config=configs/ablations/decoder_depth.py[:BASE]"""

from configs.ablations import base as bases

DEPTHS = (1, 2, 4, 8, 12)
PAPER = bases.curves(DEPTHS, (84.8, 84.9, 84.9, 84.9, 84.4), (65.5, 70.0, 71.9, 73.5, 73.3))


def get_config(base: str = "digits"):
    depths = DEPTHS[:4] if base == "digits" else DEPTHS
    return bases.vary(bases.begin(base), ("model.decoder_depth", depths), "blocks of the decoder", PAPER, "Table 1a")
