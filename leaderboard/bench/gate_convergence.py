"""How fast a mixture finds its parameters, with a linear and with an activation gate under a learned temperature.

The theory (Nguyen et al. 2024, "Is temperature sample efficient for softmax Gaussian mixture of experts?" and its
sequel on activation gates; read as abstracts, so the set-up is ours): a temperature τ that divides linear logits can be
traded for their slopes, `β x / τ`, and maximum likelihood then learns them at rates as slow as 1 / log n; a non-linear
activation before the temperature, `act(β x) / τ`, breaks the trade and gives polynomial rates.

Two Gaussian linear experts on the line, fitted with three (one too many, as in the theory) by maximum likelihood
from starts near the truth, for growing samples. Errors are Voronoi losses: each fitted expert belongs to the nearest
true one, and its distance counts with the share of inputs that it gets.

    python -m moezoo.leaderboard.bench.gate_convergence --output gate_convergence
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GATES: dict[str, Callable[[Tensor], Tensor]] = {"linear": lambda z: z, "tanh": torch.tanh}
NOISE, TEMPERATURE = 0.3, 0.5
SLOPES, OFFSETS = (-1.0, 1.0), (0.5, -0.5)  # of the true experts
GATE_SLOPES, GATE_OFFSETS = (1.0, -0.5), (0.2, 0.0)
START = 0.1  # how far from the truth a fit begins


def main(words: Sequence[str] | None = None) -> None:
    """Fit, write `<output>.json` and draw `<output>.png`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gate_convergence"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[2**i for i in range(8, 15)])
    parser.add_argument("--replicates", type=int, default=16)
    parser.add_argument("--steps", type=int, default=500, help="at most")
    parser.add_argument("--device", default="cpu")
    known = parser.parse_args(words)
    results = run(known.sizes, known.replicates, known.steps, known.device)
    known.output.parent.mkdir(parents=True, exist_ok=True)
    known.output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results, known.output.with_suffix(".png"))
    for gate, errors in results["errors"].items():
        print(gate, {name: round(rate(results["sizes"], values), 2) for name, values in errors.items()})


