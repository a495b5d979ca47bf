"""The final answer is found in any text, however long."""

import time

import pytest

from lim_sglang.programs.answers import extract_answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{5}.", "5"),
        (r"first \boxed{4}, no: \boxed{5}", "5"),
        (r"$$\boxed{\frac{1}{\sqrt{2}}}$$", r"\frac{1}{\sqrt{2}}"),
        (r"\fbox{7}", "7"),
        (r"\boxed {8} ", "8"),
        (r"\\boxed{9}", "9"),
        (r"$\boxed 5$", "5"),
        (r"\boxed -3/4 is it", "-3/4"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"a } b { c \boxed{6} }", "6"),
        (r"\boxed{a + \boxed{5}}", "5"),
        (r"\boxed{\binom{1 \\ 2}{3}}", r"\binom{1 \\ 2}{3}"),
        (r"\boxed{$5$}", "5"),
        (r"\boxed{\(5\)}", "5"),
        (r"\boxed{\$18.90}", r"\$18.90"),
        (r"\boxed{**204**}", "204"),
        (r"\boxed{\text{(C)}}", r"\text{(C)}"),
        (r"\boxed{10!}", "10!"),
        (r"\boxed{[-2,7]}", "[-2,7]"),
    ],
)
def test_the_last_box_is_the_answer(text: str, expected: str) -> None:
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{5} as I say, in \boxed{}", "5"),
        (r"\boxed{5} or is it \boxed{6", "5"),
        (r"within \boxed{...} and no more", None),
        (r"\boxed{", None),
        (r"the \boxed notation", None),
        (r"The answer is 3, to be put in \boxed{}.", "3, to be put in \\boxed{}"),
    ],
)
def test_an_empty_or_unclosed_box_is_no_answer(text: str, expected: str | None) -> None:
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is 5.", "5"),
        ("the final answer is: 3.14. Checked!", "3.14"),
        ("Answer: 5\nQ.E.D.", "5"),
        ("**Answer:** 42", "42"),
        ("**Final Answer**: **42**", "42"),
        ("Answer:\n\n42", "42"),
        ("ANSWER: (C).", "(C)"),
        (r"The answer is $\frac{1}{2}$, since $x > 0$.", r"\frac{1}{2}"),
        ("The answer is $3$, $5$, and $7$.", "3$, $5$, and $7"),
        ("The answer is:\n\\[\nx = 5\n\\]\nDone.", "x = 5"),
        (r"The answer is \(5\).", "5"),
        ("The answer is $18.90. She had $20.", "18.90"),
        ("Perhaps the answer is 4. No, the answer is 5.", "5"),
        ("Final answer: The answer is no solution", "no solution"),
        ("#### 72", "72"),
        ("so\n####  $1,000$ \n", "1,000"),
    ],
)
def test_without_a_box_the_last_statement_is_the_answer(text: str, expected: str) -> None:
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "So it comes to 42.",
        "x = 42",
        "#### Step 3: add",
        "#### Conclusion",
        "The answer is",
        "Answer: **",
        "answers vary: 3",
        "The answer is supposed to be an integer.",
        "unanswered",
    ],
)
def test_nothing_else_counts_as_an_answer(text: str) -> None:
    assert extract_answer(text) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{4}</think>So \boxed{5}", "5"),
        (r"\boxed{4}</think>The answer is 5.", "5"),
        (r"\boxed{4}</think>That is it.", "4"),
        (r"\boxed{4}</think>", "4"),
        (r"\boxed{3}</think>\boxed{4}</think>So \boxed", "4"),
        (r"hm, \boxed{4", None),
    ],
)
def test_the_reply_comes_before_the_thoughts(text: str, expected: str | None) -> None:
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5", "5"),
        (" 5.\n", "5"),
        ("**1,024**", "1,024"),
        ("-3/4", "-3/4"),
        ("50%", "50%"),
        (r"$\frac{1}{2}$", r"\frac{1}{2}"),
        (r"\(x^2\)", "x^2"),
        ("(B)", "(B)"),
        ("C.", "C"),
        (r"is it \boxed{4}?</think>5", "5"),
        ("5 apples", None),
        ("I", "I"),
        ("Paris", None),
        ("b", None),
        ("1. First", None),
        ("$5 and $6", None),
        ("$$", None),
    ],
)
def test_a_reply_that_is_nothing_but_an_answer_is_one(text: str, expected: str | None) -> None:
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    "piece",
    [
        r"\boxed{",
        r"\boxed{5}",
        r"\boxed{5",
        r"\boxed 5",
        "\\boxed" + " " * 90,
        "\\",
        "{",
        "}",
        "####\n",
        "#",
        "answer: ",
        "answer is \n",
        "answer: $",
        "answer: \\[",
        "answer: ab cd ef gh ij ",
        "answer: $a$, $ab cd ef gh ij$, ",
        "answer: . ",
        "*",
        " ",
        "</think>",
    ],
)
def test_hundreds_of_thousands_of_characters_take_no_time(piece: str) -> None:
    began = time.process_time()
    extract_answer(piece * (300_000 // len(piece)))
    assert time.process_time() - began < 2.0


@pytest.mark.parametrize(
    "text",
    [
        r"The final answer is within \boxed{}.",
        r"Put it in a box. The answer is \boxed{ }",
        r"Answer: \boxed{}",
        r"The final answer is \boxed",
    ],
)
def test_the_prompts_own_words_are_no_answer(text: str) -> None:
    assert extract_answer(text) is None


def test_a_statement_before_the_prompts_own_words_still_counts() -> None:
    assert extract_answer(r"The answer is 391. The answer is within \boxed{}.") == "391"
