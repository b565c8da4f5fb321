"""In which dtypes a param group keeps state, reads gradients and sends matrices to their owners and back."""

import torch
from torch import Tensor

from . import polar
from .codec import CastCodec, Codec, SignCodec
from .rule import UpdateRule


def state_dtype(param: Tensor, group: dict) -> torch.dtype:
    """Return the dtype of a parameter's state."""
    return group.get("state_dtype") or param.dtype


def grad_dtype(param: Tensor, group: dict) -> torch.dtype:
    """Return the dtype in which `prepare` gets a gradient of the parameter's own dtype."""
    return torch.promote_types(param.dtype, state_dtype(param, group))


def to_owner_dtype(param: Tensor, group: dict) -> torch.dtype:
    """Return the dtype in which shards travel to the owners: bfloat16 where these compute in it anyway."""
    computed_in = group.get("ns_dtype") or polar.default_dtype(param)
    if "ns_dtype" in group and group.get("ns_form") not in polar.EXACT_FORMS and computed_in == torch.bfloat16:
        return torch.bfloat16
    return grad_dtype(param, group)


def codec_of(rule: UpdateRule, group: dict) -> Codec:
    """Return the codec of a rule's directions: signs at one bit an entry, others in bfloat16, unless told otherwise."""
    if wire_dtype := group.get("wire_dtype"):
        return CastCodec(wire_dtype)
    return SignCodec() if rule.signs else CastCodec(torch.bfloat16)
