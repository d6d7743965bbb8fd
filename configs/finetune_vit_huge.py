"""Fine-tunes ViT-H/14 on ImageNet-1k like finetune_vit_base.py; the authors report 86.9 %. Not run here.

python main.py --config=configs/finetune_vit_huge.py --config.init_from=runs/vit_huge --config.data.path=DATA_DIR"""

from configs import finetune_vit_large
from mae_jax.models.config import SIZES


def get_config():
    config = finetune_vit_large.get_config()
    config.model.update(SIZES["huge"])
    config.classifier.drop_path = 0.3
    return config
