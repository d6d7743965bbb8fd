"""Starts a model of other channels from a checkpoint's weights: the setting `init_channels`."""

from collections.abc import Sequence

import numpy as np

from mae_jax.interop.workdirs import Weights
from mae_jax.models.config import MAEConfig
from mae_jax.runtime.errors import UserError

# Settings `data.*` that say what the values of a channel are.
VALUES = ("bands", "dtype", "value_range", "mean", "std")


def adapt_channels(weights: Weights, channels: int, how: str | Sequence[int | None], path: str) -> Weights:
    """The weights in `path` for a model of so many channels, without settings of the old channels' values.

    The first layer sums over channels. "mean" gives each new one the mean of the old ones' weights, "repeat" the old
    ones' in turn, both times old / new, which keeps the size of the sum. Else `how` names for each new channel its old
    one, or None to start at zero. The decoder predicts each channel by itself, so there nothing is scaled, and None is
    the mean. UserError if `how` does not fit.
    """
    model = weights.config["model"]
    old, here = MAEConfig(**model), f"init_channels={how!r}"
    if isinstance(how, str):
        if old.channels == channels:
            raise UserError(f"{here}: init_from={path} has model.channels={channels} too: leave init_channels out")
        chosen = [None if how == "mean" else n % old.channels for n in range(channels)]
    elif len(how) != channels or not all(n is None or 0 <= n < old.channels for n in how):
        raise UserError(
            f"{here} must have an entry for each of model.channels={channels}: a channel of init_from={path}, from 0 "
            f"to {old.channels - 1}, or None"
        )
    else:
        chosen = list(how)
    # [old, new]: a channel's weights are a column's mixture of the old ones'.
    copied = np.stack([np.zeros(old.channels) if n is None else np.eye(old.channels)[n] for n in chosen], axis=1)
    unknown = ~copied.any(axis=0) / old.channels
    scale = old.channels / channels
    embedding = copied if not isinstance(how, str) else scale * (copied + unknown)
    params = {name: dict(part) for name, part in weights.params.items()}
    kernel = params["encoder"]["patch_embed"]["kernel"]
    mixed = _mixed(kernel.T, embedding).T
    params["encoder"]["patch_embed"] = params["encoder"]["patch_embed"] | {"kernel": mixed}
    notes = [f"weights of {old.channels} channels start a model of {channels}: init_channels={how}"]
    if decoder := params.get("decoder"):
        fitted = decoder.pop("basis", None)
        if old.target_dim == old.patch_dim and not fitted:
            decoder["predict"] = {name: _mixed(x, copied + unknown) for name, x in decoder["predict"].items()}
        else:
            decoder.pop("predict")
            notes.append("the decoder's last layer starts from random weights, since its target is of other channels")
    data = {name: value for name, value in weights.config["data"].items() if name not in (*VALUES, "statistics")}
    config = weights.config | {"model": model | {"channels": channels}, "data": data}
    return weights._replace(config=config, params=params, notes=(*weights.notes, *notes))


def _mixed(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[..., p*p*old] by weights [old, new]: [..., p*p*new]."""
    by_channel = np.asarray(values, np.float64).reshape(*values.shape[:-1], -1, len(weights))
    return (by_channel @ weights).reshape(*values.shape[:-1], -1).astype(values.dtype)
