"""Writes a checkpoint, or anything else that init_from takes, in the format of another program, or as a program.

    python main.py --config=configs/export.py --config.init_from=runs/digits --config.format=huggingface --workdir=DIR

    huggingface  config.json, preprocessor_config.json, model.safetensors: ViTMAEForPreTraining.from_pretrained(DIR);
                 an encoder is a ViTModel, a classifier with classifier.pool=class a ViTForImageClassification
    facebook     model.pth, as facebookresearch/mae writes it (needs PyTorch)
    timm         config.json, model.safetensors: timm.create_model("local-dir:DIR"); encoders and classifiers
    stablehlo    programs of jax.export for CPUs, NVIDIA's GPUs and TPUs at once, which need JAX alone
    onnx         programs for ONNX runtimes (needs the package onnx)

A program takes any number of resized and cropped pictures, and normalises them itself. encoder.* gives the tokens, of a
classifier classifier.* its outputs, of an autoencoder reconstruction.* prediction and mask. about.json says the rest.
--config.encoder_only=True leaves out the decoder or the head. DIR must be empty or hold an earlier export."""

from configs import common


def get_config():
    config = common.of_checkpoint("export")
    config.format = "huggingface"
    return config
