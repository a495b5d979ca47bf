"""The final answer is found in texts of any length."""

import subprocess
import sys
import time

import pytest

from lim_sglang.programs.grading.answers import answer_line, extract_answer
from lim_sglang.programs.grading.kinds import MAX_PARSED_CHARS, AnswerKind, as_choice, as_integer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # The last box, without what surrounds its content.
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
        (r"\boxed{\(5\)}", "5"),
        (r"\boxed{\$18.90}", r"\$18.90"),
        (r"\boxed{**204**}", "204"),
        (r"\boxed{[-2,7]}", "[-2,7]"),
        # An empty box is the prompt's own, an unclosed one was cut off.
        (r"\boxed{5} as I say, in \boxed{}", "5"),
        (r"\boxed{5} or is it \boxed{6", None),
        (r"\boxed{56}, as said: \boxed{5", "56"),
        (r"\boxed{5}, so $\boxed{5$.", "5"),
        (r"within \boxed{...} and no more", None),
        (r"the \boxed notation", None),
        (r"The answer is 3, to be put in \boxed{}.", "3, to be put in \\boxed{}"),
        (r"Put it in a box. The answer is \boxed{ }", None),
        (r"The final answer is \boxed", None),
        (r"The answer is \boxed{12", None),
        (r"The answer is 391. The answer is within \boxed{}.", "391"),
        (r"The answer is: \boxed{} 32", "32"),
        (r"The answer is $\boxed{}$ = \frac{5}{6}.", r"\frac{5}{6}"),
        ("The answer is \\boxed{}\n\n32", "32"),
        (r"The answer is \boxed{} (C)", "(C)"),
        (r"The answer is \boxed{}, so 5", None),
        (r"The answer is in \boxed{} 4 times", None),
        ("So the answer is 42. The final answer is \\boxed{}\n\n1. First we compute", "42"),
        ("The answer is 42.\n\nThe final answer is \\boxed{}\n\nNote that 5 was used", "42"),
        ("The final answer is \\boxed{}\n\nStep 1: add 3 and 4", None),
        ("The answer is \\boxed{}\n\nA) 3", None),
        ("The answer is \\boxed{}\n(B)", "(B)"),
        (r"The answer is \boxed{} where the box holds 5", None),
        (r"The answer is \boxed{} and 3", None),
        (r"The answer is \boxed{}! 5", None),
        ("The answer is 10 x 5 = 50.", "50"),
        ("The answer is 3(4) = 12.", "12"),
        ("The answer is 3x = 12.", "3x = 12"),
        ("The answer is 10 + 5 = 16.", "16"),
        ("The answer is $17 \\times 23 = 391$.", "391"),
        ("The answer is 17 * 23 = 340 + 51 = 391 apples.", "391 apples"),
        ("The answer is x = 5.", "x = 5"),
        ("The answer is 2 + 3 = a.", "2 + 3 = a"),
        ("The answer is 5 = 2 + 3.", "5 = 2 + 3"),
        # Without a box, the last statement.
        ("the final answer is: 3.14. Checked!", "3.14"),
        ("Answer: 5\nQ.E.D.", "5"),
        ("**Final Answer**: **42**", "42"),
        ("Answer:\n\n42", "42"),
        ("ANSWER: (C).", "(C)"),
        ("The answer is (C), since the others would need more energy than that.", "(C)"),
        ("Answer: B) because all of the other options have the wrong sign", "B"),
        ("The answer is (A)(x+1)", "(A)(x+1)"),
        (r"The answer is $\frac{1}{2}$, since $x > 0$.", r"\frac{1}{2}"),
        ("The answer is $3$, $5$, and $7$.", "3$, $5$, and $7"),
        ("The answer is:\n\\[\nx = 5\n\\]\nDone.", "x = 5"),
        (r"The answer is \(5\).", "5"),
        ("The answer is $18.90. She had $20.", r"\$18.90"),
        ("Perhaps the answer is 4. No, the answer is 5.", "5"),
        ("Final answer: The answer is no solution", "no solution"),
        ("so\n####  $1,000$ \n", "1,000"),
        # The letter of an option without the sign behind it.
        ("Answer: D)", "D"),
        (r"\boxed{\text{D)}}", "D"),
        (r"\boxed{D) 17}", "D) 17"),
        (r"\boxed{f(D)}", "f(D)"),
        # The value of an expression that is stated behind it, unless it may be another one.
        ("The answer is 2 + 3, which is 5.", "5"),
        ("The answer is $2^3$, which simplifies to $8$.", "8"),
        ("The answer is 1,000 + 200 (that is 1,200).", "1,200"),
        ("The answer is 12, which is 50%.", "12"),
        ("The answer is 90 minutes, or 1.5 hours.", "90 minutes"),
        ("The answer is 3/4, or 0.8.", "3/4, or 0.8"),
        ("The answer is 2, 3 + 1, which is 4.", "2, 3 + 1, which is 4"),
        ("The answer is 10/3 + 1, which is 4.33.", "10/3 + 1, which is 4.33"),
        # A number without what is said of it.
        ("The answer is 12, which is 3 more than 9.", "12"),
        ("The answer is 12 apples, which are 3 times 4.", "12 apples"),
        ("The answer is x = 12, which is 3 times 4.", "x = 12"),
        ("The answer is 12:30, which is 3 hours after 9:30.", "12:30"),
        ("The answer is 391, which we get by multiplying 17 by 23.", "391"),
        ("The answer is 391 (= 17 * 23).", "391"),
        ("The answer is 18 (2 * 3.5 + 11).", "18"),
        ("The answer is 18 (36/2 = 18).", "18"),
        ("The answer is 12 (base 7).", "12 (base 7)"),
        ("The answer is 3 (sin 2).", "3 (sin 2)"),
        ("The answer is 12 (wait, 13).", "13"),
        ("The answer is 3/4 the price of 12.", "3/4 the price of 12"),
        ("The answer is 12, which is incorrect.", None),
        ("The answer is in fact, 7", "7"),
        ("The answer is no solution, because 3 > 2", "no solution"),
        ("The answer is minus $\\frac{1}{2}$.", r"-\frac{1}{2}"),
        ("The answer is minus 3, which is 3 less than 0.", "-3"),
        ("The answer is 3 minus 5.", "3 minus 5"),
        ("The answer is 555-1234.", "555-1234"),
        ("Final answer:\n\n1. **Add** 3 and 4.", None),
        # The value before "is the answer", in a sentence that says no more than that.
        ("3. Find the answer: 6 is the answer.", "6"),
        ("The answer is 41. No, 42 is the answer.", "42"),
        ("Since 40 + 2 = 42, **42** is the answer.", "42"),
        ("I doubt that\n42 is the answer.", None),
        ("Student A: 42 is the answer.", None),
        ("A) 42 is the answer.\nB) 43 is the answer.", None),
        ("42 is the answer as long as x > 0.", None),
        ("Let us look. 42 is the answer? Hardly.", None),
        # The answer to the question, and to no part of it.
        ("The answer to 2+3 is 5.", "5"),
        ("The answer to the question of how many are left is 5.", "5"),
        ("The answer to the first question is 5.", None),
        ("The answer to 2 is 5.", None),
        ("If the answer to the question is 5, x is 2.", None),
        # A value that cannot be read takes an earlier one back; a remark does not.
        ("The answer is 3 +", None),
        (r"The answer is \frac{1}{", None),
        ("The answer is [-2, 2.", None),
        ("The answer is [-2, 2).", "[-2, 2)"),
        ("The answer is 5.\nThe answer is 12 in the first case and 13 in the second one.", None),
        ("The answer is 12.\nThe answer is 12 for all of the values that were asked for.", "12"),
        (r"The answer is 7. So the answer is \frac{1}{", None),
        ("The answer is 7.\nThe final answer is unknown.", None),
        ("The answer is 7.\nFinal answer: N/A", None),
        ("The answer is A. The answer is B or C.", None),
        (r"\boxed{4}</think>The answer is 3 +", None),
        ("The answer is 7. The answer is in simplest form.", "7"),
        ("The answer is 7. The answer is an integer from 0 to 999.", "7"),
        # Statements that are denied or supposed.
        ("It is not clear that the answer is 7.", None),
        ("The answer is 5. I doubt that the answer is 7.", "5"),
        ("The answer is 7. But I don't think the answer is 7.", None),
        ("The answer is 5. The answer is not 7.", "5"),
        ("The answer is not 1.5 but 2.", "2"),
        ("The answer is not 7. Hints say so, but no more.", None),
        ("The answer is 7. No, the answer is not 7.", None),
        ("If the answer is 7, x is 3.", None),
        ("The answer is 7. No, the answer is definitely not 7.", None),
        ("The answer is 7, but I doubt it.", None),
        # Several answers.
        ("The answers are x = 1, x = 3 and x = 1,000.", "1, 3, 1000"),
        ("The answers are (1, 2) and (3, 4).", "(1, 2), (3, 4)"),
        ("The answers are x = 1 and y = 3.", "x = 1, y = 3"),
        ("The answers are 3 apart.", None),
        ("None of the answers are 1 and 3.", None),
        ("The answer is 3/4 of 12, or 9.", "9"),
        ("The answer is $7$ times $8$, or $56$.", "56"),
        ("The answer is 7 times 8, or 54.", "7 times 8, or 54"),
        ("The answer is 3 times the first, which is 12.", None),
        ("The answer is 7; 8 and 9 are wrong.", "7"),
        ("The answer is 7; 14/2 is wrong.", None),
        # The last sentence of a reply that states nothing else.
        ("Divide by two. Therefore, $x = 42$.", "42"),
        ("Divide by two.\nSo we get n = 84/2 = 42", "42"),
        ("Factor it. The solutions are x = 1 and x = 3.", "1, 3"),
        ("Factor it. The solutions are x = 1 and x = 3. Their sum is 4.", None),
        ("Hence x(x-3) = 0.", None),
        ("Hence x = 3 \\lor x = -1.", None),
        ("So x = 42, and then", None),
        (r"\boxed{4}</think>So x = 5.", "5"),
        (r"\boxed{4}. So x = 5.", "4"),
        # Nothing else.
        ("", None),
        ("So it comes to 42.", None),
        ("#### Step 3: add", None),
        ("#### Conclusion", None),
        ("The answer is", None),
        ("Answer: **", None),
        ("answers vary: 3", None),
        ("The answer is supposed to be an integer.", None),
        ("unanswered: 3", None),
        # The reply before the thoughts.
        (r"\boxed{4}</think>So \boxed{5}", "5"),
        (r"\boxed{4}</think>The answer is 5.", "5"),
        (r"\boxed{4}</think>That is it.", None),
        (r"\boxed{3}</think>\boxed{4}</think>So \boxed", None),
        (r"is it \boxed{4}?</think>5", "5"),
        # A reply that is nothing but an answer.
        (" 5.\n", "5"),
        ("**1,024**", "1,024"),
        ("50%", "50%"),
        (r"$\frac{1}{2}$", r"\frac{1}{2}"),
        (r"\(x^2\)", "x^2"),
        ("(B)", "(B)"),
        ("I", "I"),
        ("b", None),
        ("5 apples", None),
        ("1. First", None),
        ("$5 and $6", None),
        ("$$", None),
    ],
)
def test_the_stated_answer_is_found(text: str, expected: str | None) -> None:
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    "words",
    [
        *("I doubt that", "I doubt", "It is not clear that", "I don't think", "I'm not sure if"),
        *("It is unlikely that", "There is no way", "It can't be that", "It is false that"),
        *("Nobody knows whether", "I am far from certain that", "I doubt, however, that"),
        *("There is no reason to believe that", "This does not mean that", "Suppose", "Unless"),
        *("One might think that", "You could be tempted to say", "It is wrong to say"),
        *("It does not follow that", "Let us check if", "A common mistake is to think that"),
    ],
)
def test_a_statement_that_its_sentence_denies_is_none(words: str) -> None:
    assert extract_answer(f"{words} the answer is 7.") is None
    assert extract_answer(f"So 4 it is. {words} our final answer is $7$.") is None


