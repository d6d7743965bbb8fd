"""Linear probe of ViT-L/16 like linear_probe_vit_base.py; the authors: 75.8 %, released weights 76.0 %. Not run here.

python main.py --config=configs/linear_probe_vit_large.py --config.init_from=runs/vit_large --config.data.path=DATA"""

from configs import linear_probe_vit_base


def get_config():
    return linear_probe_vit_base.get_config("large")
