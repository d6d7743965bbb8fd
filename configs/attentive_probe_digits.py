"""Attentive probe of the quickstart's encoder on the digits' labels: a learned query pools the frozen patch tokens.

python main.py --config=configs/attentive_probe_digits.py --config.init_from=runs/digits

`--config.classifier.pool=abmilp`: a small network weights them instead (AbMILP, arXiv 2412.03215)."""

from configs import linear_probe_digits


def get_config():
    config = linear_probe_digits.get_config()
    config.classifier.pool = "attentive"
    config.optimizer.update(name="adamw", base_learning_rate=1e-2, b2=0.999, weight_decay=0.1)
    return config
