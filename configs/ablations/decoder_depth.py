"""The number of the decoder's blocks (He et al. 2021, Table 1a).

    python main.py --config=configs/ablations/decoder_depth.py[:BASE]

The paper (ViT-L, ImageNet): fine-tuning does as well with one block (84.8 %) as with eight (84.9 %), but the linear
probe needs a deep decoder, which leaves the encoder's last blocks to recognition (65.5 and 73.5 %).
"""

from configs.ablations import base as bases

DEPTHS = (1, 2, 4, 8, 12)
PAPER = bases.curves(DEPTHS, (84.8, 84.9, 84.9, 84.9, 84.4), (65.5, 70.0, 71.9, 73.5, 73.3))


def get_config(base: str = "digits"):
    depths = DEPTHS[:4] if base == "digits" else DEPTHS
    return bases.vary(bases.begin(base), ("model.decoder_depth", depths), "blocks of the decoder", PAPER, "Table 1a")
