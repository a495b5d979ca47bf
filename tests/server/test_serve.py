"""`lim serve` before and after the server: what it refuses, what it shows."""

from lim_sglang.serve import _device, _options_of_ours, ready_block
from lim_sglang.server import ServerOptions

ROLES = ["full", "full", "select", "reuse", "select", "reuse"]


def live(roles: list[str], policy: str = "lessismore") -> dict[str, object]:
    """What a server shows of itself."""
    return {"config": {"policy": policy, "budget": 256}, "roles": roles}


def test_the_block_says_where_what_and_how() -> None:
    block = ready_block(ServerOptions("some/model", port=31000), live(ROLES))
    assert "http://127.0.0.1:31000" in block
    assert "some/model" in block
    assert "2 of 6 layers read 256 tokens picked at layers 2, 4" in block
    assert 'lim ask "What is 17 * 23?"' in block


def test_the_block_does_not_claim_sparsity_for_a_dense_schedule() -> None:
    block = ready_block(ServerOptions("some/model"), live(["full"] * 6, "full"))
    assert "all 6 layers read everything" in block


def test_the_block_never_shows_the_key() -> None:
    block = ready_block(ServerOptions("some/model", api_key="secret"), live(ROLES))
    assert "secret" not in block
    assert "$LIM_API_KEY" in block


def test_options_that_lim_has_to_know_are_refused_after_the_border() -> None:
    reasons = _options_of_ours(["--port", "8", "--host=0.0.0.0", "--tp-size", "2"])
    assert [reason.split()[0] for reason in reasons] == ["--port", "--host"]


def test_the_device_is_read_in_both_spellings() -> None:
    assert _device(["--device", "cpu"]) == _device(["--device=cpu"]) == "cpu"
    assert _device(["--dtype", "float32"]) is None
