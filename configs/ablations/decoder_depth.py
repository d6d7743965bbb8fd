"""The number of the decoder's blocks (He et al. 2021, Table 1a).

    python main.py --config=configs/ablations/decoder_depth.py                              # the digits
    python main.py --config=configs/ablations/decoder_depth.py:vit_large --config.data.path=DATA_DIR

The paper, with ViT-L on ImageNet: fine-tuning does as well with one block (84.8 %) as with eight (84.9 %); the linear
probe wants a decoder that is deep enough to leave the encoder's last blocks to recognition (65.5 and 73.5 %).
"""

import ml_collections

from configs.ablations import base as bases

DEPTHS = {"digits": (1, 2, 4, 8)}
PAPERS = (1, 2, 4, 8, 12)


def get_config(base: str = "digits") -> ml_collections.ConfigDict:
    config = bases.begin(base)
    config.ablate.update(
        grid=(("model.decoder_depth", DEPTHS.get(base, PAPERS)),),
        paper=bases.curves(PAPERS, (84.8, 84.9, 84.9, 84.9, 84.4), (65.5, 70.0, 71.9, 73.5, 73.3)),
        title="blocks of the decoder",
        source="He et al. 2021, Table 1a",
    )
    return config
