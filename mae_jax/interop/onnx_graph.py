"""A graph of ONNX under construction, by the helpers of the onnx package."""

import json
from collections import Counter
from types import ModuleType
from typing import Any

import numpy as np

from mae_jax.runtime.errors import UserError

OPSET, IR_VERSION = 17, 8  # the first operators with LayerNormalization, and the format of their time

Value = str | np.ndarray  # a result's name, or a constant


def import_onnx() -> ModuleType:
    """The onnx package; UserError if it is missing."""
    try:
        import onnx
    except ImportError as error:
        raise UserError("format=onnx needs another package: pip install onnx") from error
    return onnx


class Graph:
    """Nodes and constants; `graph(op, *inputs)` adds a node and returns the names of its results."""

    def __init__(self, name: str):
        self.name, self.onnx = name, import_onnx()
        self._nodes, self._constants, self._counts = [], {}, Counter()
        self._inputs, self._outputs = [], []

    def __call__(self, op: str, *inputs: Value, results: int = 1, **attributes) -> Any:
        """Adds a node; returns the name of its result, or a list of names if there are several."""
        number = self._counts[op] = self._counts[op] + 1
        names = [f"{op}_{number}"] if results == 1 else [f"{op}_{number}_{n}" for n in range(results)]
        inputs = [x if isinstance(x, str) else self.constant(x) for x in inputs]
        self._nodes.append(self.onnx.helper.make_node(op, inputs, names, f"{op}_{number}", **attributes))
        return names[0] if results == 1 else names

    def constant(self, values: np.ndarray) -> str:
        """The name of a constant; equal ones are stored once."""
        values = np.ascontiguousarray(values).reshape(np.shape(values))  # which makes () (1,)
        key = values.dtype.str, values.shape, values.tobytes() if values.size < 16 else id(values)
        if key not in self._constants:  # the array is kept, so that its id stays its own
            name = f"constant_{len(self._constants)}"
            self._constants[key] = values, self.onnx.numpy_helper.from_array(values, name)
        return self._constants[key][1].name

    def input(self, name: str, dtype: np.dtype | str, shape: tuple[int | str, ...]) -> str:
        """Declares an input. Sizes that are not fixed are strings."""
        self._inputs.append(self._info(name, dtype, shape))
        return name

    def output(self, name: str, value: str, shape: tuple[int | str, ...]) -> None:
        """Declares a float32 value of the graph as its output of this name."""
        self._nodes.append(self.onnx.helper.make_node("Identity", [value], [name], name))
        self._outputs.append(self._info(name, np.float32, shape))

    def _info(self, name: str, dtype: np.dtype | str, shape: tuple[int | str, ...]) -> Any:
        code = self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return self.onnx.helper.make_tensor_value_info(name, code, shape)

    def serialize(self, metadata: dict[str, Any], description: str) -> bytes:
        """The model's bytes, checked by `onnx.checker`; metadata's values, unless strings, become JSON."""
        helper, tensors = self.onnx.helper, [tensor for _, tensor in self._constants.values()]
        graph = helper.make_graph(self._nodes, self.name, self._inputs, self._outputs, tensors, description)
        opsets = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="mae_jax")
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
        helper.set_model_props(model, texts)
        self.onnx.checker.check_model(model, full_check=True)
        return model.SerializeToString()
