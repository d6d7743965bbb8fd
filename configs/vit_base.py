"""ViT-B/16 on ImageNet-1k from TFDS: the paper's pre-training recipe (Table 8), 800 epochs. Not run to its end here.

    python main.py --config=configs/vit_base.py --config.data.path=DATA_DIR --workdir=runs/vit_base

The paper, after 1,600 epochs: 83.6 % fine-tuned (Table 3), 68.0 % linear probe (Table 12)."""

from configs import common


def get_config():
    return common.vit("base")
