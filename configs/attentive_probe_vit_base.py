"""Attentive probe of ViT-B/16 on ImageNet-1k, with the pool of CAE (arXiv 2202.03026), AIM (2401.08541). Not run here.

python main.py --config=configs/attentive_probe_vit_base.py --config.init_from=runs/vit_base --config.data.path=DATA"""

from configs import linear_probe_vit_base


def get_config():
    config = linear_probe_vit_base.get_config()
    config.classifier.pool = "attentive"
    config.data.update(batch_size=4096, crop_rule="retry")
    config.optimizer.update(name="adamw", base_learning_rate=1e-4, b2=0.999, weight_decay=0.1)
    config.evaluate.every_steps = 3120  # ten epochs
    return config
