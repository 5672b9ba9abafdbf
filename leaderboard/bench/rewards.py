"""`moezoo bench rewards`: DMoERM's inner layer in one pass, against a loop that switches PEFT's adapters.

A language model of SmolLM2-135M's shape, weights drawn, six low-rank experts of rank 32 beside every q_proj and v_proj.
Every response goes through all six. Beside it, what five tasks cost in memory with a low-rank change each, and with a
network each. Spec, check C: at least twice as fast as the loop at equal outputs, at most a third of the memory.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ...errors import require
from ...zoo.dmoerm import DMoERM
from ...zoo.text_backbones import load_hugging_face, pool
from ..results import provenance
from .cases import Device
from .measure import Step, interleaved, peak_memory
from .ratios import ratio
from .terminal import brackets

SMOLLM2: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
}
CAPABILITIES, TASKS, RANK = 6, 5, 32
LOOP = "PEFT, set_adapter"
_TARGETS = ["q_proj", "v_proj"]
_TOLERANCE = 1e-4  # of the largest hidden value, in float32


class Text(NamedTuple):
    """Responses, of one length."""

    tokens: Int[Tensor, "rows length"]
    mask: Bool[Tensor, "rows length"]


def run(
    rounds: int,
    rows: Sequence[int] = (2, 8, 32),
    length: int = 512,
    device: Device = "cpu",
    threads: int = 1,
    output: Path | None = None,
    shape: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Seconds a step by mode and rows, contender and round, and bytes by kind of base, as tables; with `output`, kept
    as JSON.

    Raises:
        UserError: transformers or peft is not installed.
        RuntimeError: the contenders disagree.
    """
    require("moezoo bench rewards", "transformers", "peft")
    torch.set_num_threads(threads)
    console = Console()
    with _config(shape or SMOLLM2) as name:
        memory = {base: _memory(base, name, device) for base in ("lora", "full")} if device == "cuda" else {}
        _show_memory(console, memory)
        contenders = Contenders(name, device)
        seconds = {}
        for mode in ("score", "train"):
            for count in rows:
                text = _text(count, length, contenders.vocab, device)
                case = f"{mode}-{count}"
                seconds[case] = _sample(contenders.steps(mode, text), rounds, device)
                _show(console, f"{case}x{length}", seconds[case])
    results = {"seconds": seconds, "bytes": memory}
    if output is not None:
        origin: dict[str, Any] = dict(provenance(gpu=device == "cuda"))
        origin["hardware"] = asdict(origin["hardware"])
        origin |= {"rounds": rounds, "length": length, "device": device, "threads": threads}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({"run": origin, **results}, indent=1) + "\n", encoding="utf-8")
        console.print(str(output), markup=False)
    return results


class Contenders:
    """The same network and experts in our model and in PEFT's; bfloat16 on a GPU once they have been compared."""

    def __init__(self, name: str, device: Device) -> None:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        body = load_hugging_face(name, pretrained=False)
        torch.manual_seed(0)
        self.ours = _model(name, tasks=1, base="shared").eval()
        self.vocab = int(body.config.vocab_size)
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=_TARGETS)
        self.names = [f"c{k}" for k in range(CAPABILITIES)]
        self.peft: Any = get_peft_model(body, config, adapter_name=self.names[0])
        for adapter in self.names[1:]:
            self.peft.add_adapter(adapter, config)
        self._same_experts()
        self.peft.eval()
        self.ours.requires_grad_(False)
        self.experts = list(self.ours.capability_adapters.expert_parameters())
        for part in (self.ours, self.peft):
            part.to(device)
        with torch.no_grad():
            self._agree(_text(3, 24, self.vocab, device))
        if device == "cuda":
            for part in (self.ours, self.peft):
                part.to(torch.bfloat16)

    def _same_experts(self) -> None:
        theirs = dict(self.peft.base_model.model.named_modules())
        for path, layer in _body(self.ours).named_modules():
            if path.rpartition(".")[2] in _TARGETS:
                nn.init.normal_(layer.experts.up.weight, std=0.05)
                for k, adapter in enumerate(self.names):
                    theirs[path].lora_A[adapter].weight.data.copy_(layer.experts.down.weight[k])
                    theirs[path].lora_B[adapter].weight.data.copy_(layer.experts.up.weight[k])

    def _agree(self, text: Text) -> None:
        want = self.one_pass(text)
        for name, hidden in {LOOP: self.switched(text), "PEFT, adapter_names": self.mixed(text)}.items():
            if (error := float((hidden - want).abs().max() / want.abs().max())) > _TOLERANCE:
                raise RuntimeError(f"{name} and one pass differ by {error:.1e}")

    def one_pass(self, text: Text) -> Float[Tensor, "rows capabilities dim"]:
        """Ours: every row six times, each with its expert."""
        experts = torch.arange(CAPABILITIES, device=text.tokens.device).repeat(len(text.tokens))
        tokens, mask = (values.repeat_interleave(CAPABILITIES, 0) for values in text)
        with self.ours.capability_adapters.choice.choosing(experts):
            hidden: Tensor = self.ours.backbone(tokens, mask)
        return hidden.view(len(text.tokens), CAPABILITIES, -1)

    def switched(self, text: Text) -> Float[Tensor, "rows capabilities dim"]:
        """PEFT: every row once for every adapter."""
        return torch.stack([self.switched_to(adapter, text) for adapter in self.names], 1)

    def switched_to(self, adapter: str, text: Text) -> Float[Tensor, "rows dim"]:
        """PEFT with one adapter on."""
        self.peft.set_adapter(adapter)
        hidden: Tensor = self.peft(input_ids=text.tokens, attention_mask=text.mask.long()).last_hidden_state
        return pool(hidden, text.mask, "last")

    def mixed(self, text: Text) -> Float[Tensor, "rows capabilities dim"]:
        """PEFT's batches of mixed adapters, which it has for inference alone."""
        tokens, mask = (values.repeat_interleave(CAPABILITIES, 0) for values in text)
        names = self.names * len(text.tokens)
        hidden: Tensor = self.peft(input_ids=tokens, attention_mask=mask.long(), adapter_names=names).last_hidden_state
        return pool(hidden, mask, "last").view(len(text.tokens), CAPABILITIES, -1)

    def steps(self, mode: str, text: Text) -> dict[str, Step]:
        """One step of each contender: hidden vectors, or gradients of all experts."""
        if mode == "score":
            calls = {"one pass": self.one_pass, LOOP: self.switched, "PEFT, adapter_names": self.mixed}
            return {name: _scoring(call, text) for name, call in calls.items()}
        return {"one pass": lambda: self._train_one_pass(text), LOOP: lambda: self._train_switched(text)}

    def _train_one_pass(self, text: Text) -> None:
        for parameter in self.experts:
            parameter.requires_grad_(True)
        torch.autograd.grad(self.one_pass(text).float().square().mean(), self.experts)
        for parameter in self.experts:
            parameter.requires_grad_(False)

    def _train_switched(self, text: Text) -> None:
        for adapter in self.names:
            loss = self.switched_to(adapter, text).float().square().mean()
            torch.autograd.grad(loss, [p for p in self.peft.parameters() if p.requires_grad])


