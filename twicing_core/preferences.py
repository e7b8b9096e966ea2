"""Which CUDA kernel `auto` takes, or whether it had better take two calls of torch's attention.

Nobody has timed these kernels on a GPU yet: `GUESSES` is arithmetic, with its reason beside each entry. On a machine
with a GPU, `python -m twicing_core.bench --device cuda --save-preferences` times what there is to choose from, and
writes the fastest to ``$TWICING_CACHE/preferences.json`` (or ``~/.cache/twicing``); for that kind of GPU it then replaces
the guesses.

The guesses never name the wavefront: it needs 3 and 7 products instead of 4 and 8, but its blocks wait for each other, and
how long only a device can tell.
"""

from __future__ import annotations

import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

COMPOSED = "composed"
# "long" does every call: two launches. "wavefront" is one launch for causal ones; of its forward there are two sizes.
FORWARD_KERNELS = ("long", "short", "wavefront", "wavefront_lag1")
BACKWARD_KERNELS = ("long", "short", "wavefront")
WAVEFRONT_HEAD_DIM = 128  # at most
REGIMES = ("short", "causal", "full")  # rows of up to SHORT_SEQ positions and heads of up to SHORT_HEAD_DIM; all others
SHORT_SEQ, SHORT_HEAD_DIM = 256, 64


class Preference(NamedTuple):
    """For one regime of one device: kernels, or `COMPOSED`."""

    inference: str  # forward, if no gradient is wanted
    training: str  # the forward if one is; composed goes with composed
    backward: str
    reason: str


_NATIVE = "mma.sync is how this architecture's tensor cores are meant to be used"
_FEWER = "8 products against 10 backward, and O(seq) memory less"
_SHORT = "scores computed once, in one launch each way: 3 products forward and 7 backward against 4 and 10"

# By the major number of the compute capability, then by regime.
GUESSES: dict[int, dict[str, Preference]] = {
    8: {  # A100, RTX 30, L4, RTX 40
        "short": Preference("short", "short", "short", _SHORT),
        "causal": Preference("long", "long", "long", f"{_NATIVE}; {_FEWER}"),
        "full": Preference("long", "long", "long", f"{_NATIVE}; {_FEWER}"),
    },
    9: {  # H100: mma.sync reaches about 62 % of what wgmma does
        "short": Preference("short", "short", "short", _SHORT),
        "causal": Preference(COMPOSED, "long", "long", f"forward, torch may have wgmma; backward, {_FEWER}"),
        "full": Preference(COMPOSED, "long", "long", f"forward, torch may have wgmma; backward, {_FEWER}"),
    },
    10: {  # B200: its tensor cores want tcgen05, and mma.sync reaches less than on H100
        "short": Preference("short", "short", "short", _SHORT),
        "causal": Preference(COMPOSED, COMPOSED, COMPOSED, "torch may have tcgen05, which these kernels have not"),
        "full": Preference(COMPOSED, COMPOSED, COMPOSED, "torch may have tcgen05, which these kernels have not"),
    },
    12: {  # RTX 50, RTX PRO
        "short": Preference("short", "short", "short", _SHORT),
        "causal": Preference("long", "long", "long", f"{_NATIVE}; {_FEWER}"),
        "full": Preference("long", "long", "long", f"{_NATIVE}; {_FEWER}"),
    },
}


def regime(seq: int, head_dim: int, is_causal: bool) -> str:
    """Returns which of `REGIMES` a call belongs to."""
    if seq <= SHORT_SEQ and head_dim <= SHORT_HEAD_DIM:
        return "short"
    return "causal" if is_causal else "full"


def fits(kernel: str, seq: int, head_dim: int, is_causal: bool) -> bool:
    """Whether a kernel does such calls."""
    if kernel == "short":
        return regime(seq, head_dim, is_causal) == "short"
    return kernel == "long" or (is_causal and head_dim <= WAVEFRONT_HEAD_DIM)


def preference_of(query: Tensor, is_causal: bool) -> Preference:
    """Returns what is preferred for a call with this query, (batch, heads, seq, head_dim) on a CUDA device."""
    name = regime(query.shape[2], query.shape[3], is_causal)
    return Preference(*_preference(query.device.index, name))


