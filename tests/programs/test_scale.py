"""Many samples at once: threads and memory stay bounded."""

import json
from contextlib import closing
from pathlib import Path
from threading import active_count

from lim_sglang.programs.endpoint import Endpoint
from lim_sglang.programs.records import Sample
from tests.programs.chains import Chain
from tests.programs.drawn import no_thread_is_left, run_on
from tests.programs.fake_server import completion, serving
from tests.programs.forking import ROOT, Forker

TOKENS = 20
SCRIPT = ROOT / "tests" / "programs" / "drawing_many.py"


def test_512_samples_at_once_take_a_thread_and_little_memory_each(
    forker: Forker, tmp_path: Path
) -> None:
    chain = Chain((*["hm "] * (TOKENS - 1), "\\boxed{391}"), pace_s=0.02)
    with serving(lambda _: chain) as fake:
        command = forker.start(tmp_path, str(SCRIPT), fake.url, "512")
        assert command.wait() == 0, command.error
    record = json.loads(command.output)
    assert record["states"] == {"finished": 512}
    assert record["tokens"] == 512 * TOKENS
    assert len({body["rid"] for body in fake.requests}) == 512
    assert not fake.aborted
    assert record["threads"] <= 512 + 8
    assert record["grown_bytes"] < 100e6
    assert record["left"] <= 2
    assert record["seconds"] < 30


def test_a_sample_that_could_only_wait_for_a_place_has_no_thread() -> None:
    most = 0

    def note(_: Sample) -> None:
        nonlocal most
        most = max(most, active_count())

    with no_thread_is_left(), serving(lambda _: completion("\\boxed{391}")) as fake:
        before = active_count()
        with closing(Endpoint(fake.url, max_concurrency=2)) as endpoint:
            outcome = run_on(endpoint, 40, note, parallel=40)
    assert outcome.vote.votes == 40
    assert fake.most_running <= 2
    # The program, the client, two branches that end and two that run, the answers' own threads.
    assert most - before <= 12
