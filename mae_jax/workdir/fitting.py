"""Which settings may be others when a run goes on from a checkpoint."""

from typing import Any

from mae_jax.runtime.errors import UserError
from mae_jax.settings.fields import flatten

# A run goes on only if these settings are as they were: they define the parameters, the objective, or one's place in
# the data. Compute settings among them may differ.
FIXED = (
    "task", "seed", "model.", "classifier.", "data.name", "data.batch_size", "data.seed", "data.label_fraction",
    "data.stratify", "data.value_range", "optimizer.name", "train.ema_decay", "class_names",
)  # fmt: skip
FREE = ("model.dtype", "model.remat", "model.scan_unroll")


def changed_settings(saved: dict, config: dict) -> dict[str, tuple[Any, Any]]:
    """Settings that differ: {key: (saved value, present value)}; those that did not exist when it was saved do not."""
    old, new = flatten(saved), flatten(config)
    # `given` says where values come from, and is no setting itself.
    return {key: (value, new.get(key)) for key, value in old.items() if value != new.get(key) and key != "given"}


def check_fits(saved: dict, config: dict, name: str) -> None:
    """Raises UserError if a run with this config cannot go on from a checkpoint that was saved with another."""
    for key, (old, new) in changed_settings(saved, config).items():
        if key.startswith(FIXED) and key not in FREE:
            raise UserError(
                f"{name} does not fit: it has {key}={old!r}, this run {key}={new!r}; "
                f"set --config.{key} back, or start in another --workdir (with --config.init_from to keep the weights)"
            )
