"""Fine-tunes ViT-L/16 on ImageNet-1k like finetune_vit_base.py; the authors report 85.9 %. Not run here.

python main.py --config=configs/finetune_vit_large.py --config.init_from=runs/vit_large --config.data.path=DATA_DIR"""

from configs import finetune_vit_base
from mae_jax.models.config import SIZES


def get_config():
    config = finetune_vit_base.get_config()
    config.model.update(SIZES["large"])
    config.classifier.drop_path = 0.2
    config.train.epochs = 50.0
    config.optimizer.update(base_learning_rate=1e-3, layer_decay=0.75)
    return config
