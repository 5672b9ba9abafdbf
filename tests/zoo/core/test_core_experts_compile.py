"""Every kind of experts compiles to one graph, whether rows are sorted or not."""

import subprocess
import sys

COMPILE = """
import torch
from moezoo.zoo.core import make_plan
from moezoo.zoo.core.experts import ConvExperts, LinearExperts, LoRAExperts, LoRALinear, RecurrentExperts
torch.manual_seed(0)
indices, weights = torch.tensor([[0], [2], [2], [-1], [3]]), torch.rand(5, 4)
def check(run, x, parameters):
    results = []
    for f in (torch.compile(run, fullgraph=True, backend="aot_eager"), run):
        y = f(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *parameters], allow_unused=True)])
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)
for experts, shape, sorted_too in (
    (LoRAExperts(4, 8, 8, 4, 8.0), (8,), False),
    (LinearExperts(4, 5, 3), (5,), False),
    (ConvExperts(4, 4, 6, 3, padding="causal", groups=2, dims=1), (4, 6), True),
    (RecurrentExperts(4, 3, 4), (2, 3), True),
    (RecurrentExperts(4, 3, 4, "gru", last=True), (2, 3), True),
):
    for p in experts.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(5, *shape, requires_grad=True)
    check(lambda x: experts.dense(x, weights), x, list(experts.parameters()))
    if sorted_too:
        check(lambda x: experts(x, make_plan(indices, 4)), x, list(experts.parameters()))
layer = LoRALinear(torch.nn.Linear(8, 6), 4, 2, 4.0)
torch.nn.init.normal_(layer.experts.up.weight)
for shape in ((5, 8), (5, 9, 8)):
    x = torch.randn(shape, requires_grad=True)
    check(lambda x: layer(x, indices=indices[:, 0]) + layer(x, weights=weights), x, list(layer.experts.parameters()))
"""


def test_every_kind_compiles_to_one_graph():
    # Its own process: the tests' type checks are no part of what users compile.
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
