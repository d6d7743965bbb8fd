"""ViT-H/14 on ImageNet-1k from TFDS: the paper's pre-training recipe (Table 8), 800 epochs. Not run to its end here.

    python main.py --config=configs/vit_huge.py --config.data.path=DATA_DIR --workdir=runs/vit_huge

The paper, after 1,600 epochs: 86.9 % fine-tuned (Table 3), 76.6 % linear probe (Table 12); 800 epochs took 34.5 hours
on 128 TPU-v3 cores (Table 2)."""

from configs import common


def get_config():
    return common.vit("huge")
