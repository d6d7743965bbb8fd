"""Programs in ONNX: encoder, classifier and reconstruction, written node by node from the parameters."""

from typing import Any

import numpy as np

from mae_jax.data.augment import unit_range
from mae_jax.data.processor import Processor
from mae_jax.interop.onnx_graph import Graph, import_onnx
from mae_jax.interop.onnx_layers import (
    attend,
    integers,
    layer_norm,
    linear,
    number,
    repeated,
    run_blocks,
    take_patches,
)
from mae_jax.interop.programs import Program, picture_processor, visible_by_noise
from mae_jax.interop.workdirs import Weights
from mae_jax.models.classifier import BATCH_NORM_EPSILON
from mae_jax.models.config import MAEConfig
from mae_jax.models.positions import sincos_table
from mae_jax.runtime.errors import UserError

TARGETS = ("pixels", "normalized_pixels", "principal_components")


def check(weights: Weights) -> None:
    """Raises UserError if a model cannot be written, or a package is missing."""
    import_onnx()
    target = MAEConfig(**weights.config["model"]).target_name
    if "decoder" in weights.params and target not in TARGETS:
        remedy = "export format=stablehlo, or the encoder: --config.encoder_only=True"
        raise UserError(f"format=onnx has no model.target={target}: {remedy}")


def serialize(weights: Weights, program: Program, about: dict[str, Any]) -> bytes:
    """A program for any number of pictures, with its weights, and `about` in its metadata_props."""
    model, processor = MAEConfig(**weights.config["model"]), picture_processor(weights)
    vit = Vit(Graph(program.name), model, weights.params)
    pictures = vit.graph.input("pictures", processor.dtype, ("batch", *model.image_size, model.channels))
    patches, mask = vit.patches_of(normalized(vit.graph, pictures, processor)), None
    if program.name == "reconstruction":
        noise = vit.graph.input("noise", np.float32, ("batch", model.num_patches))
        prediction, mask = vit.reconstruct(patches, noise)
        vit.graph.output("prediction", prediction, ("batch", model.num_patches, model.patch_dim))
        vit.graph.output("mask", mask, ("batch", model.num_patches))
    elif program.name == "classifier":
        settings = weights.config["classifier"]
        (name,) = program.outputs
        units = (weights.config.get("number_mean"), weights.config.get("number_std"))
        vit.graph.output(name, vit.classify(patches, settings["pool"], units), ("batch", settings["num_classes"]))
    else:
        tokens = vit.norm(vit.encode(patches))
        vit.graph.output("features", tokens, ("batch", model.class_tokens + model.num_patches, model.width))
    own = about["programs"][program.name]
    return vit.graph.serialize({key: value for key, value in about.items() if key != "programs"} | own, program.name)


def normalized(graph: Graph, pictures: str, processor: Processor) -> str:
    """`data.augment.normalize` of pictures [b, h, w, c]."""
    x, (low, high) = graph("Cast", pictures, to=graph.onnx.TensorProto.FLOAT), unit_range(processor)
    if processor.value_range is not None:
        x = graph("Sub", graph("Clip", x, number(low), number(high)), number(low))
    if (low, high) != (0, 1):
        x = graph("Div", x, number(high - low))
    x = graph("Div", graph("Sub", x, np.float32(processor.mean)), np.float32(processor.std))
    if np.issubdtype(processor.dtype, np.floating):  # no data
        x = graph("Where", graph("IsNaN", x), number(0), x)
    return x


