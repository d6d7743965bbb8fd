"""Your own pictures: a folder of class folders, or a flat folder without labels; ViT-Ti at 224 pixels.

    python main.py --config=configs/image_folder.py --config.data.path=FOLDER --workdir=runs/mine

FOLDER/train and FOLDER/validation (or Training, val, valid, test, ..., in any case) are the splits; without them a
tenth of each class is held out. For one GPU or a patient CPU (2 shared cores: 11 to 20 images a second). For a larger
encoder, change one line: `config = common.vit("small")`."""

from configs import common


def get_config():
    config = common.vit("tiny", decoder_width=192, decoder_depth=4, decoder_num_heads=3)
    config.data.update(name="image_folder", batch_size=64)
    config.train.update(epochs=400.0, log_every_steps=10)
    config.checkpoint.every_steps = 500
    return config
