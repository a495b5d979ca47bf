"""Full attention: every layer reads everything."""

from dataclasses import dataclass
from typing import ClassVar

from lim_sglang.policies.policy import Policy, Role


@dataclass(frozen=True, kw_only=True)
class Full(Policy):
    """Dense layers only, by the same backend."""

    title: ClassVar[str] = "full"

    def roles(self, depth: int) -> tuple[Role, ...]:
        """Return FULL for every layer."""
        return (Role.FULL,) * depth
