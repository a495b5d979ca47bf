"""Which servers a run is drawn from: what names them, and what is wrong with them."""

import operator
import threading

import pytest
from rich.console import Console

from lim_sglang.errors import LimError, ServerError
from lim_sglang.evals.run_config import RunConfig
from lim_sglang.evals.scheduler import InFlight, Job
from lim_sglang.evals.servers import ProgramSampler, connected, sampling_of, split_urls
from lim_sglang.evals.tasks import Question
from lim_sglang.programs.schema import MATH_PROMPT, Access, Sampling
from tests.fakes.sglang_server import endless, eventually, serving


@pytest.mark.parametrize(
    "texts",
    [
        ["http://a:1", "http://b:2"],
        ["http://a:1 http://b:2"],
        ["a:1,b:2/"],
        ["a:1,", " b:2\n"],
    ],
)
def test_addresses_come_one_by_one_or_together(texts: list[str]) -> None:
    assert split_urls(texts) == ("http://a:1", "http://b:2")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["http://a:1", "a:1/"], "http://a:1 is named twice"),
        ([], "no server is named"),
        ([" , "], "no server is named"),
        (["http://b", "ftp://a"], "'ftp://a' is no server address"),
    ],
)
def test_names_of_no_server_or_of_one_server_twice_are_refused(
    texts: list[str], message: str
) -> None:
    with pytest.raises(LimError, match=message):
        split_urls(texts)


def test_all_servers_that_do_not_answer_are_named_at_once() -> None:
    urls = ["http://127.0.0.1:9", "http://127.0.0.1:7"]
    with pytest.raises(ServerError) as caught, connected(urls, Access(), Console()):
        pass
    assert all(f"no server answers at {url}" in str(caught.value) for url in urls)


@pytest.mark.parametrize("program", ["majority", "budget"])
def test_the_samples_in_work_are_counted_with_the_tokens_that_are_known(program: str) -> None:
    config = RunConfig("aime24", program=program, num_samples=3, sampling={})
    job = Job(Question("q", "What is 1 + 1?", "2"), (0, 1, 2))
    with (
        serving(lambda _: endless("so")) as fake,
        connected([fake.url], Access(), Console(quiet=True)) as (connection,),
    ):
        sampler = ProgramSampler(
            connection.backend,
            config,
            prompt=MATH_PROMPT,
            sampling=Sampling(),
            parallel=3,
            equivalent=operator.eq,
        )
        assert sampler.in_flight() == InFlight()
        work = threading.Thread(target=sampler, args=(job, lambda *_: False), daemon=True)
        work.start()
        is_streamed = program == "budget"
        assert eventually(lambda: sampler.in_flight().num_samples == 3)
        if is_streamed:
            assert eventually(lambda: sampler.in_flight().num_tokens == 3)
        else:
            assert sampler.in_flight().num_tokens == 0
        connection.backend.close()
        work.join(10)
    assert sampler.in_flight() == InFlight()


def test_each_question_has_a_seed_of_its_own_that_follows_from_the_runs() -> None:
    sampling = Sampling(seed=7)
    seeds = [sampling_of(sampling, f"q{number}").seed for number in range(100)]
    assert len(set(seeds)) == 100
    assert all(seed is not None and 0 <= seed < 2**62 for seed in seeds)
    assert sampling_of(sampling, "q1") == sampling_of(sampling, "q1")
    assert sampling_of(Sampling(seed=8), "q1").seed != seeds[1]
    assert sampling_of(Sampling(), "q1") == Sampling()
