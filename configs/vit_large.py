"""ViT-L/16 on ImageNet-1k from TFDS: the paper's pre-training recipe (Table 8), 800 epochs. Not run to its end here.

    python main.py --config=configs/vit_large.py --config.data.path=DATA_DIR --workdir=runs/vit_large

The paper: 85.4 % fine-tuned, 73.9 % linear probe (Table 1d); about 42 hours on 64 V100 (the authors' PRETRAIN.md) or
15.4 hours on 128 TPU-v3 cores (Table 2)."""

from configs import common


def get_config():
    return common.vit("large")
