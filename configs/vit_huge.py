"""ViT-H/14 on ImageNet-1k from TFDS: the paper's pre-training recipe (Table 8), 800 epochs.

    python main.py --config=configs/vit_huge.py --config.data.path=DATA_DIR --workdir=runs/vit_huge

After 1,600 epochs the paper has 86.9 % fine-tuned (Table 3) and 76.6 % linear probe (Table 12); 800 took 34.5 hours on
128 TPU-v3 cores (Table 2). For accelerators; not run to its end here.
"""

from configs import common


def get_config():
    return common.vit("huge", remat=True)
