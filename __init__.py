"""moezoo: the model zoo for Mixture-of-Experts outside language modelling."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .recipes import create_model, list_recipes
    from .zoo.core import MoE
    from .zoo.weights import load

__version__ = "0.1.0"
__all__ = ["MoE", "__version__", "create_model", "list_recipes", "load"]

_HOMES = {"list_recipes": ".recipes", "create_model": ".recipes", "load": ".zoo.weights", "MoE": ".zoo.core"}


def __getattr__(name: str) -> Any:
    # PEP 562: `import moezoo` must not pay for torch.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], "moezoo"), name)
    raise AttributeError(f"module 'moezoo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
