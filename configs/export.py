"""Writes a checkpoint as files that other programs load: Hugging Face, facebookresearch/mae, timm.

    python main.py --config=configs/export.py --config.init_from=runs/digits --config.format=huggingface --workdir=DIR
    python main.py --config=configs/export.py --config.init_from=runs/finetune_digits --config.format=facebook

    huggingface  config.json, preprocessor_config.json, model.safetensors: ViTMAEForPreTraining.from_pretrained(DIR);
                 of an encoder ViTModel, of a classifier ViTForImageClassification (with classifier.pool=mean_norm
                 BeitForImageClassification, since transformers' ViT has no such pool)
    facebook     model.pth, as facebookresearch/mae writes (needs PyTorch)
    timm         config.json, model.safetensors: timm.create_model("local-dir:DIR"); of encoders and classifiers

--config.encoder_only=True leaves the decoder, or the head, out. DIR must be empty, or an earlier export. What can be
exported is whatever init_from takes, so this also turns files of one kind into those of another.
"""

import ml_collections

from configs import common


def get_config() -> ml_collections.ConfigDict:
    config = common.get_config()
    config.task = "export"
    config.data.name = None  # the checkpoint's
    config.format = "huggingface"
    return config
