"""Linear probe of ViT-L/16 on ImageNet-1k, as linear_probe_vit_base.py. Not run here.

    python main.py --config=configs/linear_probe_vit_large.py --config.init_from=runs/vit_large --config.data.path=DATA

The authors report 75.8 % (76.0 % for the released weights), and that 50 epochs are enough.
"""

from configs import linear_probe_vit_base


def get_config():
    return linear_probe_vit_base.get_config("large")
