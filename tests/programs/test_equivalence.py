"""Answers are compared by math-verify, in processes that may hang, die or be interrupted."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from lim_sglang.errors import LimError
from lim_sglang.programs.grading.equivalence import MAX_LENGTH, EquivalenceChecker
from lim_sglang.programs.grading.forms import without_nouns
from lim_sglang.programs.grading.size import too_large
from lim_sglang.programs.grading.values import decide, read_value

SLOW = (r"\int_0^a x^{x^{x^x}} dx", "1")
"""math-verify works on this pair until it is stopped."""

ASKS_UNTIL_INTERRUPTED = r"""
import signal
from lim_sglang.programs.grading.equivalence import EquivalenceChecker
signal.signal(signal.SIGINT, signal.default_int_handler)
with EquivalenceChecker() as checker:
    checker.equivalent("x/2", "0.5x")
    print("asking", flush=True)
    checker.equivalent(r"\int_0^a x^{x^{x^x}} dx", "1")
"""


@pytest.fixture(scope="module")
def checker() -> Iterator[EquivalenceChecker]:
    with EquivalenceChecker() as shared:
        yield shared


@pytest.mark.parametrize(
    ("gold", "prediction", "expected"),
    [
        ("1/2", r"\frac{1}{2}", True),
        (r"\frac{1}{3}", "0.333333", False),
        (r"\frac{1}{3}", "0.33333333333", True),
        (r"\sqrt{2}", "1.41421356237", True),
        (r"\sqrt{2}", "1.4142", False),
        ("1", "0.99999999999", False),
        (r"\frac{1}{19!}", r"\frac{1}{20!}", False),
        ("17 * 23 = 376", "17 * 23 = 381", False),
        ("17 * 23 = 391", "391", True),
        ("x^2+1=0", "x^2+2=0", False),
        ("2x=6", "6", False),
        ("(1,2)", "2,1", False),
        (r"3\text{ h}", r"180\text{ min}", True),
        (r"3\text{ h}", r"3\text{ min}", False),
        (r"3\text{ h}", "3", True),
        ("0.0000012", r"\frac{14}{10000000}", False),
        (r"\frac{123456789}{1000}", "123456.789", True),
        ("4210_5", "4210_{5}", True),
        ("4210_5", "4210_6", False),
        ("4210_5", "4210", True),
        ("10,000", "10000", True),
        (r"10,\!080", "10{,}080", True),
        ("1,2", "12", False),
        ("x=5", "5", True),
        ("x=3", "y=3", False),
        (r"\textbf{(A)}", "(B)", False),
        (r"\text{June 20}", "June 21", False),
        ("(1,2)", "(2,1)", False),
        (r"\{1,2\}", "2, 1", True),
        ("5,6", "5", False),
        ("(3,4]", "[3,4]", False),
        ("(3,4]", r"3 < x \le 4", True),
        (r"50\%", "50%", True),
        (r"50\%", "0.5", True),
        ("90°", "90 degrees", True),
        (r"5.4 \text{ cents}", "5.4", True),
        (r"2\sqrt{3}", r"\sqrt{12}", True),
        (r"\pm\sqrt{19}", r"\sqrt{19},-\sqrt{19}", True),
        (r"\$18.90", "18.9", True),
        ("p - q", "q - p", False),
        ("12:30", "12 eggs and 30 chairs", False),
        ("5", "there are 5 of them", False),
        ("", "5", False),
        (r"\frac{", "5", False),
        ("\ud800", "5", False),
        # A choice is its letter, however it is written.
        ("B", "B)", True),
        (r"\mathrm{(C)}", "**C)**", True),
        ("J", "( J )", True),
        ("B", "C)", False),
        ("b", "b)", False),
        ("K", "K)", False),
        ("A", "(A", False),
        ("B", "(B) 42", False),
    ],
)
def test_equal_values_are_equal_answers(
    checker: EquivalenceChecker, gold: str, prediction: str, expected: bool
) -> None:
    assert checker.equivalent(gold, prediction) is checker.equivalent(prediction, gold) is expected


Workers = Callable[[], list[psutil.Process]]


@pytest.fixture
def workers() -> Workers:
    """List the processes that were started after this test began."""
    known = {child.pid for child in psutil.Process().children()}
    return lambda: [child for child in psutil.Process().children() if child.pid not in known]


def wait_for_end(process: psutil.Process) -> None:
    """Wait until a process is a zombie, which its parent has yet to notice."""
    deadline = time.monotonic() + 5
    while process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_no_worker_starts_for_texts_that_need_no_math_verify(workers: Workers) -> None:
    with EquivalenceChecker() as checker:
        assert checker.equivalent("5", "5")
        assert checker.equivalent(r"\text{(C)}", " **(C)**.")
        assert checker.equivalent(r"\textbf{(C)}", "C)")
        assert checker.equivalent("1,000".replace(",", r"\,"), "1e3")
        assert checker.equivalent("2.50", "+2.5")
        assert not checker.equivalent("2.50", "2.05")
        assert not checker.equivalent("9" * 30, "9" * 29 + "8")
        assert checker.equivalent("x²", "x^2")
        assert not checker.equivalent("5" * (MAX_LENGTH + 1), "5")
        assert workers() == []


def test_a_warmed_up_worker_is_not_waited_for_and_its_verdict_is_cached(workers: Workers) -> None:
    with EquivalenceChecker() as checker:
        began = time.monotonic()
        checker.warm_up()
        assert time.monotonic() - began < 1
        (worker,) = workers()
        assert checker.equivalent("x/2", "0.5x")
        worker.suspend()
        assert checker.equivalent("0.5x", "x/2")
        assert workers() == [worker]


def test_a_worker_that_hangs_is_replaced_and_its_pair_is_not_equal(
    workers: Workers, caplog: pytest.LogCaptureFixture
) -> None:
    with EquivalenceChecker(deadline_s=0.5) as checker:
        assert not checker.equivalent(*SLOW)
        assert "did not decide" in caplog.text
        assert workers() == []
        assert checker.equivalent("x/2", "0.5x")
        assert len(workers()) == 1


def test_a_worker_that_dies_is_replaced(workers: Workers, caplog: pytest.LogCaptureFixture) -> None:
    with EquivalenceChecker() as checker, ThreadPoolExecutor() as pool:
        assert checker.equivalent("x/2", "0.5x")
        (idle,) = workers()
        idle.kill()
        wait_for_end(idle)
        assert checker.equivalent("x/4", "0.25x")
        assert caplog.text == ""
        verdict = pool.submit(checker.equivalent, *SLOW)
        time.sleep(0.3)
        workers()[0].kill()
        assert not verdict.result(timeout=2)
        assert "did not decide" in caplog.text


def test_any_number_of_threads_shares_two_workers(
    checker: EquivalenceChecker, workers: Workers
) -> None:
    assert checker.equivalent("x/2", "0.5x")
    pairs = [(f"{n}x/8", f"{number}x") for n in range(12) for number in (n / 8, n / 8 + 1)]
    with ThreadPoolExecutor(8) as pool:
        verdicts = list(pool.map(lambda pair: checker.equivalent(*pair), pairs))
    assert verdicts == [True, False] * 12
    assert len(workers()) <= 1


def test_closing_ends_the_workers_at_once_and_verdicts_with_them(workers: Workers) -> None:
    with ThreadPoolExecutor() as pool:
        checker = EquivalenceChecker()
        assert checker.equivalent("x/2", "0.5x")
        verdict = pool.submit(checker.equivalent, *SLOW)
        time.sleep(0.3)
        began = time.monotonic()
        checker.close()
        with pytest.raises(RuntimeError, match="closed"):
            verdict.result(timeout=2)
        assert time.monotonic() - began < 1
    assert workers() == []
    with pytest.raises(RuntimeError, match="closed"):
        checker.equivalent("x/3", "2x/6")
    checker.close()


def test_ctrl_c_ends_the_program_and_its_workers_at_once(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(ASKS_UNTIL_INTERRUPTED)
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as program:
        assert program.stdout
        assert program.stdout.readline() == "asking\n"
        asked = psutil.Process(program.pid).children()
        time.sleep(0.2)
        os.killpg(program.pid, signal.SIGINT)
        _, complaint = program.communicate(timeout=3)
    assert complaint.count("Traceback") == 1
    assert complaint.endswith("KeyboardInterrupt\n")
    assert len(asked) == 1
    assert not asked[0].is_running()


@pytest.mark.parametrize(
    ("module", "reason"),
    [("raise ImportError('no antlr4')", "no antlr4"), ("raise SystemExit", "process ended")],
)
def test_a_checker_that_cannot_start_is_an_error_and_not_a_verdict(
    module: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "math_verify.py").write_text(module)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with EquivalenceChecker() as checker, pytest.raises(LimError, match=reason):
        checker.equivalent("x/2", "0.5x")


def test_importing_the_checker_is_light() -> None:
    heavy = "{'math_verify', 'sympy', 'torch', 'sglang'}"
    program = (
        f"import sys, lim_sglang.programs.grading.equivalence; print({heavy} & set(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert shown.stdout == "set()\n", shown.stderr


TOKENS_TEXT = (
    r"\ 1 2 10 3.5 { } $ ( ) [ ] ^ _ ! ° \\ \sqrt \frac \binom \sum \Gamma \infty % x e E I / \{ \}"
    r" \text{ + - = \3 \10 \pi < > \le , \in \mathbb{Z} \begin{pmatrix} \end{pmatrix} & | : ٣ ½"
    r" st th or and where \neq k n \circ ... \overline{ \hat{i} ^T ' C ~ \% \log kg decrease 12:30"
)
TOKENS = TOKENS_TEXT.split(" ")


def test_no_answer_raises() -> None:
    """Random texts of LaTeX, as samples that were cut off or went astray leave them."""
    draws = random.Random(0)
    texts = ["".join(draws.choices(TOKENS, k=draws.randint(1, 10))) for _ in range(1500)]
    texts += [r"2^\3", r"2^{\10}", r"x^2 = \4", r"5!\1", "2" + "^2" * 400, "5 R " * 22 + "1"]
    with EquivalenceChecker() as checker:
        for text, other in pairwise([*texts, "7"]):
            without_nouns(text, other)
            too_large(text)
            decide(read_value(text), read_value(other))
        for text in texts[-6:]:
            assert not checker.equivalent(text, "7")


@pytest.mark.parametrize(
    ("gold", "prediction"),
    [
        ("y=2x-3", "y=2x+3"),
        ("x^2+y^2=25", "x^2+y^2=9"),
        (r"r=7\sin\theta", r"r=7\cos\theta"),
        (r"y=\sin x+e^x", r"y=\sin x-e^x"),
        (r"x^2\ln y+y\sin x=C", r"x^2\ln y-y\sin x=C"),
        (r"\int_0^1 e^{-x^2}\sin(x^3)dx", "0.3"),
        (r"\frac{\sin x}{1+e^x}", r"\frac{\cos x}{1+e^x}"),
    ],
)
def test_formulas_that_differ_at_points_are_told_apart_without_sympy(
    checker: EquivalenceChecker, gold: str, prediction: str
) -> None:
    checker.equivalent("x/2", "0.5x")
    began = time.monotonic()
    assert not checker.equivalent(gold, prediction)
    # Milliseconds, where nothing else runs; by SymPy up to ten seconds.
    assert time.monotonic() - began < 5


def test_a_comparison_that_takes_long_is_stopped_and_its_pair_is_not_equal(
    workers: Workers, caplog: pytest.LogCaptureFixture
) -> None:
    with EquivalenceChecker() as checker:
        assert not checker.equivalent(*SLOW)
        (worker,) = workers()
        assert checker.equivalent("x/2", "0.5x")
        assert workers() == [worker]
        assert caplog.text == ""
