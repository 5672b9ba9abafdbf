"""AutoAttack's standard version (Croce & Hein 2020), by the package `pyautoattack`, and the flags that it raises."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..errors import UserError
from ..zoo.advmoe import RobustModel

# What the package's warnings begin to say, and our names for them.
_FLAGS = {
    "randomized": "it seems to be a randomized defense",
    "probabilities": "it seems that the output is a probability distribution",
    "zero_gradient": "points with zero gradient",
    "square": "Square Attack has decreased the robust accuracy",
    "dynamic": "it seems to be a dynamic defense",
}


class AutoAttacked(NamedTuple):
    """Images that withstand every attack, AutoAttack's own adversarial images, and its flags, name -> text."""

    robust: Bool[Tensor, " batch"]
    adversarial: Float[Tensor, "batch channels height width"]
    flags: dict[str, str]


def available() -> bool:
    """Whether the package is installed (extra `robustness`)."""
    return find_spec("pyautoattack") is not None


def auto_attack(
    model: RobustModel,
    image: Float[Tensor, "batch channels height width"],
    label: Int[Tensor, " batch"],
    eps: float,
    seed: int = 0,
    batch_size: int = 250,
    progress: Callable[[str], object] | None = None,
) -> AutoAttacked:
    """APGD-CE, APGD-T, FAB-T (100 steps each, up to nine targets) and Square (5,000 queries), worst case per image.

    With three classes or fewer the targeted ones have no loss: APGD-CE, FAB and Square remain. The model is to be in
    eval mode, inside `attackable`. `progress` is told the accuracy after each attack: they take minutes on a CPU.

    Raises:
        UserError: the package is missing.
    """
    if not available():
        raise UserError(
            "AutoAttack needs the extra 'robustness': pip install 'moezoo[robustness]', or leave it out with "
            "--model.autoattack 0"
        )
    from pyautoattack import AutoAttack, checks

    checks.funcs.update(dict.fromkeys(checks.funcs, 0))  # the package counts over the whole process
    network, classes = _Logits(model).eval(), int(model(image[:1]).logits.shape[-1])
    with _quiet_trace(), _warnings(progress) as said:
        if classes > 3:
            attack = AutoAttack(network, norm="Linf", eps=eps, seed=seed, device=image.device)
            targets = min(9, classes - 1)
            attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = targets
        else:
            names = ["apgd-ce", "fab", "square"]
            attack = AutoAttack(
                network, norm="Linf", eps=eps, seed=seed, device=image.device, version="custom", attacks=names
            )
        adversarial, _ = attack.run_standard_evaluation(image, label.long(), batch_size=batch_size)
    with torch.no_grad():
        chunks = zip(adversarial.split(batch_size), label.split(batch_size), strict=True)
        robust = torch.cat([network(x).argmax(-1) == y for x, y in chunks])
    flags = {name: text for text in said for name, start in _FLAGS.items() if start in text}
    return AutoAttacked(robust, adversarial, flags)


class _Logits(nn.Module):
    """What the package calls: images to logits."""

    def __init__(self, model: RobustModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.model(image).logits
        return logits


@contextmanager
def _warnings(progress: Callable[[str], object] | None = None) -> Iterator[list[str]]:
    """What the package warns of; nothing of it reaches the terminal but what `progress` is told."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if record.levelno >= logging.WARNING:
                said.append(text.removesuffix(" See flags_doc.md for details."))
            elif progress is not None and text.startswith(("initial accuracy", "robust accuracy after")):
                progress(f"AutoAttack: {text}")

    logger, listener = logging.getLogger("auto-attack"), Listener(logging.DEBUG)
    before = logger.propagate, logger.level
    logger.addHandler(listener)
    logger.propagate = False
    logger.setLevel(logging.DEBUG)
    try:
        yield said
    finally:
        logger.removeHandler(listener)
        logger.propagate = before[0]
        logger.setLevel(before[1])


@contextmanager
def _quiet_trace() -> Iterator[None]:
    """The package's check for dynamic defences takes away the trace function, which a debugger wants back."""
    before = sys.gettrace()
    try:
        yield
    finally:
        sys.settrace(before)
