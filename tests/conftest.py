"""Every test runs on a CPU that pretends to be eight devices; most use only the first."""

import os

# Both must be set before jax is imported. Compiling is most of what the tests wait for, so little is optimised;
# flags of the environment come last and win.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
