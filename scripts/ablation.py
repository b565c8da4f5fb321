"""Ablation: trains the small GPT with parts of OLion removed or exchanged.

    python -m scripts.ablation nanoGPT/configs/stdlib.toml --optimizer.name olion_unsigned --optimizer.lr 8e-3
    python -m scripts.sweep nanoGPT/configs/stdlib.toml --module scripts.ablation --optimizers olion_sign_first

All use OLion's momentum and its size of update, RMS 0.2 per entry:

    olion                 sign(orthogonalize(M))
    olion_unsigned        orthogonalize(M): Muon with this momentum
    olion_signs_alone     sign(M): Lion with this momentum
    olion_sign_first      orthogonalize(sign(M))
    olion_sign_twice      sign(orthogonalize(sign(M)))
"""

from dataclasses import replace

from common.config import parse_config
from common.guard import main_guard
from nanoGPT.config import Config

if __name__ == "__main__":  # --help and errors before the imports below, which take seconds
    main_guard(lambda: parse_config(Config))

from torch import Tensor

from optimizers.polar import orthogonalize_group
from optimizers.rule import RULES, register, sign


def _sign(stack: Tensor) -> Tensor:
    return sign([stack])[0]


VARIANTS = {
    "olion_unsigned": (orthogonalize_group, False),
    "olion_signs_alone": (lambda stack, group: _sign(stack), True),
    "olion_sign_first": (lambda stack, group: orthogonalize_group(_sign(stack), group), False),
    "olion_sign_twice": (lambda stack, group: _sign(orthogonalize_group(_sign(stack), group)), True),
}

for name, (direct, signs) in VARIANTS.items():
    register(replace(RULES["olion"], name=name, direct=direct, signs=signs))


def main() -> None:
    from nanoGPT.train import main as train

    train()


if __name__ == "__main__":
    main_guard(main)
