"""The training step, for `benchmarks.turns`: it runs in a process of its own."""

import importlib
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

MATMUL_SIZES = {"cpu": 2048, "gpu": 8192, "tpu": 8192}  # of square matrices


def read_config(model: str, overrides: dict[str, Any]) -> ml_collections.ConfigDict:
    """A config of the library, with pictures made from numbers in place of its data.

    Args:
      model: name of a file in configs/.
      overrides: settings that differ, `{"model.dtype": "float32"}`.
    """
    config = importlib.import_module(f"configs.{model}").get_config()
    with config.unlocked():
        config.update_from_flattened_dict(overrides)
    config.data.name, config.data.num_examples = "synthetic", max(4, config.data.batch_size)
    return config


class JaxStep:
    """The whole step of pre-training, compiled as a run compiles it, on one batch that lies on the device.

    Args:
      peak: measure the rate of large matrix products, too, which takes some seconds.
    """

    def __init__(self, model: str, overrides: dict[str, Any], peak: bool = True):
        config, mesh, objective, plan, self._key, self._step, self.facts = _compile(model, overrides)
        import jax

        from mae_jax.runtime.mesh import batch_sharding, create, put_batch
        from mae_jax.runtime.seeds import make_key

        self._state = create(plan.init, make_key(config.seed, "init"), mesh)
        self._batch = put_batch(random_images(objective.batch["image"].shape), batch_sharding(mesh))
        if peak:
            chips = 1 if jax.default_backend() == "cpu" else jax.device_count()  # a CPU's devices share its cores
            self.facts["matmul_tflops"] = matmul_tflops(config.model.dtype) * chips

    def __call__(self, count: int) -> dict[str, Any]:
        for _ in range(count):
            self._state, scalars = self._step(self._state, self._batch, self._key)
        return {"loss": float(scalars["loss"]), "peak_memory_bytes": _peak_memory_of_jax()}


class CompiledStep:
    """The same step only compiled: it makes no array and tells what it would need, also for a batch of any size."""

    def __init__(self, model: str, overrides: dict[str, Any]):
        *_, self.facts = _compile(model, overrides)

    def __call__(self, count: int) -> dict[str, Any]:
        return {}


def _compile(model: str, overrides: dict[str, Any]) -> tuple:
    """(config, mesh, what is trained, plan, key, compiled step, facts) of a config's pre-training."""
    from mae_jax.runtime.platform import keep_freed_memory

    keep_freed_memory()  # as main.py does
    import jax

    from mae_jax.objectives.pretrain import Pretraining
    from mae_jax.runtime.mesh import make_mesh, prepare_cpu
    from mae_jax.training.plan import compile_train_step, make_plan, make_train_key, memory_in_bytes

    config = read_config(model, overrides)
    prepare_cpu(config.mesh)
    mesh = make_mesh(config.mesh)
    objective = Pretraining(config, Path(tempfile.gettempdir()), mesh)
    plan = make_plan(config, objective, mesh)
    key = make_train_key(config.seed, mesh)
    start = time.perf_counter()
    step = compile_train_step(plan.step_fn, plan.abstract, objective.batch, key, mesh)
    device = jax.devices()[0]
    facts = {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "flops": objective.train_flops(objective.model.image_size),
        "compile_seconds": time.perf_counter() - start,
        "memory_bytes": memory_in_bytes(step),
    }
    return config, mesh, objective, plan, key, step, facts


def random_images(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {"image": np.random.default_rng(0).integers(0, 256, shape, np.uint8)}


def _peak_memory_of_jax() -> int:
    import jax

    stats = jax.devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats else peak_resident()


def peak_resident() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts in KiB


def matmul_tflops(dtype: str) -> float:
    """The best rate of one device in products of large square matrices, in TFLOP/s: the median of five."""
    import jax

    size = MATMUL_SIZES.get(jax.default_backend(), 4096)

    @jax.jit
    def chain(x, y):  # the host's part is that of one call
        for _ in range(8):
            y = x @ y
        return y

    x = jax.random.normal(jax.random.key(0), (size, size), dtype) * size**-0.5
    y = jax.block_until_ready(chain(x, x))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(chain(x, y))
        seconds.append(time.perf_counter() - start)
    return 8 * 2 * size**3 / sorted(seconds)[2] / 1e12
