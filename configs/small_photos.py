"""Your own photographs on a laptop's CPU or one small GPU: 6 blocks x 192 at 64 pixels, 64 patches, 16 visible.

    python main.py --config=configs/small_photos.py --config.data.path=FOLDER --workdir=runs/photos

Measured on 2 x86 cores: 290 images a second, 17 s for an epoch of 5,000 pictures. On 5,000 pictures of CIFAR-10
(`--config.train.epochs=8`, 178 s), k-NN gets 38.2 % of 500 pictures right (a random encoder 29.0 %), logistic
regression 47.4 % (40.2 %); ten epochs of 2,000 pictures are too few. The 200 epochs have not been run."""

from configs import common


def get_config():
    config = common.get_config()
    config.model.update(image_size=64, patch_size=8, dtype="float32", width=192, depth=6, num_heads=3)
    config.model.update(decoder_width=128, decoder_depth=2, decoder_num_heads=4)
    config.data.update(name="image_folder", batch_size=64)
    config.train.update(epochs=200.0, log_every_steps=20)
    config.optimizer.update(base_learning_rate=4e-3, warmup_epochs=10.0)  # a peak of 1e-3 at batch 64
    config.checkpoint.every_steps = 500
    config.evaluate.every_steps = 1000
    return config
