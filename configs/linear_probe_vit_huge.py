"""Linear probe of ViT-H/14 like linear_probe_vit_base.py; the authors: 76.6 %, released weights 77.2 %. Not run here.

python main.py --config=configs/linear_probe_vit_huge.py --config.init_from=runs/vit_huge --config.data.path=DATA"""

from configs import linear_probe_vit_base


def get_config():
    return linear_probe_vit_base.get_config("huge")
