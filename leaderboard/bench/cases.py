"""What is measured, and how fast it ought to be.

Shapes are written N,d,h,E,k: tokens, width of the input, width of the hidden layer, experts, experts per token.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from ...errors import UserError

Shape = tuple[int, int, int, int, int]
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Case:
    """One row of the grid; its contenders are timed side by side.

    Attributes:
        part: "ffn" is given the routing; "layer" also chooses it and adds the balance loss.
        act: "gelu" experts have two layers; "swiglu" ones gate the first, as Mixtral and Qwen do.
        mode: "train" is forward and backward, "infer" a forward pass under `no_grad`.
        skew: largest over mean load of the experts; None draws experts evenly.
        bias: whether the experts' layers have one; most peers' do not.
    """

    tokens: int
    dim: int
    hidden: int
    experts: int
    top_k: int
    part: Literal["ffn", "layer"] = "ffn"
    act: Literal["gelu", "swiglu"] = "gelu"
    dtype: Literal["fp32", "bf16"] = "fp32"
    mode: Literal["train", "infer"] = "train"
    skew: float | None = None
    bias: bool = False

    @property
    def shape(self) -> str:
        return f"{self.tokens},{self.dim},{self.hidden},{self.experts},{self.top_k}"

    @property
    def name(self) -> str:
        """For example `ffn-gelu-fp32-4096,64,128,8,2-skew3.2`."""
        words = [self.part, self.act, self.dtype, self.shape]
        words += [f"skew{self.skew:g}"] if self.skew else []
        words += ["bias"] if self.bias else []
        words += ["infer"] if self.mode == "infer" else []
        return "-".join(words)


@dataclass(frozen=True)
class Goal:
    """At most so much, in units of the floor ("floor"), microseconds ("us") or seconds ("s")."""

    limit: float
    unit: Literal["floor", "us", "s"] = "floor"


IMPORT_GOAL = Goal(0.2, "s")
NEAR = 1.05  # a peer counts as faster only where the interval of ours/peer lies above this

_FFN: list[Shape] = [
    (256, 64, 128, 4, 1),
    (256, 64, 128, 8, 2),
    (256, 64, 128, 64, 2),
    (256, 64, 128, 64, 8),
    (256, 256, 256, 16, 4),
    (256, 256, 512, 8, 2),
    (256, 256, 512, 64, 8),
    (4096, 64, 128, 4, 1),
    (4096, 64, 128, 8, 2),
    (4096, 64, 128, 64, 2),
    (4096, 64, 128, 64, 8),
    (4096, 256, 512, 8, 2),
    (4096, 256, 512, 64, 2),
    (16384, 64, 128, 8, 2),
    (16384, 64, 128, 64, 2),
    (2048, 512, 1024, 8, 2),
]
_LAYER: list[Shape] = [
    (256, 64, 128, 8, 2),
    (256, 256, 256, 16, 4),
    (4096, 64, 128, 8, 2),
    (4096, 64, 128, 64, 2),
    (4096, 256, 512, 8, 2),
    (2048, 512, 1024, 8, 2),
]
_BF16: list[Shape] = [
    (256, 64, 128, 64, 2),
    (4096, 64, 128, 8, 2),
    (4096, 64, 128, 64, 2),
    (4096, 256, 512, 8, 2),
]
_SKEWED = [Case(4096, 64, 128, 8, 2, skew=3.2), Case(4096, 64, 128, 64, 2, skew=6.6)]
_FEW_TOKENS: list[Shape] = [(1, 256, 256, 16, 4), (1, 64, 128, 8, 2), (16, 256, 256, 16, 4)]

# Keys are a case and a contender of ours.
GOALS: dict[tuple[str, str], Goal] = {
    ("ffn-gelu-fp32-4096,64,128,8,2", "ours"): Goal(1.25),
    ("ffn-gelu-fp32-4096,256,512,8,2", "ours"): Goal(1.10),
    ("ffn-gelu-fp32-2048,512,1024,8,2", "ours"): Goal(1.10),
    ("ffn-swiglu-fp32-4096,256,512,8,2", "ours"): Goal(1.10),
    ("ffn-swiglu-fp32-2048,512,1024,8,2", "ours"): Goal(1.10),
    ("ffn-gelu-fp32-4096,64,128,64,2", "ours"): Goal(1.40),
    ("ffn-gelu-fp32-256,64,128,8,2", "ours"): Goal(1.6),
    ("ffn-gelu-fp32-4096,64,128,8,2-skew3.2", "ours"): Goal(1.3),
    ("layer-gelu-fp32-4096,64,128,8,2", "ours"): Goal(1.45),
    ("layer-gelu-fp32-256,64,128,8,2", "ours"): Goal(2.0),
    ("layer-gelu-fp32-4096,64,128,64,2", "ours"): Goal(1.6),
    ("ffn-gelu-fp32-1,256,256,16,4-infer", "ours"): Goal(180, "us"),
    ("ffn-gelu-bf16-4096,64,128,64,2", "ours"): Goal(2.1),
    # One GPU: (a) large, (b) mid, (c) domain-sized and bound by kernel launches.
    ("ffn-swiglu-bf16-16384,2048,768,128,8", "ours"): Goal(2.0),
    ("ffn-gelu-bf16-16384,512,1024,8,2", "ours"): Goal(2.0),
    ("ffn-gelu-bf16-16384,512,1024,8,2", "ours/compiled"): Goal(1.4),
    ("ffn-gelu-bf16-256,256,256,16,4", "ours"): Goal(3.0),
    ("ffn-gelu-bf16-256,256,256,16,4", "ours/compiled"): Goal(1.5),
}


def grid(device: Device) -> list[Case]:
    """Every case of a device."""
    if device == "cuda":
        return [
            Case(16384, 2048, 768, 128, 8, act="swiglu", dtype="bf16"),
            Case(16384, 2048, 768, 128, 8, "layer", "swiglu", "bf16"),
            Case(16384, 512, 1024, 8, 2, dtype="bf16"),
            Case(16384, 512, 1024, 8, 2, "layer", "swiglu", "bf16"),
            Case(256, 256, 256, 16, 4, dtype="bf16"),
            Case(256, 256, 256, 16, 4, "layer", "swiglu", "bf16"),
            Case(256, 256, 256, 16, 4),
            Case(4096, 256, 512, 8, 2),  # grouped_mm would wait for the device here
            Case(4096, 256, 512, 8, 2, "layer", "swiglu"),
        ]
    return [
        *(Case(*shape) for shape in _FFN),
        *_SKEWED,
        *(Case(*shape, act="swiglu") for shape in _LAYER),
        *(Case(*shape, "layer", "gelu") for shape in _LAYER),
        *(Case(*shape, "layer", "swiglu") for shape in _LAYER),
        Case(4096, 64, 128, 8, 2, "layer", bias=True),
        *(Case(*shape, dtype="bf16") for shape in _BF16),
        Case(4096, 64, 128, 64, 2, dtype="bf16", skew=6.6),
        *(Case(*shape, "layer", "swiglu", "bf16") for shape in _BF16),
        *(Case(*shape, mode="infer") for shape in _FEW_TOKENS),
        *(Case(*shape, "layer", "swiglu", mode="infer") for shape in _FEW_TOKENS),
    ]


def quick() -> list[Case]:
    """Two cases that take seconds."""
    return [Case(256, 64, 128, 8, 2), Case(256, 64, 128, 8, 2, "layer", "swiglu")]


def parse_case(name: str) -> Case:
    """The case of a name, in the grid or not: `ffn-gelu-fp32-100,16,32,4,2`.

    Raises:
        UserError: not the name of a case.
    """
    words, skew = name.split("-"), None
    try:
        part, act, dtype, shape, *options = words
        for option in options:
            if option.startswith("skew"):
                skew = float(option.removeprefix("skew"))
        rest = [option for option in options if not option.startswith("skew")]
        tokens, dim, hidden, experts, top_k = (int(size) for size in shape.split(","))
        case = Case(
            tokens, dim, hidden, experts, top_k, part, act, dtype,  # type: ignore[arg-type]
            "infer" if "infer" in rest else "train", skew, "bias" in rest,
        )  # fmt: skip
        valid = part in ("ffn", "layer") and act in ("gelu", "swiglu") and dtype in ("fp32", "bf16")
        valid = valid and min(tokens, dim, hidden, experts, top_k) >= 1 and top_k <= experts
    except ValueError:
        valid = False
    if not valid or case.name != name:
        raise UserError(
            f"case '{name}': none of the grid fits, and it is not a name such as ffn-gelu-fp32-256,64,128,8,2 "
            "(part, activation, dtype, N,d,h,E,k, then -skew3.2, -bias or -infer); `moezoo bench core --list` shows all"
        )
    return case


def select_cases(patterns: list[str], device: Device) -> list[Case]:
    """The cases that names or shell patterns stand for, each once; the whole grid for none.

    Raises:
        UserError: a pattern that fits nothing.
    """
    every = grid(device)
    chosen: list[Case] = []
    for pattern in patterns or ["*"]:
        found = [case for case in every if fnmatchcase(case.name, pattern)]
        chosen += found or [parse_case(pattern)]
    return list(dict.fromkeys(chosen))
