"""The policies by the names that options and JSON give them."""

from collections.abc import Mapping

from lim_sglang.policies.delta import Delta
from lim_sglang.policies.full import Full
from lim_sglang.policies.lessismore import LessIsMore
from lim_sglang.policies.lossless import Lossless
from lim_sglang.policies.omnikv import OmniKV
from lim_sglang.policies.policy import Policy
from lim_sglang.policies.quest import Quest
from lim_sglang.policies.seer import Seer
from lim_sglang.policies.streaming import Streaming
from lim_sglang.policies.tidal import Tidal

POLICIES: Mapping[str, type[Policy]] = {
    "lessismore": LessIsMore,
    "full": Full,
    "lossless": Lossless,
    "streaming": Streaming,
    "tidal": Tidal,
    "quest": Quest,
    "seer": Seer,
    "delta": Delta,
    "omnikv": OmniKV,
}
