"""Zero, copy and constant experts."""

import pytest
import torch
from moezoo.zoo.core.experts import ConstantExpert, CopyExpert, ZeroExpert


def test_zero_gives_zero_and_copy_the_token():
    x = torch.randn(5, 3)
    x[0, 0] = torch.inf  # zero is not a product with zero
    assert torch.equal(ZeroExpert()(x), torch.zeros(5, 3))
    assert torch.equal(CopyExpert()(x), x)
    assert not list(ZeroExpert().parameters()) and not list(CopyExpert().parameters())


def test_constant_mixes_the_token_with_a_learned_vector():
    torch.manual_seed(0)
    expert = ConstantExpert(4).double()
    assert expert.gate.weight.shape == (2, 4) and expert.constant.shape == (4,)
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    for token, y in zip(x, expert(x), strict=True):
        scores = (expert.gate.weight @ token).exp()
        want = scores[0] / scores.sum() * token + scores[1] / scores.sum() * expert.constant
        torch.testing.assert_close(y, want)
    names, values = zip(*expert.named_parameters(), strict=True)
    assert torch.autograd.gradcheck(
        lambda x, *v: torch.func.functional_call(expert, dict(zip(names, v, strict=True)), (x,)), (x, *values)
    )


@pytest.mark.parametrize("make", [ZeroExpert, CopyExpert, lambda: ConstantExpert(3)])
def test_no_tokens_and_bfloat16(make):
    assert make()(torch.randn(0, 3)).shape == (0, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert make()(torch.randn(2, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="dim=0"):
        ConstantExpert(0)