@pytest.mark.parametrize(
    "words",
    [
        *("I think", "Perhaps", "We see that", "There is no doubt that", "I have no doubt that"),
        *("Without a doubt", "Since 4 does not divide 7", "Since 6 is no root we conclude that"),
        *("If x = 2,", "It is not hard to see that", "Not only is it simple, but", "No,"),
        *(
            "6 is not prime so that",
            "It cannot be denied that",
            "I was wrong;",
            "Don't forget that",
        ),
        *("I would say", "As you can see", "It is not 5 and"),
    ],
)
def test_a_statement_in_a_sentence_that_denies_something_else_counts(words: str) -> None:
    assert extract_answer(f"{words} the answer is 7.") == "7"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is 3 + 1", None),
        ("The answer is 3", None),
        ("So 42 is the answer", None),
        ("So 42 is the answer.\nLet", "42"),
        ("Divide by two. So x = 42.\n", None),
        ("The answer is 3.", None),  # 3.14
        ("The answer is 3. Let me", "3"),
        ("The answer is 3 + 1\nLet me", "3 + 1"),
        ("The answer is 3.\n\nWait: the answer is 4", None),
        ("The answer is 31.\nSo the answer is 3", "31"),
        ("The answer is 3.\nSo the answer is 31", None),
        ("The answer is 3.\nSo the answer is 3 + 1", None),
        ("The answer is 3.\nSo the answer is corr", "3"),
        ("The answer is 3.\nSo 4 is the answer because 40", "3"),
        (r"The answer is 3. So the answer is \boxed{", "3"),
        (r"(B) it is, so \boxed{B}. Thus \boxed{\text{(B", "B"),
        ("The answer is 3.\n\nSo the answer is", "3"),
        (r"\boxed{3}. Wait: \boxed{4", None),
        (r"\boxed{12}", "12"),
        (r"The answer is 3. So \boxed{12}", "12"),
        ("<answer>12</answer>", "12"),
        ("12", None),
        ("12.\nSo", None),
        ("B\nsince", "B"),
        ("B. The", None),
        # The number of an item is no answer, nor is a list that goes on.
        ("1. First, we need to find", None),
        ("1.\nFirst, we need to find", None),
        ("1. The answer is 4,", None),
        ("1. The answer is 4.\n2. So", "4"),
        ("</think>\n\n1. The", None),
        ("Answer:\n1. ", None),
        ("Answer:\n1. x = 3\n2. x", None),
        ("Answer:\n(1) 3\n(2", None),
        ("Answer:\n* 3\n*", None),
        ("Answer:\nA) 3\nB", None),
        ("Answer: 2, 3,\n", None),
        ("Answer: 2 or\n3", None),
        ("#### 2. Add\n", None),
        (r"$\boxed{3}$, and $x = \boxed{5", None),
        (r"\boxed{3}, \boxed{5},", None),
        (r"\boxed{3} or \bo", None),
        (r"\boxed{3}, which", "3"),
        ("The answer is 5</think>So", "5"),
        ("The answer is 5</think>The answer is", "5"),
    ],
)
def test_a_text_that_was_cut_off_answers_with_its_ended_sentences(
    text: str, expected: str | None
) -> None:
    assert extract_answer(text, cut_off=True) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("B) the", None),
        ("B) the largest\nSince", "B"),
        ("Answer: B", None),
        ("A) 4\n", None),
        ("A) 4\n(B", None),
    ],
)
def test_a_letter_in_a_line_that_was_cut_off_is_no_choice(reply: str, expected: str | None) -> None:
    answer = extract_answer(reply, AnswerKind.CHOICE, cut_off=True)
    assert (answer and as_choice(answer)) == expected


