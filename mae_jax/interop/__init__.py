"""Weights in and out: our own workdirs, facebookresearch/mae, Hugging Face and timm."""
