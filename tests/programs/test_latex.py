"""Answers are put in the LaTeX that math-verify reads."""

import pytest

from lim_sglang.programs.grading.latex import as_latex, plain


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (r" $\frac{1}{2}$. ", r"\frac{1}{2}"),
        ("a\n b", "a b"),
        ("45°", "45"),
        ("(-∞, 3)", r"(-\infty , 3)"),
        ("½x²", r"\frac{1}{2}x^2"),
        ("€5", "€5"),
        ("x²3", "x^{2}3"),
        ("2¹⁰", "2^{10}"),
        ("\uff11\uff12", "12"),
        (r"12\,345", "12345"),
        ("1 234 567", "1234567"),
        ("12 34", "12 34"),
        ("3 125/1000", r"3\frac{125}{1000}"),
        ("-3 1/2", r"-3\frac{1}{2}"),
        ("10^-3x", "10^{-3}x"),
        ("1.5e3", "1500"),
        (r"-2.5\times10^{-3}", "-0.0025"),
        (r"3 \cdot 10^2", "300"),
        (f"{'7' * 40}e2", f"{'7' * 40}00"),
        ("2e", "2e"),
        ("1e1000000000", "1e1000000000"),
        (r"0.\overline{3}", r"\frac{3}{9}"),
        (r"-2.1\overline{6}", r"-\frac{195}{90}"),
        (r".0\overline{01}", r"\frac{1}{990}"),
        (r"\overline{AB}", r"\overline{AB}"),
    ],
)
def test_an_answer_is_put_as_math_verify_reads_it(answer: str, expected: str) -> None:
    assert as_latex(plain(answer)) == expected