def _scoring(call: Callable[[Text], Tensor], text: Text) -> Step:
    def score() -> None:
        with torch.no_grad():
            call(text)

    return score


def _model(name: str, tasks: int, base: Any) -> DMoERM:
    capabilities = [str(k) for k in range(CAPABILITIES)]
    schema = {
        "vocab_size": 1,
        "max_length": 1,
        "tasks": [{"name": str(t), "capabilities": capabilities} for t in range(tasks)],
    }
    return DMoERM(
        schema,
        backbone=name,
        backbone_options={"pretrained": False},
        route="oracle",
        router="head" if base != "full" else "separate",
        router_options={"pretrained": False},
        task_base=base,
        rank=RANK,
        alpha=float(RANK),
        targets=_TARGETS,
    )


def _body(model: DMoERM) -> Any:
    """transformers' network in ours."""
    bodies: Any = model.backbone.bodies
    return bodies[0]


def _memory(base: str, name: str, device: Device) -> int:
    """Most bytes at once in a step of phase 1: five tasks, two responses each, with Adam; the router reads too."""
    torch.manual_seed(0)
    before = torch.cuda.memory_allocated()
    model = _model(name, TASKS, base).to(device)
    chosen = model.phase_parameters(1)
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is one for one in chosen))
    optimizer = torch.optim.Adam(chosen)
    text = _text(2 * TASKS, 256, int(_body(model).config.vocab_size), device)
    task = torch.arange(TASKS, device=device)

    def step() -> None:
        output = model(*text, text.tokens[::2], text.mask[::2], task, phase=1)
        (output.reward.sum() + output.task_logits.sum()).backward()
        optimizer.step()

    held = torch.cuda.memory_allocated() - before
    return held + peak_memory(step, device)


def _text(rows: int, length: int, vocab: int, device: Device) -> Text:
    drawn = torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(0))
    return Text(drawn.to(device), torch.ones(rows, length, dtype=torch.bool, device=device))


@contextmanager
def _config(shape: Mapping[str, Any]) -> Iterator[str]:
    from transformers import LlamaConfig

    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(**shape).save_pretrained(folder)
        yield f"hf:{folder}"


def _sample(steps: dict[str, Step], rounds: int, device: Device) -> dict[str, dict[int, float]]:
    for step in steps.values():
        step()
    return interleaved(steps, rounds, device)


def _show(console: Console, case: str, samples: dict[str, dict[int, float]]) -> None:
    table = Table(title=f"{case} tokens, {CAPABILITIES} experts", title_justify="left", box=None)
    for column in ("contender", "ms", "over one pass", "goal"):
        table.add_column(column, justify="left" if column == "contender" else "right", no_wrap=True)
    for name, drawn in samples.items():
        over = brackets(ratio(drawn, samples["one pass"]))
        table.add_row(name, f"{min(drawn.values()) * 1e3:.3g}", over, "at least 2" if name == LOOP else "")
    console.print(table)


def _show_memory(console: Console, memory: dict[str, int]) -> None:
    if memory:
        low, full = (memory[base] / 2**30 for base in ("lora", "full"))
        console.print(
            f"a step of phase 1, {TASKS} tasks: {low:.2f} GiB with a low-rank change each, {full:.2f} with a network "
            f"each: {low / full:.2f} of it (goal: at most 0.33)"
        )
