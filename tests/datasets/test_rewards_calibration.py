"""What the default preferences are calibrated for (fact sheet, check 4), by linear models on bags of words."""

import pytest
import torch
import torch.nn.functional as F
from moezoo.datasets.rewards import RewardsData


def bags(data, rows):
    """Word counts of the chosen minus those of the rejected response, and of the prompts."""
    batch = data.encoded.batch(rows, 0)
    counts = torch.zeros(len(rows), 2, data.schema["vocab_size"])
    counts.scatter_add_(2, batch.tokens, batch.mask.float())
    asked = torch.zeros(len(rows), data.schema["vocab_size"])
    asked.scatter_add_(1, batch.prompt_tokens, batch.prompt_mask.float())
    return counts[:, 0] - counts[:, 1], asked


def minimise(loss, *shape):
    """The weights of least loss, by L-BFGS."""
    weight = torch.zeros(*shape, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=60, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(weight)
        value.backward()
        return value

    optimizer.step(closure)
    return weight.detach()


def bradley_terry(x, ridge):
    return minimise(lambda w: F.softplus(-(x @ w)).mean() + ridge * w.square().sum(), x.shape[1])


def accuracy(margin):
    return float(((margin > 0).double() + (margin == 0).double() / 2).mean())


def trial(conflict, seed):
    data = RewardsData(files={"conflict": conflict, "seed": seed})
    test = data.part("test")
    test = test[data.encoded.pool[test] < 0]
    parts = {name: (*bags(data, rows), data.encoded.task[rows], data.encoded.capability[rows])
             for name, rows in {"train": data.part("train"), "test": test, "mix": data.part("train", 3),
                                "judged": data.part("train", 2)}.items()}  # fmt: skip
    x, asked, task, _ = parts["train"]
    tx, tasked, truth, _ = parts["test"]
    tasks = data.schema["tasks"]
    experts = torch.stack([bradley_terry(x[task == t], 1e-2) for t in range(len(tasks))], 1)
    router = minimise(lambda w: F.cross_entropy(asked @ w, task) + 1e-4 * w.square().sum(), x.shape[1], len(tasks))
    choice = (tasked @ router).argmax(1)
    margins = tx @ experts
    mixed = torch.zeros(len(tx))
    for t, entry in enumerate(tasks):  # experts of single capabilities on the judge's labels, mixed on human ones
        jx, _, jt, jk = parts["judged"]
        own = torch.stack(
            [bradley_terry(jx[(jt == t) & (jk == k)], 1e-2) for k in range(len(entry["capabilities"]))], 1
        )
        mx, _, mt, _ = parts["mix"]
        mixed[truth == t] = (tx @ (own @ bradley_terry(mx[mt == t] @ own, 1e-4)))[truth == t]
    return {
        "single": accuracy(tx @ bradley_terry(x, 1e-3)),
        "oracle": accuracy(margins.gather(1, truth[:, None])),
        "predicted": accuracy(margins.gather(1, choice[:, None])),
        "capabilities": accuracy(mixed),
        "router": float((choice == truth).double().mean()),
        "noise": 1 - data.rows.filter(split="train", part=1)["agree"].mean(),
    }


@pytest.mark.slow
def test_routing_pays_with_the_conflict_and_costs_little_without():
    on, off = ([trial(conflict, seed) for seed in range(2)] for conflict in (True, False))
    mean = {
        name: {key: sum(run[key] for run in runs) / 2 for key in runs[0]} for name, runs in (("on", on), ("off", off))
    }
    print(mean)
    assert min(run["router"] for run in on + off) >= 0.97
    assert all(run["noise"] == pytest.approx(0.3, abs=0.015) for run in on + off)
    assert min(run["predicted"] - run["single"] for run in on) >= 0.03
    assert min(run["capabilities"] - run["single"] for run in on) >= 0.03
    assert abs(mean["off"]["oracle"] - mean["off"]["single"]) <= 0.015
