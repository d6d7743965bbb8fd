"""CIFAR-10 from TFDS: ViT-Ti with patches of 2 pixels (256 patches), raw pixels as targets, no crops.

    python main.py --config=configs/cifar10.py --config.data.path=DATA_DIR [--config.model.patch_size=4]

For a first look or on a CPU take patches of 4 pixels. Settings follow github.com/IcarusWizard/MAE, which reports 89.8 %
fine-tuned after 2,000 epochs at batch 4096; the base rate is higher as the batch is small. Results: docs/results.md."""

from configs import common


def get_config():
    config = common.vit("tiny", image_size=32, patch_size=2, decoder_width=192, decoder_depth=4, decoder_num_heads=3)
    config.model.update(normalize_targets=False, dtype="float32")  # on every chip, as in docs/results.md
    config.data.update(name="cifar10", eval_split="test", batch_size=512, mean=(0.5,), std=(0.5,))
    config.data.update(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), eval_crop=1.0)
    config.train.epochs = 400.0
    config.optimizer.base_learning_rate = 1e-3
    return config