def forward_kernel(query: Tensor, is_causal: bool, training: bool) -> str:
    """Returns the kernel for a forward that is not left to two calls of torch's attention; of the CPU's one, any name."""
    if query.device.type != "cuda":
        return "long"
    preference = preference_of(query, is_causal)
    return _fitting(preference.training if training else preference.inference, query, is_causal)


def backward_kernel(query: Tensor, is_causal: bool) -> str:
    """Returns the kernel for the backward of a call that `forward_kernel` was asked for."""
    if query.device.type != "cuda":
        return "long"
    return _fitting(preference_of(query, is_causal).backward, query, is_causal)


def _fitting(preferred: str, query: Tensor, is_causal: bool) -> str:
    _, _, seq, head_dim = query.shape
    return preferred if preferred != COMPOSED and fits(preferred, seq, head_dim, is_causal) else "long"


def guess(capability: tuple[int, int]) -> dict[str, Preference]:
    """Returns the guesses for an architecture; what is not in the table is like the one before it."""
    return GUESSES[max(major for major in GUESSES if major <= capability[0])]


@cache
def _preference(device_index: int, regime: str) -> tuple[str, str, str, str]:
    properties = torch.cuda.get_device_properties(device_index)
    measured = load().get(properties.name, {})
    inference, training, backward, reason = measured.get(regime) or guess((properties.major, properties.minor))[regime]
    return inference, training, backward, reason  # no class of ours, which a graph being compiled could not keep


# A graph being compiled takes the answer as a constant; see fused.py.
_preference._dynamo_marked_constant = True  # type: ignore[attr-defined]


def path() -> Path:
    """Where measured preferences are kept."""
    from twicing_core.build import cache_directory  # here, so that `python -m twicing_core.build` is imported once

    return cache_directory() / "preferences.json"


def load() -> dict[str, dict[str, Preference]]:
    """Returns what was measured, by device name and regime; nothing, with one warning, if the file is damaged."""
    try:
        return parse(path().read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"twicing_core: {path()} is not used ({error}); measure again, or delete it", stacklevel=2)
        return {}


def parse(text: str) -> dict[str, dict[str, Preference]]:
    """Reads the file: ``{device name: {regime: {"inference": ..., "training": ..., "backward": ...}}}``.

    Raises:
        ValueError: it is not that; the message names the place, the value and what is allowed.
    """
    result: dict[str, dict[str, Preference]] = {}
    for device, regimes in _mapping(json.loads(text), "the file").items():
        result[device] = {}
        for name, choices in _mapping(regimes, device).items():
            place = f"{device}, {name}"
            if name not in REGIMES:
                raise ValueError(f"{place}: the regimes are {', '.join(REGIMES)}")
            choices = _mapping(choices, place)
            if set(choices) != {"inference", "training", "backward"}:
                raise ValueError(f"{place}: must have inference, training and backward, has {', '.join(choices)}")
            for key, choice in choices.items():
                allowed = (*(BACKWARD_KERNELS if key == "backward" else FORWARD_KERNELS), COMPOSED)
                if choice not in allowed:
                    raise ValueError(f"{place}, {key} is {choice!r}; it may be {', '.join(allowed)}")
            if (choices["training"] == COMPOSED) != (choices["backward"] == COMPOSED):
                raise ValueError(f"{place}: training and backward are both {COMPOSED}, or neither")
            result[device][name] = Preference(**choices, reason="measured on this device")
    return result


def save(device: str, measured: dict[str, Preference]) -> Path:
    """Replaces what is kept of a device by what was measured, and returns the file's path."""
    kept = load() | {device: measured}
    text = {
        name: {regime: dict(list(chosen._asdict().items())[:3]) for regime, chosen in regimes.items()}
        for name, regimes in kept.items()
    }
    path().parent.mkdir(parents=True, exist_ok=True)
    path().write_text(json.dumps(text, indent=2) + "\n")
    _preference.cache_clear()
    return path()


def _mapping(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{place} must be an object, got {value!r}")
    return value
