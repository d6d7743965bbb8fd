"""ViT-S/16 on ImageNet-1k from TFDS: the paper's recipe (Table 8) for a size that it does not have. Not run to its end.

    python main.py --config=configs/vit_small.py --config.data.path=DATA_DIR --workdir=runs/vit_small

github.com/TonyLianLong/CrossMAE, issue 4, reports a linear probe of 49.7 %."""

from configs import common


def get_config():
    return common.vit("small", decoder_width=256, decoder_num_heads=8)  # a decoder no wider than the encoder
