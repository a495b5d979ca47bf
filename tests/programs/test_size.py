"""Formulas with numbers too large to compute are known at once."""

import time

import pytest

from lim_sglang.programs.grading.equivalence import EquivalenceChecker
from lim_sglang.programs.grading.size import too_large


@pytest.mark.parametrize(
    "latex",
    [
        "10^{10^{10}}",
        "9^9^9^9",
        "10**10**10",
        r"\frac{1}{10^{10^{10}}}",
        "10^{-10^{10}}",
        "1.0000001^{10^{10}}",
        r"\left(\frac{1}{3}\right)^{10^8}",
        "((((2^9)^9)^9)^9)^9",
        "e^{e^{e^{e^{e}}}}",
        r"3^{10^8} \mod 7",
        r"\sqrt{10^{\sqrt{10^{20}}}}",
        "x + 7^{10000000}",
        "10000000!",
        "(10!)!",
        "5!!!!!!!!",
        "9" * 50 + "!",
        r"\Gamma(10^{10})",
        r"\binom{1000000}{500000}",
        r"\dbinom{10^9}{10^8}",
        "(x+1)^{1000}",
        "(x+y+z)^{40}",
        r"\sum_{n=1}^{10000} \frac{1}{n^2+1}",
        r"\prod_{n=1}^{10^9} n",
        "(" * 200 + "2^2" + ")" * 200,
    ],
)
def test_a_number_too_large_to_compute_equals_its_own_text_alone_and_takes_no_time(
    latex: str,
) -> None:
    with EquivalenceChecker() as checker:
        began = time.process_time()
        assert not checker.equivalent(latex, "391")
        assert not checker.equivalent("x^2 + 1", latex)
        assert checker.equivalent(latex, f"$ {latex} $")
        assert time.process_time() - began < 0.5


@pytest.mark.parametrize(
    "latex",
    [
        "2^{10000}",
        "1000!",
        "5!!",
        r"\binom{2024}{1012}",
        r"\binom{10^{10}}{5}",
        r"\frac{2^{2024}}{3^{1000}}",
        "1.05^{360}",
        "e^{0.6931471805599453}",
        "x^{10^{10}}",
        "(x+1)^{100}",
        "(x+1)^n",
        "2^{-1/2}",
        "(-8)^{1/3}",
        "0^{-1}",
        r"\infty^{\infty}",
        r"\binom{n}{10}",
        r"\sum_{n=1}^{\infty} \frac{1}{n^2}",
        "(-5)!",
        "^",
        "x^",
        r"\frac{2^3}",
        "]2^3[",
        "10^{1/(1-1)}",
    ],
)
def test_any_other_formula_is_left_to_math_verify(latex: str) -> None:
    assert not too_large(latex)
