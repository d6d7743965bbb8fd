"""Later additions to masked autoencoders, one at a time; configs/common.py explains them and names their sources.

python main.py --config=configs/ablations/ideas.py[:BASE]"""

from configs.ablations import base as bases


def get_config(base: str = "digits"):
    config = bases.begin(base)
    half = config.model.image_size // 2
    rows = {
        "baseline": {},
        "masks of 2 x 2 patches": {"model.mask_cell": 2},
        "4 class tokens": {"model.class_tokens": 4},
        "4 registers": {"model.registers": 4},
        "decoder twice as deep": {"model.decoder_depth": 2 * config.model.decoder_depth},
        "cross-attention decoder": {"model.decoder_attention": "cross"},
        "the same, 25 % predicted": {"model.decoder_attention": "cross", "model.prediction_ratio": 0.25},
        "4 masks an image": {"model.masks_per_image": 4},
        "moving average": {"train.ema_decay": 0.99 if base == "digits" else 0.9999},
        "uniformity": {"model.uniformity": 0.01},
        "normed queries and keys": {"model.qk_norm": True},
        "half the size at first": {"train.resolutions": ((0.5, half),)},
        "Muon": {"optimizer.name": "muon"},
    }
    return bases.vary(config, rows, "ideas of others")
