"""One graph, no graph break, no recompilation when the batch grows; the same numbers as without a compiler."""

import subprocess
import sys

import pytest

COMPILE = """
import sys, torch
from moezoo.zoo.core import *
torch.manual_seed(0)
torch.set_num_threads(1)
cases = {
    "grouped": (TopKRouter(8, 8, 2), (8, 16), torch.float32),
    "bfloat16": (TopKRouter(8, 8, 2), (8, 16), torch.bfloat16),
    "segment": (TopKRouter(7, 8, 2, score_func="sigmoid", balance="bias"), (7, 15), torch.float64),
    "dense": (DenseRouter(8, 4), (8, 16), torch.float32),
    "capacity": (SwitchRouter(8, 8), (8, 16), torch.float32),
    "choice": (ExpertChoiceRouter(8, 4), (8, 16), torch.float32),
}
backend, names = sys.argv[1], sys.argv[2:]
for name in names:
    router, dims, dtype = cases[name]
    moe = MoE(router, MLPExperts(router.num_experts, *dims)).to(dtype)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(moe, fullgraph=True, dynamic=True, backend=backend)
    def run(layer, x):
        y, routing = layer(x, return_routing=True)
        return [y, *torch.autograd.grad(y.square().sum() + routing.aux_loss, [x, *moe.parameters()])]
    for tokens in (24, 40, 57):
        x = torch.randn(tokens, dims[0], dtype=dtype, requires_grad=True)
        for a, b in zip(run(compiled, x), run(moe, x), strict=True):
            torch.testing.assert_close(a, b, **({"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {}))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 1, (name, graphs)
    assert moe.last_routing is not None
"""


def compile_in_a_process_of_its_own(backend, names):
    # The tests' type checks are no part of what users compile.
    done = subprocess.run([sys.executable, "-c", COMPILE, backend, *names], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("names", [["grouped", "segment"], ["dense", "capacity"]])
def test_compiles_to_one_graph(names):
    compile_in_a_process_of_its_own("aot_eager", names)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grouped", "bfloat16", "segment", "dense", "capacity", "choice"])
def test_inductor_gives_the_same_numbers(name):
    compile_in_a_process_of_its_own("inductor", [name])
