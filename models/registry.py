"""Names of the variants that this package registers with timm."""

import timm
from timm.models import model_entrypoint


def retoken_models() -> list[str]:
    """Return the names of the variants that this package registers."""
    return [name for name in timm.list_models() if is_retoken(name)]


def is_retoken(name: str) -> bool:
    """Return True for a variant that this package registers, False for another model of timm's."""
    return bool(model_entrypoint(name).__module__.startswith(f"{__package__}."))