def run(sizes: Sequence[int], replicates: int, steps: int, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Errors by gate, kind and sample size: `errors[gate][kind][size]` is a list over replicates."""
    errors: dict[str, dict[str, list[list[float]]]] = {}
    for gate, act in GATES.items():
        for size in sizes:
            generator = torch.Generator().manual_seed(seed)
            x, y = sample(act, replicates, size, generator)
            fitted = fit(act, x.to(device), y.to(device), steps, generator)
            for kind, values in voronoi_errors(act, fitted, x.to(device)).items():
                errors.setdefault(gate, {}).setdefault(kind, []).append(values.tolist())
            print(f"{gate} gate, n = {size} done", flush=True)
    setting = {"replicates": replicates, "steps": steps, "seed": seed, "torch": torch.__version__, "device": device}
    return {"sizes": list(sizes), "errors": errors, "setting": setting}


def sample(
    act: Callable[[Tensor], Tensor], replicates: int, size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """x uniform on [-3, 3] and y from the true mixture, both [replicates, size], in float64."""
    x = 6 * torch.rand(replicates, size, generator=generator, dtype=torch.float64) - 3
    truth = {name: value[None] for name, value in true_parameters().items()}
    share = log_gates(act, truth, x).exp()
    second = torch.rand(x.shape, generator=generator, dtype=torch.float64) > share[..., 0]
    mean = torch.where(second, SLOPES[1] * x + OFFSETS[1], SLOPES[0] * x + OFFSETS[0])
    return x, mean + NOISE * torch.randn(x.shape, generator=generator, dtype=torch.float64)


def true_parameters() -> dict[str, Tensor]:
    values = {"slope": SLOPES, "offset": OFFSETS, "gate_slope": GATE_SLOPES, "gate_offset": GATE_OFFSETS}
    found = {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
    return found | {"log_temperature": torch.tensor([math.log(TEMPERATURE)], dtype=torch.float64)}


def log_gates(act: Callable[[Tensor], Tensor], parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    """log softmax(act(β x) / τ + b), [replicates, size, experts]."""
    logits = act(x[..., None] * parameters["gate_slope"][:, None]) / parameters["log_temperature"].exp()[:, None]
    return (logits + parameters["gate_offset"][:, None]).log_softmax(-1)


def negative_log_likelihood(
    act: Callable[[Tensor], Tensor], parameters: dict[str, Tensor], x: Tensor, y: Tensor
) -> Tensor:
    """Of each replicate, per observation, up to a constant; the noise is known."""
    mean = x[..., None] * parameters["slope"][:, None] + parameters["offset"][:, None]
    density = -0.5 * ((y[..., None] - mean) / NOISE).square()
    return -(log_gates(act, parameters, x) + density).logsumexp(-1).mean(-1)


def fit(
    act: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, steps: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Maximum likelihood of three experts; the second true one begins with two.

    Each replicate climbs by itself with damped steps along the outer product of its scores (Berndt et al. 1974, damped
    as in Levenberg-Marquardt): the information is singular where two experts are one, and plain gradients crawl there.
    """
    start = []
    for name, value in true_parameters().items():
        copies = value if name == "log_temperature" else value[[0, 1, 1]]
        if name == "gate_offset":
            copies = copies - torch.tensor([0.0, math.log(2), math.log(2)], dtype=torch.float64)
        start.append(copies + START * torch.randn(len(x), len(copies), generator=generator, dtype=torch.float64))
    sizes = [part.shape[1] for part in start]
    flat = torch.cat(start, 1).to(x.device)

    def unpacked(flat: Tensor) -> dict[str, Tensor]:
        return dict(zip(true_parameters(), flat.split(sizes, -1), strict=True))

    def loss_of_one(flat: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return negative_log_likelihood(act, unpacked(flat[None]), x.view(1, 1), y.view(1, 1))[0]

    one = torch.func.grad(loss_of_one)
    scores_of = torch.func.vmap(torch.func.vmap(one, (None, 0, 0)))
    damping = torch.full((len(x), 1), 1e-2, dtype=torch.float64, device=x.device)
    loss = negative_log_likelihood(act, unpacked(flat), x, y)
    going = torch.ones_like(loss, dtype=torch.bool)
    for _ in range(steps):
        rows = going.nonzero()[:, 0]
        if not len(rows):
            break
        scores = scores_of(flat[rows], x[rows], y[rows])
        gradient, information = scores.mean(1), scores.mT @ scores / x.shape[1]
        scale = information.diagonal(dim1=1, dim2=2) + 1e-8
        step = torch.linalg.solve(information + torch.diag_embed(damping[rows] * scale), gradient)
        moved = negative_log_likelihood(act, unpacked(flat[rows] - step), x[rows], y[rows])
        better = moved < loss[rows]
        going[rows] = torch.where(better, loss[rows] - moved > 1e-13, damping[rows, 0] < 1e6)
        damping[rows] = torch.where(better[:, None], damping[rows] / 3, damping[rows] * 4).clamp_min(1e-9)
        flat[rows] = torch.where(better[:, None], flat[rows] - step, flat[rows])
        loss[rows] = torch.where(better, moved, loss[rows])
    return unpacked(flat)


def voronoi_errors(act: Callable[[Tensor], Tensor], fitted: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """By replicate: the distance of experts, of gate slopes, and of the temperature, from the truth."""
    truth = {name: value.to(x.device) for name, value in true_parameters().items()}
    far = (fitted["slope"][..., None] - truth["slope"]).abs() + (fitted["offset"][..., None] - truth["offset"]).abs()
    share = log_gates(act, fitted, x).exp().mean(1)
    nearest = far.argmin(-1, keepdim=True)
    gate = fitted["gate_slope"] - fitted["gate_slope"].mul(share).sum(1, keepdim=True)
    true_share = log_gates(act, {name: value[None] for name, value in truth.items()}, x).exp().mean((0, 1))
    true_gate = truth["gate_slope"] - (truth["gate_slope"] * true_share).sum()
    gate_far = (gate - true_gate[nearest[..., 0]]).abs()
    return {
        "experts": (share * far.gather(-1, nearest)[..., 0]).sum(1),
        "gate slopes": (share * gate_far).sum(1),
        "temperature": (fitted["log_temperature"][:, 0].exp() - TEMPERATURE).abs(),
    }


def rate(sizes: Sequence[int], values: Sequence[Sequence[float]]) -> float:
    """The slope of log median error over log n: -0.5 is the parametric rate."""
    n = torch.tensor(sizes, dtype=torch.float64).log()
    e = torch.tensor(values, dtype=torch.float64).median(1).values.clamp_min(1e-12).log()
    n, e = n - n.mean(), e - e.mean()
    return float((n * e).sum() / n.square().sum())


def draw(results: dict[str, Any], path: Path) -> None:
    """Median error and quartiles over sample size, one panel per kind of parameter."""
    from matplotlib.figure import Figure

    kinds = list(next(iter(results["errors"].values())))
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(kinds)), kinds, strict=True):
        for colour, (gate, errors) in zip(("tab:red", "tab:blue"), results["errors"].items(), strict=True):
            values = torch.tensor(errors[kind], dtype=torch.float64)
            low, middle, high = values.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64), 1)
            label = f"{gate} gate, n^{rate(results['sizes'], errors[kind]):.2f}"
            axes.loglog(results["sizes"], middle, "o-", color=colour, label=label)
            axes.fill_between(results["sizes"], low, high, color=colour, alpha=0.2, linewidth=0)
        axes.set(title=kind, xlabel="sample size n", ylabel="error" if kind == kinds[0] else "")
        axes.set_xticks(results["sizes"], [str(size) for size in results["sizes"]], rotation=45, fontsize=8)
        axes.minorticks_off()
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