class Vit:
    """The parts of a model, which add their nodes to a graph; `b` is the number of pictures."""

    def __init__(self, graph: Graph, model: MAEConfig, params: dict[str, Any]):
        self.graph, self.model, self.params = graph, model, params
        self._batch = None

    def patches_of(self, images: str) -> str:
        """[b, h, w, c] -> [b, L, p*p*c]; call it first, since the others need its number of pictures."""
        (rows, columns), p, c = self.model.grid, self.model.patch_size, self.model.channels
        self._batch = self.graph("Shape", images, start=0, end=1)
        split = self.graph("Reshape", images, integers(0, rows, p, columns, p * c))
        split = self.graph("Transpose", split, perm=(0, 1, 3, 2, 4))
        return self.graph("Reshape", split, integers(0, rows * columns, p * p * c))

    def encode(self, patches: str, ids_keep: str | None = None, mask: str | None = None) -> str:
        """Tokens [b, C + K, D] before the final norm; see `Encoder.__call__`, with a mask [b, L] for `hidden`."""
        graph, model, params = self.graph, self.model, self.params["encoder"]
        table = self._table("encoder")
        positions, class_token = table[None, 1:], params["class_token"] + table[0]
        if ids_keep is not None:
            patches, positions = take_patches(graph, patches, ids_keep), graph("Gather", positions[0], ids_keep)
        x = linear(graph, patches, params["patch_embed"])
        if mask is not None:
            hidden = graph("Unsqueeze", graph("Greater", mask, number(0)), integers(2))
            x = graph("Where", hidden, self.params["decoder"]["mask_token"], x)
        first = [repeated(graph, self._batch, class_token)]
        if model.registers:
            first.append(repeated(graph, self._batch, params["registers"]))
        x = graph("Concat", *first, graph("Add", x, positions), axis=1)
        x = run_blocks(graph, x, params["blocks"], model.blocks)
        if model.registers:
            classes, rest = self._split(x, model.class_tokens)
            x = graph("Concat", classes, self._split(rest, model.registers)[1], axis=1)
        return x

    def norm(self, x: str) -> str:
        return layer_norm(self.graph, x, self.params["encoder"]["norm"], self.model.norm_epsilon)

    def classify(self, patches: str, pool: str, units: tuple) -> str:
        """The outputs [b, K] of `Classifier`."""
        graph, head = self.graph, self.params["head"]
        classes, tokens = self._split(self.encode(patches), self.model.class_tokens)
        if pool == "mean_norm":
            x = self.norm(self._mean(tokens))
        elif pool == "attentive":
            x = self._attentive(self.norm(tokens), head["pool"])
        elif pool == "abmilp":
            x = self._abmilp(self.norm(tokens), head["pool"])
        else:
            x = self._mean(self.norm(classes if pool == "class" else tokens))
        if norm := head.get("batch_norm"):
            x = graph("Sub", x, norm["mean"])
            x = graph("Mul", x, np.float32(1 / np.sqrt(norm["variance"] + BATCH_NORM_EPSILON)))
        x, (mean, std) = linear(graph, x, head["linear"]), units
        return graph("Add", graph("Mul", x, np.float32(std)), np.float32(mean)) if std else x

    def _mean(self, tokens: str) -> str:
        return self.graph("ReduceMean", tokens, axes=(1,), keepdims=0)

    def _attentive(self, tokens: str, params: dict[str, Any]) -> str:
        query = repeated(self.graph, self._batch, params["query"])
        keys, values = linear(self.graph, tokens, params["key"]), linear(self.graph, tokens, params["value"])
        attended = attend(self.graph, query, keys, values, self.model.num_heads, self.model.width)
        return self.graph("Squeeze", attended, integers(1))

    def _abmilp(self, tokens: str, params: dict[str, Any]) -> str:
        keys, query = self.graph("Tanh", linear(self.graph, tokens, params["key"])), params["query"][:, None]
        weights = self.graph("Softmax", self.graph("MatMul", keys, query), axis=1)  # [b, L, 1]
        return self.graph("ReduceSum", self.graph("Mul", weights, tokens), integers(1), keepdims=0)

    def reconstruct(self, patches: str, noise: str) -> tuple[str, str]:
        """Prediction [b, L, p*p*C] and mask [b, L] by noise [b, L]."""
        graph, model, params = self.graph, self.model, self.params["decoder"]
        visible, classes = visible_by_noise(model), model.class_tokens
        order = self._order(noise)
        restore = self._order(order)
        mask = graph("Cast", graph("GreaterOrEqual", restore, integers(visible)), to=graph.onnx.TensorProto.FLOAT)
        if model.encoder_mask_tokens:
            x = self.norm(self.encode(patches, mask=mask))
        else:
            x = self.norm(self.encode(patches, ids_keep=self._split(order, visible)[0]))
        table, memory = self._table("decoder"), None
        if model.decoder_attention == "cross":
            memory, classes = x, 0
            x = repeated(graph, self._batch, params["mask_token"] + table[None, 1:])
        else:
            x = linear(graph, x, params["embed"])
            if not model.encoder_mask_tokens:
                first, seen = self._split(x, classes)
                hidden = np.tile(params["mask_token"], (1, model.num_patches - visible, 1))
                shuffled = graph("Concat", seen, repeated(graph, self._batch, hidden), axis=1)
                x = graph("Concat", first, take_patches(graph, shuffled, restore), axis=1)
            x = graph("Add", x, np.concatenate([np.repeat(table[:1], classes, axis=0), table[1:]]))
        x = run_blocks(graph, x, params["blocks"], model.decoder_blocks, memory)
        x = self._split(x, classes)[1] if classes else x
        prediction = linear(graph, layer_norm(graph, x, params["norm"], model.norm_epsilon), params["predict"])
        if model.target_name == "principal_components":
            basis = params["basis"]
            prediction = graph("Add", graph("MatMul", prediction, basis["components"]), basis["mean"])
        return prediction, mask

    def _table(self, part: str) -> np.ndarray:
        """Positions [1 + L, D]."""
        width = self.model.width if part == "encoder" else self.model.decoder_width
        return self.params[part].get("positions", sincos_table(self.model.grid, width))

    def _order(self, values: str) -> str:
        """The places [b, L] of values [b, L], int64, from the smallest value on; of equal ones, the earlier first."""
        return self.graph("TopK", values, integers(self.model.num_patches), results=2, axis=1, largest=0)[1]

    def _split(self, x: str, first: int) -> tuple[str, str]:
        """The first places of axis 1, and the others."""
        end, axis = integers(np.iinfo(np.int64).max), integers(1)
        before = self.graph("Slice", x, integers(0), integers(first), axis)
        return before, self.graph("Slice", x, integers(first), end, axis)