@pytest.mark.parametrize(
    "piece",
    [
        r"\boxed{",
        r"\boxed 5",
        "\\boxed" + " " * 90,
        "\\",
        "{",
        "}",
        "####\n",
        "answer: ",
        "answer: $",
        "answer: \\[",
        "answer: ab cd ef gh ij ",
        "answer: $a$, $ab cd ef gh ij$, ",
        "answer: . ",
        "answer: 2 + 3, which is 5, that is ",
        "answer: 2" + " " * 400 + "x",
        "is the answer" + " " * 300,
        "Since 1, 42 is the answer. ",
        "answer to 1+1*",
        "answer to how many ",
        "the answers are 1, 2, ",
        "answer: 7; 8 is wrong, ",
        "answer: 3 times 4, or ",
        "\nSo x = 4, ",
        "answer:\nA) x\n",
        "\n",
        "so ",
        "1. ",
        "*",
        "</think>",
        "actually ",
        "actually 1. ",
        " _a",
        "`a ",
        "```\n7\n",
        "answer: 1 - a b ",
        "$1 and ",
        r"\boxed{7}. No, 8. ",
        r"\boxed{7} is not ",
        r"\boxed{7}" + " " * 5000,
        "\\boxed{7}\n" + "The answer is 7. " * 50,
        "no, wait, ",
        "No, 8. ",
        "I made an error. ",
        r"\boxed{7} is wrong, it is 8. ",
        "The answer isn't 7, it's 9. It should be 5. ",
        "I forgot it, so it should be \\[",
        "~~a",
        "```py\n ```\n",
        "```python\n",
        "<b></",
        "{\n",
        '\n{"answer": ',
        "Choose (",
        ", so C",
        "result is ",
        "0x1",
        "The answer is B. Wait, B is ",
        "I first thought the answer is 1, but it is ",
        "12 should be ",
        "Sorry, (1, 2",
        "Please read \\frac{{a}",
        "17 times 23 is ",
        "a + ",
        r"\boxed{7} it looks ",
        ", so I choose ",
        "</s> :) ",
    ],
)
def test_hundreds_of_thousands_of_characters_take_no_time(piece: str) -> None:
    began = time.process_time()
    extract_answer(piece * (300_000 // len(piece)))
    assert time.process_time() - began < 2.0


@pytest.mark.parametrize("sign", "*_([")
def test_an_option_of_hundreds_of_thousands_of_signs_takes_no_time(sign: str) -> None:
    began = time.process_time()
    extract_answer("Final answer:\nA) " + sign * 300_000)
    assert time.process_time() - began < 2.0


GARBAGE = r"""
import resource, time
resource.setrlimit(resource.RLIMIT_AS, (400 * 1024**2,) * 2)
from lim_sglang.programs.grading.answers import extract_answer
from lim_sglang.programs.grading.kinds import as_choice, as_integer
from lim_sglang.programs.grading.equivalence import EquivalenceChecker
pieces = ["\\boxed{", "{", "\\boxed{6}}{", "answer: ", "</think>", "a $1$, ", "\\text{ ", "0"]
with EquivalenceChecker() as checker:
    for piece in pieces:
        text = piece * (3_000_000 // len(piece))
        for found in (extract_answer(text) or "", text):
            assert not checker.equivalent("5", found), found[:20]
            assert as_integer(found) != 5
            assert as_choice(found) is None
extract_answer("\\boxed{1=.1" + "." * 300_000 + "x}")
print(time.process_time())
"""


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("To find the prime number, we examine each of them.", None),
        ("A train leaves at noon.", None),
        ("A) 21", "A) 21"),
        ("C", "C"),
        ("A. 4\nB. 5\nC. 9", None),
        ("(a) 4\n\nEven.\n\n(b) 5", None),
        ("A) 4; B) 5; C) 9", None),
        ("A. 4, B. 5, C. 9", None),
        ("Option A) is clearly wrong", None),
        ("A) doesn't work", None),
        ("B. Vitamin C. It heals.", "B. Vitamin C. It heals."),
        ("B) is not continuous", None),
        ("A) 4 because B) is odd", "A) 4 because B) is odd"),
        ("A\n\nB) 5 is too large.", "A"),
    ],
)
def test_a_first_line_is_a_choice_only_if_it_names_a_letter(reply: str, answer: str | None) -> None:
    assert extract_answer(reply, AnswerKind.CHOICE) == answer


