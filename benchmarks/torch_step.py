"""PyTorch's training step, for `benchmarks.turns`: it runs in a process of its own."""

import functools
import time
from typing import Any

import numpy as np

from benchmarks.jax_step import peak_resident, random_images, read_config


class TorchStep:
    """The same step with Hugging Face's ViTMAE and PyTorch's AdamW.

    On a GPU products are bfloat16 by autocast where the config's are, and AdamW is the fused one. `compiled`: by
    torch.compile. The attention is `scaled_dot_product_attention`.
    """

    def __init__(self, model: str, overrides: dict[str, Any], compiled: bool):
        import torch
        from transformers import ViTMAEConfig, ViTMAEForPreTraining

        from mae_jax.models.config import MAEConfig
        from mae_jax.training.optimizers import peak_learning_rate

        config = read_config(model, overrides)
        ours = MAEConfig(**config.model)
        self._torch = torch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = ours.dtype != "float32"
        theirs = ViTMAEConfig(
            hidden_size=ours.width, num_hidden_layers=ours.depth, num_attention_heads=ours.num_heads,
            intermediate_size=ours.blocks.mlp_width, hidden_act="gelu", image_size=ours.image_size,
            patch_size=ours.patch_size, num_channels=ours.channels, qkv_bias=ours.qkv_bias,
            decoder_hidden_size=ours.decoder_width, decoder_num_hidden_layers=ours.decoder_depth,
            decoder_num_attention_heads=ours.decoder_num_heads,
            decoder_intermediate_size=ours.decoder_blocks.mlp_width, mask_ratio=ours.mask_ratio,
            norm_pix_loss=ours.normalize_targets, layer_norm_eps=ours.norm_epsilon, attn_implementation="sdpa",
        )  # fmt: skip
        self._model = ViTMAEForPreTraining(theirs).to(self._device).train()
        decayed = [p for p in self._model.parameters() if p.requires_grad and p.ndim > 1]
        others = [p for p in self._model.parameters() if p.requires_grad and p.ndim <= 1]
        settings = config.optimizer
        self._optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=peak_learning_rate(settings, config.data.batch_size), betas=(settings.b1, settings.b2),
            fused=self._device == "cuda",
        )  # fmt: skip
        shape = (config.data.batch_size, *ours.image_size, ours.channels)
        images = random_images(shape)["image"].transpose(0, 3, 1, 2)
        self._images = torch.from_numpy(np.ascontiguousarray(images)).to(self._device)
        as_tensor = functools.partial(torch.tensor, device=self._device)
        self._mean, self._std = (as_tensor(value)[:, None, None] for value in (config.data.mean, config.data.std))
        self._flip = config.data.flip
        self._autocast = functools.partial(
            torch.autocast, self._device, dtype=torch.bfloat16, enabled=ours.dtype == "bfloat16"
        )
        self._loss = torch.compile(self._forward) if compiled else self._forward
        start = time.perf_counter()
        self(1)
        self.facts = {"torch": torch.__version__, "compile_seconds": time.perf_counter() - start}

    def _forward(self, images):
        images = (images.float() / 255 - self._mean) / self._std
        with self._autocast():
            return self._model(images).loss

    def __call__(self, count: int) -> dict[str, Any]:
        torch = self._torch
        for _ in range(count):
            images = self._images
            if self._flip:
                flip = torch.rand(len(images), device=self._device) < 0.5
                images = torch.where(flip[:, None, None, None], images.flip(-1), images)
            loss = self._loss(images)
            loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        memory = torch.cuda.max_memory_allocated() if self._device == "cuda" else peak_resident()
        return {"loss": loss.item(), "peak_memory_bytes": memory}
