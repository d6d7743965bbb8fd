"""The layers of models/layers.py as nodes of ONNX, with parameters as nested dicts of arrays."""

from typing import Any

import numpy as np

from mae_jax.interop.onnx_graph import Graph
from mae_jax.models.layers import BlockConfig


def number(value: float) -> np.ndarray:
    return np.array(value, np.float32)


def integers(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def linear(graph: Graph, x: str, params: dict[str, Any]) -> str:
    """[..., i] -> [..., o]."""
    kernel = np.asarray(params["kernel"])
    product = graph("MatMul", x, kernel.reshape(len(kernel), -1))
    return graph("Add", product, params["bias"].reshape(-1)) if "bias" in params else product


def layer_norm(graph: Graph, x: str, params: dict[str, Any], epsilon: float) -> str:
    """LayerNorm over the last axis, with a bias if there is one."""
    values = [params["scale"]] + ([params["bias"]] if "bias" in params else [])
    return graph("LayerNormalization", x, *values, axis=-1, epsilon=epsilon)


def take_patches(graph: Graph, x: str, ids: str) -> str:
    """Rows ids [b, k] of x [b, n, d]: [b, k, d]."""
    return graph("GatherND", x, graph("Unsqueeze", ids, integers(2)), batch_dims=1)


def repeated(graph: Graph, batch: str, token: np.ndarray) -> str:
    """Tokens [1, n, d] for each picture of a batch, whose size is the int64 [1] `batch`: [b, n, d]."""
    return graph("Expand", token, graph("Concat", batch, integers(*token.shape[1:]), axis=0))


def activate(graph: Graph, x: str, name: str) -> str:
    """An activation by its name in `layers.ACTIVATIONS`."""
    if name == "gelu":  # exact; runtimes know this form and compute it at once
        inner = graph("Add", graph("Erf", graph("Div", x, number(2**0.5))), number(1))
        return graph("Mul", graph("Mul", x, inner), number(0.5))
    if name == "gelu_tanh":
        cubic = graph("Mul", graph("Mul", graph("Mul", x, x), x), number(0.044715))
        inner = graph("Tanh", graph("Mul", graph("Add", x, cubic), number((2 / np.pi) ** 0.5)))
        return graph("Mul", graph("Mul", x, graph("Add", inner, number(1))), number(0.5))
    if name == "quick_gelu":
        return graph("Mul", x, graph("Sigmoid", graph("Mul", x, number(1.702))))
    if name == "silu":
        return graph("Mul", x, graph("Sigmoid", x))
    if name == "mish":
        return graph("Mul", x, graph("Tanh", graph("Softplus", x)))
    if name == "leaky_relu":
        return graph("LeakyRelu", x, alpha=0.01)
    if name == "relu6":
        return graph("Clip", x, number(0), number(6))
    return graph({"relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh"}[name], x)


def attend(graph: Graph, q: str, k: str, v: str, num_heads: int, width: int, norms: tuple = ()) -> str:
    """softmax(q k^T / sqrt(head width)) v of [b, n, d], by heads; `norms` are called with queries and keys by head."""
    head_width = width // num_heads

    def by_head(x):  # [b, n, d] -> [b, n, heads, head width]
        return graph("Reshape", x, integers(0, 0, num_heads, head_width))

    q, k, v = by_head(q), by_head(k), by_head(v)
    if norms:
        q, k = (norm(x) for norm, x in zip(norms, (q, k), strict=True))
    q = graph("Mul", graph("Transpose", q, perm=(0, 2, 1, 3)), number(head_width**-0.5))
    logits = graph("MatMul", q, graph("Transpose", k, perm=(0, 2, 3, 1)))
    attended = graph("MatMul", graph("Softmax", logits, axis=-1), graph("Transpose", v, perm=(0, 2, 1, 3)))
    return graph("Reshape", graph("Transpose", attended, perm=(0, 2, 1, 3)), integers(0, 0, width))


def attention(graph: Graph, x: str, params: dict[str, Any], config: BlockConfig, memory: str | None) -> str:
    """Self-attention, or cross-attention to a memory."""
    if memory is None:
        q, k, v = graph("Split", linear(graph, x, params["qkv"]), integers(*[config.width] * 3), results=3, axis=-1)
    else:
        q = linear(graph, x, params["q"])
        k, v = graph("Split", linear(graph, memory, params["kv"]), integers(*[config.width] * 2), results=2, axis=-1)
    norms = ()
    if config.qk_norm:
        norms = tuple(
            lambda x, name=name: layer_norm(graph, x, params[name], config.epsilon) for name in ("q_norm", "k_norm")
        )
    return linear(graph, attend(graph, q, k, v, config.num_heads, config.width, norms), params["out"])


def run_blocks(graph: Graph, x: str, stacked: dict[str, Any], config: BlockConfig, memory: str | None = None) -> str:
    """Stacked blocks, one after the other: [b, n, d] -> [b, n, d]."""
    for n in range(len(stacked["norm1"]["scale"])):
        params = _of_block(stacked, n)
        normed = layer_norm(graph, x, params["norm1"], config.epsilon)
        x = graph("Add", x, attention(graph, normed, params["attention"], config, memory))
        hidden = linear(graph, layer_norm(graph, x, params["norm2"], config.epsilon), params["mlp"]["fc1"])
        x = graph("Add", x, linear(graph, activate(graph, hidden, config.activation), params["mlp"]["fc2"]))
    return x


def _of_block(stacked: Any, n: int) -> Any:
    return {name: _of_block(part, n) for name, part in stacked.items()} if isinstance(stacked, dict) else stacked[n]