@pytest.mark.parametrize("box", ["A, B", "A and B", r"A \text{ or } B", "(A), (B)", "A/B", "A; B"])
def test_a_box_of_several_letters_is_no_choice_of_the_one_that_was_called_correct(box: str) -> None:
    answer = extract_answer(f"Option A is correct. So \\boxed{{{box}}}.", AnswerKind.CHOICE)
    assert answer == box
    assert as_choice(answer) is None


def test_megabytes_of_garbage_take_seconds_and_little_memory() -> None:
    done = subprocess.run([sys.executable, "-c", GARBAGE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    assert float(done.stdout) < 20


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
        ("7th", 7),
        (r"15^{\text{th}}", 15),
        ("the 22nd floor", 22),
        (r"\frac{1}{7}\text{th}", None),
        ("7th root", None),
        (r"\text{a } 15\% \text{ decrease}", 15),
        (r"(f \circ g)(2) = 7", 7),
        ("two", 2),
        ("", None),
        ("=", None),
        ("٣", None),
        ("0" * (MAX_PARSED_CHARS - 1) + "5", 5),
        ("0" * MAX_PARSED_CHARS + "5", None),
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
        ("A; B", None),
        (r"A \text{ and } B", None),
        ("A, because B is wrong", "A"),
        ("A; B is wrong", "A"),
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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is correct.", None),
        ("The answer is within the specified format.", None),
        ("### Final Answer\n\nas shown above", None),
        ("<answer>your answer</answer>", None),
        ("The answer is yes.", "yes"),
        ("The answer is June 20.", "June 20"),
        ("The answer is no solution.", "no solution"),
        ("The answer is x.", "x"),
        (r"\boxed{\text{isosceles}}", r"\text{isosceles}"),
    ],
)
def test_words_are_an_answer_in_a_box_only(text: str, expected: str | None) -> None:
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{3}, \boxed{5} and \boxed{7}", "3, 5, 7"),
        (r"$x = \boxed{2}$ or $x = \boxed{-2}$", "2, -2"),
        (r"$x = \boxed{2}$, $y = \boxed{-2}$", "x=2, y=-2"),
        (r"\boxed{3}, \boxed{3}", "3"),
        (r"\boxed{3}. No: \boxed{4}", "4"),
        (r"\boxed{3}, but then \boxed{4}", "4"),
    ],
)
def test_boxes_that_are_one_list_are_one_answer(text: str, expected: str) -> None:
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (AnswerKind.CHOICE, "D"),
        (AnswerKind.EXPRESSION, "E = mc^2"),
        (AnswerKind.INTEGER, "E = mc^2"),
        (None, "D"),
    ],
)
def test_a_letter_that_is_stated_goes_before_a_formula_in_a_box_unless_values_are_asked_for(
    kind: AnswerKind | None, expected: str
) -> None:
    assert extract_answer("By $\\boxed{E = mc^2}$.\n\n**Answer: D**", kind) == expected


def test_without_a_kind_a_number_in_a_box_goes_before_a_letter() -> None:
    reply = "So $\\boxed{42}$.\n\nAnswer: D"
    assert extract_answer(reply) == "42"
    assert extract_answer(reply, AnswerKind.CHOICE) == "D"


@pytest.mark.parametrize(
    ("solution", "expected"),
    [
        ("He has 3 + 4 = <<3+4=7>>7.\n#### 7", "7"),
        ("#### 1\nAgain:\n#### 1,234 ", "1,234"),
        ("#### $5", "5"),
        ("####", None),
        ("7", None),
        ("a #### 7", None),
    ],
)
def test_the_answer_of_a_gsm8k_solution_follows_its_hashes(
    solution: str, expected: str | None
) -> None:
    assert answer_line(solution) == expected
