"""Other people's layers, each behind a small adapter. All are optional; none is copied.

An adapter raises `Unavailable` with the reason found when it is built. Where weights can be set, they are the
problem's, and `check` compares the outcome with ours; elsewhere only the shape is compared.
"""

import importlib
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .ours import leaf, parameters_of
from .problem import Built, Contender, Problem, Unavailable, Unsuited

_LARGEST = 2**30  # bytes of one helper tensor that a peer may build


def peers() -> list[Contender]:
    """Every peer, in the order of the tables."""
    hf = "pip install transformers"
    tutel = "git clone https://github.com/microsoft/tutel && NO_CUDA=1 pip install --no-build-isolation ./tutel"
    deepspeed = "pip install deepspeed  (builds an operator when first used: needs g++ and ninja)"
    drops = "capacity 1.25: drops tokens"
    lucid = "one-hot dispatch per sequence of 256 tokens; capacity 1.25 k N / E (its own 1.25 N / E leaves work out)"
    return [
        *(
            Contender(f"transformers/{kind}", "peer", partial(_transformers, kind=kind), install=hf)
            for kind in ("eager", "grouped_mm", "batched_mm")
        ),
        Contender("torchtitan", "peer", _torchtitan, "experts always in bf16", install="pip install torchtitan"),
        Contender("tutel/dropless", "peer", partial(_tutel, capacity=0.0), install=tutel),
        Contender("tutel/cf1.25", "peer", partial(_tutel, capacity=1.25), drops, install=tutel),
        Contender("deepspeed/cf1.25", "peer", _deepspeed, drops, install=deepspeed),
        Contender(
            "davidmrau", "peer", _davidmrau, "GPL-3, side by side only; its ReLU made GELU, its softmax left out",
            install="git clone https://github.com/davidmrau/mixture-of-experts; its folder on PYTHONPATH",
        ),
        Contender("mixture-of-experts", "peer", _mixture_of_experts, lucid, install="pip install mixture-of-experts"),
        Contender(
            "st-moe", "peer", _st_moe, f"{lucid}; GEGLU with biases and a multiplicative one",
            install="pip install st-moe-pytorch",
        ),
        Contender(
            "soft-moe", "peer", _soft_moe, "another operation: every slot mixes all tokens of a sequence (256 here)",
            comparable=False, install="pip install soft-moe-pytorch",
        ),
        Contender(
            "scattermoe", "peer", _scattermoe, "Triton",
            install="pip install --no-build-isolation git+https://github.com/shawntan/scattermoe",
        ),
        Contender(
            "megablocks", "peer", _megablocks, "CUDA; without a GPU its setup stops: Found no NVIDIA driver",
            install="pip install --no-build-isolation megablocks",
        ),
        Contender(
            "fastmoe", "peer", _fastmoe, "CUDA; its setup builds for the GPU it finds, without one: IndexError",
            install="git clone https://github.com/laekov/fastmoe && pip install --no-build-isolation ./fastmoe",
        ),
    ]  # fmt: skip


def _load(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"cannot be imported: {error}") from None
    except Exception as error:
        raise Unavailable(f"fails when imported: {type(error).__name__}: {error}") from None


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise Unsuited(reason)


def _on_gpu(problem: Problem, reason: str) -> None:
    if not problem.x.is_cuda:
        raise Unavailable(reason)


def _limit(elements: float, what: str) -> None:
    _require(elements * 4 <= _LARGEST, f"{what} would take {elements * 4 / 2**30:.1f} GiB")


def _sequences(x: Tensor) -> Tensor:
    """For layers that route within a sequence, at a cost quadratic in its length."""
    length = 256 if x.shape[0] % 256 == 0 else x.shape[0]
    return x.view(-1, length, x.shape[1])


