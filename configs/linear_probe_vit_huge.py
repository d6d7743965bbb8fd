"""Linear probe of ViT-H/14 on ImageNet-1k, as linear_probe_vit_base.py. Not run here.

    python main.py --config=configs/linear_probe_vit_huge.py --config.init_from=runs/vit_huge --config.data.path=DATA

The authors report 76.6 % (77.2 % for the released weights), and that 50 epochs are enough.
"""

from configs import linear_probe_vit_base


def get_config():
    return linear_probe_vit_base.get_config("huge")
