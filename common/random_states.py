"""States of Python's, NumPy's and torch's generators as tensors, which can be read without unpickling."""

import random
from typing import cast

import numpy as np
import torch
from torch import Tensor


def random_states() -> dict[str, Tensor]:
    """Return this process's random states by generator: python, numpy, torch and, once CUDA is in use, cuda."""
    version, words, gauss = random.getstate()  # 624 words and a position; a cached normal draw
    python = [version, *words, gauss is not None, gauss or 0.0]
    _, keys, *position = cast(tuple, np.random.get_state())
    states = {
        "python": torch.tensor(python, dtype=torch.float64),  # (628,); words of 32 bits are exact in float64
        "numpy": torch.tensor([*keys.tolist(), *position], dtype=torch.float64),  # (627,)
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, Tensor]) -> None:
    """Set the generators to states from `random_states`."""
    setters = {
        "python": _set_python,
        "numpy": _set_numpy,
        "torch": torch.set_rng_state,
        "cuda": torch.cuda.set_rng_state,
    }
    for generator, state in states.items():
        setters[generator](state)


def _set_python(state: Tensor) -> None:
    version, *words, kept, gauss = state.tolist()
    random.setstate((int(version), tuple(map(int, words)), gauss if kept else None))


def _set_numpy(state: Tensor) -> None:
    *keys, position, kept, gauss = state.tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), int(position), int(kept), gauss))
