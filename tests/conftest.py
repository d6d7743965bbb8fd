"""Every test runs on a CPU that pretends to be eight devices; most use only the first."""

import os

# Both must be set before jax is imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
