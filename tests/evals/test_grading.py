"""Integers and letters are read by ourselves; all other answers are math-verify's."""

import pytest

from lim_sglang.evals.grading import MAX_READ, AnswerKind, Grader, as_choice, as_integer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("204", 204),
        ("023", 23),
        ("000", 0),
        ("999", 999),
        (" $104$. ", 104),
        ("(7)", 7),
        (r"\left(7\right)", 7),
        (r"\textbf{45}", 45),
        (r"\boxed{45}", 45),
        (r"45 \text{ cm}", 45),
        (r"45^\circ", 45),
        (r"45^{\circ}", 45),
        ("45°", 45),
        (r"45\%", 45),
        ("45.00", 45),
        ("m + n = 45", 45),
        ("a+b = 40+5 = 45", 45),
        (r"\text{area} = 45", 45),
        ("45.5", None),
        ("1204", None),
        ("-4", None),
        ("4!", None),
        ("2^3", None),
        ("40 + 5", None),
        ("4 5", None),
        ("4,5", None),
        ("x=4, y=5", None),
        ("x=4 and y=5", None),
        (r"x=4 \text{ or } x=5", None),
        (r"\frac{8}{2}", None),
        ("7th", None),
        ("two", None),
        ("", None),
        ("=", None),
        ("٣", None),
        ("0" * (MAX_READ - 1) + "5", 5),
        ("0" * MAX_READ + "5", None),
    ],
)
def test_as_integer_reads_answers_of_the_aime(text: str, expected: int | None) -> None:
    assert as_integer(text) == expected


@pytest.mark.parametrize("letter", "ABCDEFGHIJ")
@pytest.mark.parametrize("form", ["{}", " {} ", "({})", "[{}]", "{})", "{}.", "**{}**", "${}$"])
def test_a_letter_is_chosen_with_and_without_brackets(letter: str, form: str) -> None:
    assert as_choice(form.format(letter)) == letter
    assert as_choice(form.format(letter.lower())) == letter


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\text{B}", "B"),
        (r"\textbf{(B)}", "B"),
        (r"\mathrm{ B }", "B"),
        (r"\boxed{\text{B}}", "B"),
        (r"\text{B) }4.2", "B"),
        ("B) because it is heavier", "B"),
        ("b) because it is heavier", "B"),
        ("B. 4.2 eV", "B"),
        ("B: C is too small", "B"),
        ("B, a noble gas", "B"),
        ("(B)\n4.2 eV", "B"),
        ("option B", "B"),
        ("The correct option is (B)", "B"),
        ("final answer: b", "B"),
        ("K", None),
        ("BC", None),
        ("b, c", None),
        ("B, C", None),
        ("B/C", None),
        ("A or B", None),
        ("(A) and (B)", None),
        ("a) and b)", None),
        ("A, B, or C", None),
        ("a number", None),
        ("A number", None),
        ("not B", None),
        ("Boron", None),
        ("4.2", None),
        ("x+1", None),
        (r"\frac{1}{2}", None),
        ("", None),
    ],
)
def test_as_choice_reads_one_letter(text: str, expected: str | None) -> None:
    assert as_choice(text) == expected


class Recorder:
    """Notes what it is asked, and finds everything equal."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []

    def equivalent(self, a: str, b: str) -> bool:
        self.asked.append(("same", a, b))
        return True

    def correct(self, gold: str, answer: str) -> bool:
        self.asked.append(("correct", gold, answer))
        return True


def test_expressions_are_the_judges_and_no_answer_is_wrong() -> None:
    checker = Recorder()
    grader = Grader(AnswerKind.EXPRESSION, checker)
    assert grader.correct("1", "2")
    assert grader.equivalent("1", "2")
    assert not grader.correct("1", None)
    assert grader.equivalent("x", "x")
    assert checker.asked == [("correct", "1", "2"), ("same", "1", "2")]


@pytest.mark.parametrize(
    ("kind", "equal", "other", "unread"),
    [
        (AnswerKind.INTEGER, ("025", "25.0"), "26", "25x"),
        (AnswerKind.CHOICE, ("(B)", "B) since"), "C", "x+1"),
    ],
)
def test_what_is_read_is_compared_without_the_judge(
    kind: AnswerKind, equal: tuple[str, str], other: str, unread: str
) -> None:
    checker = Recorder()
    grader = Grader(kind, checker)
    gold, answer = equal
    assert grader.correct(gold, answer)
    assert grader.equivalent(gold, answer)
    for wrong in (other, unread):
        assert not grader.correct(gold, wrong)
        assert not grader.equivalent(gold, wrong)
    # What cannot be read is nobody's equal, but a vote for itself.
    assert not grader.correct(unread, unread)
    assert grader.equivalent(unread, unread)
    assert not grader.equivalent(unread, f"{unread} ")
    assert checker.asked == []
