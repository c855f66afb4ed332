"""Gradients in buffers are autograd's own; what a step does not reach has none."""

import pytest
import torch

from lorakit.training.gradients import Gradients


def layers():
    torch.manual_seed(0)
    return torch.nn.ModuleDict({name: torch.nn.Linear(4, 4) for name in ("used", "sometimes")})


def run(model, x, *, both):
    y = model["used"](x)
    (model["sometimes"](y) if both else y).square().sum().backward()


def test_equal_autograds_own_sums_over_micro_batches_and_steps():
    model, plain = layers(), layers()
    batches = [torch.randn(3, 4) for _ in range(4)]
    with Gradients(model.parameters()) as gradients:
        places = None
        for step in (batches[:2], batches[2:]):
            plain.zero_grad(set_to_none=True)
            with gradients.of_step():
                for x in step:
                    run(model, x, both=True)
                    run(plain, x, both=True)
            found = [parameter.grad for parameter in model.parameters()]
            assert all(torch.equal(a, b.grad) for a, b in zip(found, plain.parameters(), strict=True))
            places = places or [grad.data_ptr() for grad in found]
            assert [grad.data_ptr() for grad in found] == places


def test_what_a_step_does_not_reach_has_no_gradient():
    model, x = layers(), torch.randn(3, 4)
    with Gradients(model.parameters()) as gradients:
        for both in (True, False, True):
            with gradients.of_step():
                run(model, x, both=both)
            assert (model["sometimes"].weight.grad is not None) == both
            assert model["used"].weight.grad is not None


def test_nothing_stays_behind_whatever_is_raised():
    model, x = layers(), torch.randn(3, 4)
    gradients = Gradients(model.parameters())

    def fail():
        with gradients, gradients.of_step():
            run(model, x, both=True)
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        fail()
    assert all(parameter.grad is None for parameter in model.parameters())
    gradients._reached.clear()
    run(model, x, both=True)
    assert not gradients._reached
