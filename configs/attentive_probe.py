"""Attentive probe of any checkpoint's encoder on any labelled pictures: a learned query pools the frozen patch tokens.

python main.py --config=configs/attentive_probe.py --config.init_from=runs/mine [--config.data.path=FOLDER]

`--config.classifier.pool=abmilp`: a small network weights them instead (AbMILP, arXiv 2412.03215)."""

from configs import linear_probe


def get_config():
    config = linear_probe.get_config()
    config.classifier.pool = "attentive"
    config.optimizer.update(base_learning_rate=1e-2, weight_decay=0.1)
    return config
