"""The gradient that another rank holds, against the gradient itself."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from optimizers.elsewhere import Elsewhere


def pair_of_parameters(norm: float = 3.0, finite: bool = True) -> tuple[nn.Parameter, nn.Parameter]:
    """Return a parameter whose gradient is on rank 1, of this norm, and one of gradient norm 4."""
    there, here = (nn.Parameter(torch.zeros(2, 2)) for _ in range(2))
    there.grad = Elsewhere(there.detach(), 1, torch.tensor(norm), torch.tensor(finite))
    here.grad = torch.full((2, 2), 2.0)
    return there, here


def present(param: nn.Parameter) -> Tensor:
    assert param.grad is not None
    return param.grad


def test_the_norm_is_the_owner_s_and_others_are_clipped_by_it():
    there, here = pair_of_parameters()
    assert clip_grad_norm_([there, here], 2.5).item() == 5.0  # of 3 and 4
    torch.testing.assert_close(present(here), torch.full((2, 2), 1.0), rtol=1e-6, atol=0)
    assert "on rank 1" in repr(there.grad)
    with pytest.raises(ValueError, match="linalg_vector_norm"):  # known once
        clip_grad_norm_([there, here], 2.5)


@pytest.mark.parametrize("finite", [True, False])
def test_gradscaler_takes_the_owner_s_flag_and_scales_the_norm(finite):
    there, here = pair_of_parameters(norm=12.0, finite=finite)
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=4.0), torch.optim.SGD([there, here], lr=1.0)
    scaler.scale(torch.zeros(()))
    scaler.unscale_(optimizer)
    assert torch.equal(present(here), torch.full((2, 2), 0.5))
    assert torch.linalg.vector_norm(present(there)).item() == 3.0
    scaler.update()
    assert scaler.get_scale() == (4.0 if finite else 2.0)


def test_a_scale_that_rounds_norms_is_refused():
    there, here = pair_of_parameters()
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=3.0), torch.optim.SGD([there, here], lr=1.0)
    scaler.scale(torch.zeros(()))
    with pytest.raises(ValueError, match="power of two"):
        scaler.unscale_(optimizer)


@pytest.mark.parametrize(
    "use",
    [
        lambda grad: grad + 1,
        lambda grad: grad.add_(1),
        lambda grad: grad.sum(),
        lambda grad: grad.clone(),
        lambda grad: torch.linalg.vector_norm(grad, torch.inf),
        lambda grad: torch.ones(2, 2).copy_(grad),
        lambda grad: torch._foreach_mul_([torch.ones(2, 2), grad], 2.0),
        lambda grad: grad.isfinite(),
        lambda grad: grad.tolist(),
        lambda grad: grad.numpy(),
    ],
)
def test_no_entry_is_read(use):
    there, _ = pair_of_parameters()
    with pytest.raises((ValueError, RuntimeError)) as caught:
        use(there.grad)
    assert "\n" not in str(caught.value)
