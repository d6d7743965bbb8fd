"""scikit-learn's 1,797 handwritten digits (8 x 8 grey pixels): real data without a download, on a laptop's CPU.

    python main.py --config=configs/digits.py

Measured on 2 x86 cores (jax 0.10.2): 85 s; linear probe 95.8 % (random encoder 67.5 %), k-NN 93.6 % (49.2 %). There are
360 test digits, so a point is three or four. On raw pixels logistic regression reaches 96.8 %, k-NN 97.4 %."""

from configs import common


def get_config():
    config = common.get_config()
    config.model.update(image_size=8, patch_size=2, channels=1, width=64, depth=4, num_heads=4)
    config.model.update(decoder_width=32, decoder_depth=2, decoder_num_heads=4)
    config.model.dtype = "float32"  # on every chip, as in the README
    config.model.normalize_targets = False  # normalization leaves little of a patch of 2 x 2 grey values
    config.data.update(name="digits", batch_size=64, mean=(0.305,), std=(0.376,))
    # The whole digit, never mirrored.
    config.data.update(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), eval_crop=1.0, flip=False)
    config.train.update(epochs=180.0, log_every_steps=200)
    config.optimizer.update(base_learning_rate=4e-3, warmup_epochs=5.0)
    return config
