"""Models by name, for command lines: ours, timm's, torchvision's."""

from __future__ import annotations

import copy
import difflib
import importlib
import inspect
from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..models import BUILDERS
from ..testing.vision import import_torchvision
from .errors import Refused


def _without_weights(builder: Callable) -> dict[str, None]:
    """Arguments by which a builder of torchvision's downloads nothing: detection's would, for its backbone."""
    return dict.fromkeys({"weights", "weights_backbone"} & inspect.signature(builder).parameters.keys())


#: Libraries whose models can be named ``library:name``, each with how it builds and how it lists them.
SOURCES: dict[str, tuple[str, Callable, Callable]] = {
    "timm": ("timm", lambda timm, name, options: timm.create_model(name, **options), lambda timm: timm.list_models()),
    "torchvision": (
        "torchvision.models",
        lambda models, name, options: models.get_model(
            name, **_without_weights(models.get_model_builder(name)), **options
        ),
        lambda models: models.list_models(),
    ),
}
FORMS = "one of " + ", ".join(BUILDERS) + ", or timm:NAME, or torchvision:NAME"


def build(name: str, **options) -> nn.Module:
    """A freshly initialised model, without downloaded weights.

    Args:
        name: a builder of :mod:`resnet_fused.models`, or ``timm:NAME``, or ``torchvision:NAME``.
        options: for its builder, as ``num_classes=10``.

    Raises:
        Refused: nobody has this model, or its library does not import; the text says what is accepted.
    """
    source, colon, rest = name.partition(":")
    if not colon:
        if name not in BUILDERS:
            raise Refused(f"unknown model {name!r}; pass {FORMS}")
        return BUILDERS[name](**options)
    if source not in SOURCES:
        raise Refused(f"unknown model source {source!r} in {name!r}; pass {FORMS}")
    module_name, create, list_models = SOURCES[source]
    try:
        import_torchvision()  # timm imports it too
        library = importlib.import_module(module_name)
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        reason = str(error).partition("\n")[0]
        advice = f"pip install {source}, and a torchvision that was built for torch {torch.__version__}"
        raise Refused(f"{name}: {source} does not import here ({reason}); {advice}, or pass {FORMS}") from error
    known = list_models(library)
    if rest not in known:
        close = difflib.get_close_matches(rest, known, 5) or sorted(known)[:5]
        raise Refused(f"{source} has no model {rest!r}; close are {', '.join(close)}")
    return create(library, rest, options)


def input_size(model: nn.Module) -> int:
    """The resolution a model is meant for: timm's own word, else 224."""
    config = getattr(model, "default_cfg", None) or {}
    return int(config.get("input_size", (3, 224, 224))[-1])


def require_taken(model: nn.Module, size: Sequence[int]) -> None:
    """Raise :class:`Refused` where `model`, in the mode it is in, does not make a tensor of an input of `size`.

    Tried with the model as it comes, not fused, on meta tensors: nothing is computed.
    """
    shape = "x".join(map(str, size))
    try:
        with torch.no_grad():
            out = copy.deepcopy(model).to("meta")(torch.empty(tuple(size), device="meta"))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Refused(f"this model does not take an input of {shape}: {reason}; see --size and --batch") from error
    if not isinstance(out, torch.Tensor):
        raise Refused(f"this model makes a {type(out).__name__} of an input of {shape}, no tensor; pass another model")