def _set(*pairs: tuple[Tensor, Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in pairs:
            parameter.copy_(value)


def _transformers(problem: Problem, kind: str) -> Built:
    """Mixtral's block where experts are gated, Nemotron-H's experts where they are not."""
    case = problem.case
    if kind == "batched_mm":
        _limit(
            2 * case.tokens * case.top_k * problem.w1[0].numel(), "one copy of the weights per row, and its gradient,"
        )
    _require(not case.bias, "experts without bias only")
    if case.act == "swiglu":
        model = _load("transformers.models.mixtral.modeling_mixtral")
        config = _load("transformers").MixtralConfig(
            hidden_size=case.dim, intermediate_size=case.hidden, num_local_experts=case.experts,
            num_experts_per_tok=case.top_k, hidden_act="silu", router_jitter_noise=0.0,
        )  # fmt: skip
        config._experts_implementation = kind
        block = model.MixtralSparseMoeBlock(config)
        gate, experts, first = block.gate, block.experts, block.experts.gate_up_proj
        _set((gate.weight, problem.gate))
    else:
        _require(case.part == "ffn", "its routers come with gated experts or other scores")
        model = _load("transformers.models.nemotron_h.modeling_nemotron_h")
        config = SimpleNamespace(
            n_routed_experts=case.experts, hidden_size=case.dim, moe_intermediate_size=case.hidden,
            moe_latent_size=None, mlp_hidden_act="gelu", _experts_implementation=kind,
        )  # fmt: skip
        gate, experts = None, model.NemotronHExperts(config)
        first = experts.up_proj
    _set((first, problem.w1), (experts.down_proj, problem.w2))
    experts.to(problem.x)
    if case.part == "ffn":
        weights = leaf(problem.weights.to(problem.x.dtype))
        return Built(lambda x: [experts(x, problem.indices, weights)], [weights, *parameters_of(experts)])
    gate.to(problem.x)

    def layer(x: Tensor) -> list[Tensor]:
        logits, weights, indices = gate(x)
        y = experts(x, indices, weights.to(x.dtype))
        if case.mode == "infer":
            return [y]
        return [y, 0.01 * model.load_balancing_loss_func((logits,), case.experts, case.top_k)]

    return Built(layer, [*parameters_of(gate), *parameters_of(experts)])


def _torchtitan(problem: Problem) -> Built:
    case = problem.case
    _require(case.act == "swiglu", "SwiGLU experts only")
    _require(case.part == "ffn", "its layer balances by a bias updated in the optimizer step, without a loss")
    _require(case.dtype == "bf16", "casts its experts to bf16 whatever the input")
    common = "torchtitan.models.common"
    experts = _load(f"{common}.moe").GroupedExperts.Config(
        dim=case.dim, hidden_dim=case.hidden, num_experts=case.experts
    ).build()  # fmt: skip
    dispatcher = _load(f"{common}.token_dispatcher").LocalTokenDispatcher.Config(
        num_experts=case.experts, top_k=case.top_k
    ).build()  # fmt: skip
    gate, value = problem.w1.chunk(2, dim=1)
    _set((experts.w1_EFD, gate), (experts.w3_EFD, value), (experts.w2_EDF, problem.w2))
    experts.to(problem.x)
    weights = leaf(problem.weights)

    def ffn(x: Tensor) -> list[Tensor]:
        counts = torch.zeros(case.experts, dtype=torch.int64, device=x.device)
        counts.scatter_add_(0, problem.indices.flatten(), torch.ones_like(problem.indices).flatten())
        rows, counts, metadata = dispatcher.dispatch(x, weights, problem.indices, counts)
        return [dispatcher.combine(experts(rows, counts), metadata, x)]

    return Built(ffn, [weights, *parameters_of(experts)], exact=False)


def _tutel(problem: Problem, capacity: float) -> Built:
    case = problem.case
    _require(case.part == "layer", "a whole layer only")
    _require(case.act == "gelu", "SwiGLU would need experts of one's own")
    _require(case.dtype == "fp32" or problem.x.is_cuda, "fp32 and fp64 only on the CPU")
    moe = _load("tutel.moe").moe_layer(
        gate_type={"type": "top", "k": case.top_k, "capacity_factor": capacity, "fp32_gate": True},
        experts={
            "type": "ffn", "num_experts_per_device": case.experts, "hidden_size_per_expert": case.hidden,
            "activation_fn": F.gelu, "has_fc1_bias": case.bias, "has_fc2_bias": case.bias,
        },
        model_dim=case.dim,
    ).to(problem.x)  # fmt: skip
    experts = moe.experts
    _set((experts.batched_fc1_w, problem.w1), (experts.batched_fc2_w, problem.w2.transpose(1, 2)))
    _set((moe.gates[0].wg.weight, problem.gate))
    if case.bias:
        nn.init.zeros_(experts.batched_fc1_bias)
        nn.init.zeros_(experts.batched_fc2_bias)

    def layer(x: Tensor) -> list[Tensor]:
        y = moe(x)
        return [y, 0.01 * y.l_aux]

    return Built(layer, parameters_of(moe), exact=capacity == 0)


class _Network(nn.Sequential):
    """One expert, for peers that take modules."""

    def __init__(self, problem: Problem, bias: bool) -> None:
        case = problem.case
        super().__init__(nn.Linear(case.dim, case.hidden, bias), nn.GELU(), nn.Linear(case.hidden, case.dim, bias))


def _deepspeed(problem: Problem) -> Built:
    case = problem.case
    _require(case.part == "layer" and case.act == "gelu", "a whole layer of two-layer experts only, as written here")
    _require(case.dtype == "fp32", "mixes fp32 gating into bf16 experts, and fails")
    _require(case.top_k <= 2, "compared for top-1 and top-2 only")
    _limit(1.25 * case.top_k * case.tokens**2, "its one-hot dispatch mask")
    deepspeed = _load("deepspeed")
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        backend = "nccl" if problem.x.is_cuda else "gloo"
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    deepspeed.init_distributed("nccl" if problem.x.is_cuda else "gloo", auto_mpi_discovery=False, verbose=False)
    moe = deepspeed.moe.layer.MoE(
        case.dim, _Network(problem, case.bias), case.experts, k=case.top_k, capacity_factor=1.25,
        top2_2nd_expert_sampling=False,
    ).to(problem.x)  # fmt: skip
    moe.set_deepspeed_parallelism()

    def layer(x: Tensor) -> list[Tensor]:
        y, balance, _ = moe(x)
        return [y, 0.01 * balance]

    return Built(layer, parameters_of(moe), exact=False)


def _davidmrau(problem: Problem) -> Built:
    case = problem.case
    _require(case.part == "layer" and case.act == "gelu", "a whole layer of two-layer experts only")
    _require(case.dtype == "fp32", "its buffers are fp32")
    module = _load("moe")
    _require(hasattr(module, "SparseDispatcher"), "a module named moe was found, but it is another one")
    moe = module.MoE(case.dim, case.dim, case.experts, case.hidden, noisy_gating=False, k=case.top_k).to(problem.x)
    for index, expert in enumerate(moe.experts):
        expert.relu, expert.soft = nn.GELU(), nn.Identity()
        _set((expert.fc1.weight, problem.w1[index]), (expert.fc2.weight, problem.w2[index]))
        nn.init.zeros_(expert.fc1.bias)
        nn.init.zeros_(expert.fc2.bias)
    _set((moe.w_gate, problem.gate.t()))
    moe.w_noise.requires_grad_(False)
    return Built(moe, parameters_of(moe))


def _mixture_of_experts(problem: Problem) -> Built:
    case = problem.case
    _require(case.part == "layer" and case.act == "gelu", "a whole layer of two-layer experts only")
    _require(case.top_k == 2, "top-2 only")
    _limit(1.25 * case.top_k * case.tokens * _sequences(problem.x).shape[1], "its one-hot dispatch mask")
    library = _load("mixture_of_experts")
    moe = library.MoE(
        case.dim, case.experts, hidden_dim=case.hidden, activation=nn.GELU, second_policy_train="all",
        capacity_factor_train=1.25 * case.top_k,
    ).to(problem.x)  # fmt: skip

    def layer(x: Tensor) -> list[Tensor]:
        y, balance = moe(_sequences(x))
        return [y.view_as(x), balance]

    return Built(layer, parameters_of(moe), exact=False)


def _st_moe(problem: Problem) -> Built:
    case = problem.case
    _require(case.part == "layer" and case.act == "swiglu", "a whole layer of gated experts only")
    _require(case.mode == "train" and case.dtype == "fp32", "compared in fp32 training only")
    _require(case.top_k >= 2, "top-2 and more")
    _limit(1.25 * case.top_k * case.tokens * _sequences(problem.x).shape[1], "its one-hot dispatch mask")
    library = _load("st_moe_pytorch")
    multiple = 1.5 * case.hidden / case.dim + 1e-9  # it takes two thirds of it
    moe = library.MoE(
        case.dim, case.experts, expert_hidden_mult=multiple, gating_top_n=case.top_k, threshold_train=0.0,
        capacity_factor_train=1.25 * case.top_k,
    ).to(problem.x)  # fmt: skip

    def layer(x: Tensor) -> list[Tensor]:
        y, losses, *_ = moe(_sequences(x))
        return [y.view_as(x), losses]

    return Built(layer, parameters_of(moe), exact=False)


def _soft_moe(problem: Problem) -> Built:
    case = problem.case
    _require(case.part == "layer" and case.act == "gelu", "compared as a whole layer of two-layer experts only")
    slots = max(1, _sequences(problem.x).shape[1] * case.top_k // case.experts)
    _limit(3 * case.tokens * slots * case.experts, "its mixing weights of all tokens and slots")
    library = _load("soft_moe_pytorch")
    moe = library.SoftMoE(
        case.dim, num_experts=case.experts, num_slots=slots, expert_mult=case.hidden / case.dim
    ).to(problem.x)  # fmt: skip
    return Built(lambda x: [moe(_sequences(x)).view_as(x)], parameters_of(moe), exact=False)


def _scattermoe(problem: Problem) -> Built:
    case = problem.case
    _require(case.part == "ffn", "experts without a router only")
    _on_gpu(problem, "Triton kernels: GPU only (its interpreter on the CPU takes seconds per 16 tokens)")
    library = _load("scattermoe.mlp")
    kind, activation = (library.GLUMLP, nn.SiLU()) if case.act == "swiglu" else (library.MLP, nn.GELU())
    experts = kind(case.dim, case.hidden, case.experts, case.top_k, activation=activation).to(problem.x)
    # Its GLU activates the second half of the first layer.
    w1 = torch.cat(problem.w1.chunk(2, dim=1)[::-1], dim=1) if case.act == "swiglu" else problem.w1
    _set((experts.experts.weight, w1), (experts.output_experts.weight, problem.w2))
    weights = leaf(problem.weights.to(problem.x.dtype))
    return Built(lambda x: [experts(x, weights, problem.indices)], [weights, *parameters_of(experts)])


def _megablocks(problem: Problem) -> Built:
    case = problem.case
    arguments = _load("megablocks.layers.arguments")
    _on_gpu(problem, "CUDA and Triton kernels: GPU only")
    _require(case.part == "layer" and case.dtype == "bf16", "a whole layer in bf16 only, as written here")
    moe = _load("megablocks.layers.dmoe").dMoE(
        arguments.Arguments(
            hidden_size=case.dim, ffn_hidden_size=case.hidden, moe_num_experts=case.experts, moe_top_k=case.top_k,
            mlp_type="glu" if case.act == "swiglu" else "mlp", activation_fn=F.silu if case.act == "swiglu" else F.gelu,
            mlp_impl="grouped", memory_optimized_mlp=False, fp16=False, bf16=True, bias=False, return_bias=False,
        )
    ).to(problem.x)  # fmt: skip
    losses = _load("megablocks.layers.moe")

    def layer(x: Tensor) -> list[Tensor]:
        losses.clear_load_balancing_loss()
        out = moe(x[:, None])
        return [(out[0] if isinstance(out, tuple) else out)[:, 0]]

    return Built(layer, parameters_of(moe), exact=False)


def _fastmoe(problem: Problem) -> Built:
    case = problem.case
    library = _load("fmoe.transformer")
    _on_gpu(problem, "CUDA kernels: GPU only")
    _require(case.part == "layer" and case.act == "gelu", "a whole layer of two-layer experts only")
    moe = library.FMoETransformerMLP(
        num_expert=case.experts, d_model=case.dim, d_hidden=case.hidden, activation=nn.GELU(), top_k=case.top_k
    ).to(problem.x)  # fmt: skip
    return Built(lambda x: [moe(x)], parameters_of(moe), exact=False)
