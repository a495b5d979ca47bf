r"""Answers in one notation: the LaTeX that math-verify reads, without typography.

Models write one value in many ways: `2√15`, `2\sqrt{15}`, `\boldsymbol{2\,\sqrt{15}}~\text{cm}`.
"""

import re
import unicodedata
from decimal import Decimal

from lim_sglang.programs.grading.units import is_unit

MAX_READ = 500
"""Characters of the longest answer whose parts are read: conditions, nouns, equations, vectors,
decimals. A longer one is compared as a formula, as it stands.
"""
_CHARACTERS = str.maketrans(
    {"∞": r"\infty ", "×": r"\times ", "÷": "/", "⁄": "/", "∕": "/", "±": r"\pm ", "∓": r"\mp "}
    | {"≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx "}
    | {
        "∪": r"\cup ",
        "∩": r"\cap ",
        "∈": r"\in ",
        "∅": r"\emptyset ",
        "∖": r"\setminus ",
        "Ø": r"\emptyset ",
        "˚": "°",
        "∨": r"\lor ",
        "∧": r"\land ",
    }
    | {"⟨": "(", "⟩": ")", "〈": "(", "〉": ")", "∣": "|", "∶": ":", "、": ",", "≡": "="}
    | dict.fromkeys("·⋅∙", r"\cdot ")
    | dict.fromkeys("‘’“”′", "'")
    | dict.fromkeys("−‐‑‒﹣－", "-")
    | dict.fromkeys("\u200b\u200c\u200d\u2060\u2061\u2062\u2063\ufeff", "")
)
"""LaTeX for signs; dashes that are always a minus, and invisible characters."""
TEXT_COMMAND = re.compile(r"\\(?:text(?:rm|bf|it)?|mathrm|mbox)\s*\{([^{}]*)\}")
"""Words within a formula, as group."""
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱ]+")
_LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋]+")
_FRACTION_SIGN = re.compile("[¼½¾⅐-⅞]")
_COMPATIBLE = re.compile("[\uff00-\uffef\U0001d400-\U0001d7ff\u2000-\u200a\u202f\u3000ℝℤℕℚℂ]")
"""Full-width, bold and slanted characters, and wide and narrow spaces."""
_GREEK = re.compile("[α-ρσ-ωΓΔΘΛΞΠΣΦΨΩ]")
_BARRED = re.compile("(?:\\d[\u0304\u0305])+")
_DOTTED = re.compile("(\\d)\u0307")
_MINUS = re.compile(
    r"(?:(?<![\w)}\]])|(?<=\s)|(?<=[a-zA-Z)}\]]))–(?=\s*[\w\\(√{.])|(?<![\w)}\]])(?<!\s)—(?=\s*[\d\\(√{.])|(?<=\d)–(?=[a-zA-Z\\(])|^—(?=\s*[\w\\(√])"
)
"""An en or em dash for a minus; between two digits it is a range."""
_ROOT = re.compile(
    r"√|∛|∜|\\?\bsqrt(?=\s*\()|\bcbrt(?=\s*\()|\\sqrt\s*\[(?P<index>[^\[\]]+)\](?!\s*\{)"
)
_ROOT_INDEX = {"∛": "[3]", "∜": "[4]", "cbrt": "[3]"}
_RADICAND = re.compile(
    r"\s*(\d+(?:\.\d+)?|\\[a-zA-Z]+(?:\[[^\[\]]*\])?(?:\s*\{[^{}]*\}){0,2}|[a-zA-Z]|\|[^|]*\|)"
)

_LENGTH = r"-?[\d.]+\s*(?:pt|em|ex|mm|cm|in|mu|bp|pc|sp)"
_INVISIBLE = re.compile(
    r"\\(?:displaystyle|textstyle|scriptstyle|scriptscriptstyle|bfseries|itshape|rmfamily|boldmath"
    r"|normalfont|normalsize|footnotesize|scriptsize|small|tiny|large|Large|LARGE|huge|Huge|bf|rm|it|sf|tt"
    r"|limits|nolimits|strut|mathstrut|allowbreak|nobreak|relax|protect|noindent|centering|null"
    r"|[bB]igg?[lrm]?|m?(?:left|right)(?:\s*\.(?!\d))?|middle|checkmark|blacksquare|square|Box|qed|qedsymbol|mathop|mathord|mathrel|mathbin|mathopen|mathclose|ensuremath)(?![a-zA-Z])"
)
_STYLED = re.compile(
    r"\\(?:mathbf|mathbfit|mathcal|mathscr|bbox|mathsf|mathtt|mathit|mathnormal|mathfrak|boldsymbol|bm|pmb|bold|symbf"
    r"|underline|uline|underbar|underbrace|boxed|fbox|framebox|smash|emph|uuline|mathstrut"
    r"|(?:textcolor|colorbox|color)\s*(?:\[[^\[\]]*\])?\s*\{[^{}]*\})(?![a-zA-Z])\s*"
)
_GONE = re.compile(
    r"\\(?:[hv]?phantom|hspace\*?|vspace\*?|mspace|tag\*?|label|hypertarget)\s*(?:\[[^\[\]]*\])?\s*\{[^{}]*\}"
    rf"|\\(?:kern|mkern|hskip|mskip|raise|lower)\s*{_LENGTH}"
    r"|\\bbox\s*\[[^\[\]]*\]|\\rule\s*\{[^{}]*\}\s*\{[^{}]*\}"
    r"|\\(?:raisebox|scalebox)\s*\{[^{}]*\}"
    r"|\\(?:begin|end)\s*\{(?:aligned|align|gather|gathered|equation|split|center)\*?\}|\\hline(?![a-zA-Z])"
)
_SPACE = re.compile(
    r"\\[,;:> ]|(?<!\\)~|\\(?:quad|qquad|enspace|enskip|thinspace|medspace|thickspace|space"
    r"|nobreakspace|hfill|hfil|noindent)(?![a-zA-Z])"
)
_NO_SPACE = re.compile(r"\\!|\\(?:negthinspace|negmedspace|negthickspace)(?![a-zA-Z])")
_GROUP_SEPARATOR = re.compile(
    r"(?<=\d)(?:\\[,;: ]|\\thinspace\s*|\\!\s*\\,|\\text\{,\}|,?\\!\s*|[~ ]|\{\s*\}|\{\\,\}|\{,\})"
    r"(?=\d{3}(?![\d/]))"
)
_INDIAN = re.compile(r"(?<=\d)\{,\}(?=\d\d(?:\{,\}\d\d)*\{,\}\d{3}(?!\d))")
_DECIMAL_COMMA = re.compile(r"(?<![\d.,}])(\d+)\{,\}(?=(?:\d{1,2}|\d{4,})(?!\d|\{,\}))", re.ASCII)
"""A comma that TeX sets without a space behind, before other than three digits: `3{,}5`."""
_ROW_SPACING = re.compile(rf"\\\\(?:\s*\[\s*{_LENGTH}\s*\])?")
ROW_END = "\ue000"
"""The place of the end of a matrix's row, which begins like a command and like a space."""
_DOUBLED = re.compile(r"\\\\(?=[a-zA-Z])")
"""A command in a text that was escaped twice."""
_NO_LEFT_SIDE = re.compile(
    r"(?:\s|=|\\(?:approx|sim|therefore|implies|Rightarrow|Longrightarrow)(?![a-zA-Z])"
    r"|(?:\\text\{)?(?:about|approximately|roughly|around|exactly|nearly)\b\}?"
    r"|\\text\{[^{}]*\b(?:answer|value|result|total)\b[^{}]*\}(?=.))+",
    re.IGNORECASE,
)
"""Words and signs before a value that say no more than that it is the value."""
_NUMBERS = re.compile(r"[-+]?\d[\d./]*(?:\s*(?:,|,?\s*\b(?:and|or)\b)\s*[-+]?\d[\d./]*)*")
_LEADING_NUMBER = re.compile(
    r"[-+]?[$€£]?\d[\d.,/]*(?:\s+|(?=[a-zA-Z]))(?!(?:st|nd|rd|th)\b)(?=[a-zA-Z])"
)
_TEXT = re.compile(
    r"\\(?:text(?:normal|up|rm|bf|it|sf|tt|sc|md|sl)?|mbox|hbox|mathrm|emph)"
    r"\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
    r"|\{\s*\\(?:rm|bf|it|sf|tt)\s+([^{}]*)\}|\\operatorname\*?\s*\{([^{}]*)\}"
)
_INNER_TEXT = re.compile(r"\\(?:text|mathrm)[a-z]*\s*\{([^{}]*)\}")
FUNCTION = re.compile(
    r"(?:arc)?(?:sin|cos|tan)h?|cot|sec|csc|ln|log|exp|sqrt|max|min|gcd|lcm|mod|det|pi|inf|deg"
)
"""The name of a function or a constant, which is no word."""
_SYNONYMS: list[tuple[re.Pattern[str], str]] = [
    (re.compile(rf"\\(?:{names})(?![a-zA-Z])"), replacement)
    for names, replacement in (
        ("dfrac|tfrac|cfrac|nicefrac|sfrac|flatfrac", r"\\frac"),
        ("surd", "√"),
        ("yen", "¥"),
        ("lg", r"\\log_{10}"),
        ("dbinom|tbinom", r"\\binom"),
        ("lbrace", r"\\{"),
        ("rbrace", r"\\}"),
        ("lbrack", "["),
        ("rbrack", "]"),
        ("lparen|langle", "("),
        ("rparen|rangle", ")"),
        ("[lr]?vert", "|"),
        ("leq|leqslant|leqq", r"\\le"),
        ("geq|geqslant|geqq", r"\\ge"),
        ("lt", "<"),
        ("gt", ">"),
        ("neq|not\\s*=", r"\\ne"),
        ("equiv", "="),
        ("vee", r"\\lor"),
        ("wedge", r"\\land"),
        ("varnothing|O", r"\\emptyset"),
        ("centerdot|bullet", r"\\cdot"),
        ("div", "/"),
        ("colon", ":"),
        ("ldots|dots|cdots|dotsc|dotsb", "..."),
        ("RR|R|reals|Reals", r"\\mathbb{R}"),
        ("mathbb\\s*([RZNQC])", r"\\mathbb{\1}"),
        ("textdollar|mathdollar", r"\\$"),
        ("euro|texteuro", "€"),
        ("pounds|textsterling", "£"),
        ("cent|textcent", "¢"),
        ("textpercent", r"\\%"),
        ("textdegree|degree", r"^\\circ "),
    )
]
_DEGREES = re.compile(
    r"(?:\{\s*\}\s*)?\^\s*(?:\{\s*(?:\\circ|\\text\{o\}|o)\s*\}|\\circ(?![a-zA-Z])|o(?![a-zA-Z]))|º"
)
_UNIT_POWER = r"\\text\{[^{}]*\}(?:\s*\^\s*(?:-?\d|\{\s*-?\d\s*\}))?"
_UNIT_PRODUCT = rf"{_UNIT_POWER}(?:\s*(?:\\cdot\s*)?{_UNIT_POWER}){{0,4}}"
_UNIT_FRACTION = re.compile(
    rf"\\frac\s*\{{\s*({_UNIT_PRODUCT})\s*\}}\s*\{{\s*({_UNIT_PRODUCT})\s*\}}"
    rf"|({_UNIT_PRODUCT})\s*/\s*\(\s*({_UNIT_PRODUCT})\s*\)"
)
_UNITS = re.compile(r"(?<=[\d}\s])\\frac\s*\{\s*([a-zA-Z]+)\s*\}\s*\{\s*([a-zA-Z]+)\s*\}\s*$")
_BRACED_SIGN = re.compile(r"(?<![\^_])\{\s*([-+:;=<>/*])\s*\}")
"""A sign in braces, which keep TeX from setting space around the sign: `12{:}30`."""
_BRACED_NAME = re.compile(r"(?<![\w^{}])\{\s*([a-zA-Z])\s*\}(?=\s*=)")
"""A name in braces, as a command for bold letters leaves it."""
_PERCENT = re.compile(
    r"(?:\\?%|\\text\s*\{\s*\\?%\s*\}|\\text\s*\{\s*per\s?cent(?:age)?s?\s*\}|\bper\s?cent\b)"
)


_SIUNITX = [
    (re.compile(r"\\(?:SI|qty)\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"\1\\text{\2}"),
    (re.compile(r"\\(?:si|unit)\s*(?=\{)"), r"\\text"),
    (re.compile(r"\\num\s*(?=\{)"), ""),
    (re.compile(r"\\ang\s*\{([^{}]*)\}"), r"\1°"),
]
_FUNCTION_NAMES = re.compile(
    r"(?<![\\a-zA-Z{])"
    r"(sin|cos|tan|cot|sec(?!\s*(?:/|$))|csc|ln|log|arcsin|arccos|arctan|pi)(?![a-zA-Z])"
)
"""Functions without a backslash; `sec` without an argument is a unit of time."""
_PRIMED = re.compile(r"(?:(?<![a-z])[a-z]|[A-Z)}])\Z")
"""The end of a name or a bracket, to which a quotation mark belongs."""
_FACTOR = re.compile(
    r"(?<![\w.,)}\]/^\\])(\d+)/(\d+)"
    r"(?=\s*\\(?:pi|sqrt|sin|cos|tan|ln|log|theta|alpha|left\()|\s*\(| [a-zA-Z])"
)
"""A fraction of numbers before a factor that is no part of the denominator: `4/3 \\pi r^3`."""
_POWER = re.compile(r"\^\s*(\\frac\s*\{[^{}]*\}\s*\{[^{}]*\}|\\sqrt(?:\[[^\[\]]*\])?\{[^{}]*\})")
_SLANTED = re.compile(r"\^\{?(\d+)\}?\s*/\s*_\{?(\d+)\}?")


_PYTHON_POWER = re.compile(r"(?<=[\w)}\]])( ?)\*\*\1(?=[-+]?[\d.a-zA-Z]|[({])")
"""The sign of a power as Python writes it; the stars of bold text have a space on one side."""
_EXPONENT = re.compile(r"[-+]?(?:\d+(?:\.\d+)?|\.\d+|[a-zA-Z](?![a-zA-Z]))(?:\^\{[^{}]*\})*")


_GOES_ON = re.compile(
    r"([\d}]\s*+=\s*+-?\d*+\.\d++|\.\d{0,5}?(?:(\d)\2{2,}|(\d\d)\3{2,}))\s?(?:\.{3}(?!\.\.|\d)|…)"
    r"(?P<ends>(?=\s+[A-Z]|\s*?(?:\n|\Z)))?"
)
"""A decimal behind a value, or one that repeats, with dots, since it goes on; also at the end of a
sentence."""
_PREFIXED = re.compile(r"(?<![\w.\\])0[xbo][\da-f][\w.]*", re.IGNORECASE)
"""A number as programs write it: `0xFF`, `0b11`."""


def with_ellipses(text: str) -> str:
    r"""Return a text with `\ldots` for dots behind decimals that go on, which end no sentence."""
    if "..." not in text and "…" not in text:
        return text
    return _GOES_ON.sub(
        lambda found: rf"{found[1]}\ldots{'' if found['ends'] is None else '.'}", text
    )


def tidy(answer: str) -> str:
    """Strip the white space, Markdown, dollar signs and punctuation around an answer."""
    answer = with_ellipses(answer)
    for opening, closing in ((r"\(", r"\)"), (r"\[", r"\]"), ("", "")):
        answer = answer.lstrip(" \n\r\t$*").rstrip(" \n\r\t$*.,;:?\\。")
        if answer.startswith(opening) and answer.endswith(closing):
            answer = answer.removeprefix(opening).removesuffix(closing)
    return answer


def is_unbalanced(answer: str) -> bool:
    """Return True if a brace or a bracket of an answer is missing. An interval may have a bracket
    of any kind at either end, as in `[0, 1)` and `[0, 1[`.
    """
    bare = re.sub(r"\\\\|\\[{}]", "", answer)
    num_brackets = sum(bare.count(bracket) for bracket in "()[]")
    return bare.count("{") != bare.count("}") or num_brackets % 2 == 1


def plain(answer: str) -> str:
    r"""Return an answer as one line of LaTeX without styles, sizes, colours and spaces of its own.

    Words stay in `\text{}` if they were in any command for text.
    """
    text = _GONE.sub("", _as_commands(_PREFIXED.sub(_in_decimal, tidy(answer))))
    for command, replacement in _SIUNITX:
        text = command.sub(replacement, text)
    if r"\begin" not in answer:  # else an end of a row
        text = _DOUBLED.sub(r"\\", text)
    text = re.sub(r"\\cr(?![a-zA-Z])", ROW_END, _ROW_SPACING.sub(ROW_END, text))
    text = _DECIMAL_COMMA.sub(r"\1.", _GROUP_SEPARATOR.sub("", _INDIAN.sub("", text)))
    text = _SPACE.sub(" ", _NO_SPACE.sub("", text))
    text = _TEXT.sub(_as_text, text)
    text = _BRACED_SIGN.sub(r"\1", _STYLED.sub("", _INVISIBLE.sub("", text)))
    text = _BRACED_NAME.sub(r"\1", text)
    for synonyms, replacement in _SYNONYMS:
        text = synonyms.sub(replacement, text)
    text = _ODD_ROOT.sub(r"(-\\sqrt[\1]{\2})", _with_braces(_PERCENT.sub(r"\\%", text)))
    text = _DEGREES.sub("°", text)
    text = _UNITS.sub(_units, text)
    text = _UNIT_FRACTION.sub(_unit_fraction, text.replace("smallmatrix", "matrix"))
    text = _CHOOSE.sub(r"\\binom{\1}{\2}", _roots(_powers(text)))
    text = _POWER.sub(r"^{\1}", _SLANTED.sub(r"\\frac{\1}{\2}", text))
    text = _FACTOR.sub(r"\\frac{\1}{\2}", text)
    text = _FUNCTION_NAMES.sub(r"\\\1 ", text)
    text = _NO_LEFT_SIDE.sub("", text, count=1) if _NO_LEFT_SIDE.match(text) else text
    text = re.sub(r"(?<=[a-z]{2})!+$", "", _without_quotes(text).strip())
    text = _without_outer_braces(" ".join(tidy(text).split()))
    return text.replace(ROW_END, r"\\")


_TAKES_ARGUMENTS = re.compile(r"\\(?:(frac|binom)|sqrt(?:\s*\[[^\[\]]*\])?)(?![a-zA-Z])\s*")
_ARGUMENT = re.compile(r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}|\\[a-zA-Z]+|[a-zA-Z0-9]")
_ODD_ROOT = re.compile(
    r"\\sqrt\s*\[\s*([3579])\s*\]\s*\{\s*-\s*(\d+(?:\.\d+)?|\\frac\{\d+\}\{\d+\})\s*\}"
)
"""An odd root of a negative number, which is real here; math-verify takes the principal root."""
MAX_COMMANDS = 100
"""Most fractions and roots whose arguments are put into braces."""


def _with_braces(text: str) -> str:
    r"""Put the arguments of fractions, binomials and roots into braces, as in `\frac\pi2`."""
    commands = list(_TAKES_ARGUMENTS.finditer(text))
    if len(commands) > MAX_COMMANDS:
        return text
    for command in reversed(commands):  # inner ones, which follow, have braces then
        place, arguments = command.end(), []
        for _ in range(2 if command[1] else 1):
            if (argument := _argument(text, place)) is None:
                break
            arguments.append(argument.strip())
            place += len(argument)
        else:
            braced = (each if each[0] == "{" else f"{{{each}}}" for each in arguments)
            text = text[: command.end()].rstrip() + "".join(braced) + text[place:]
    return text


def _argument(text: str, place: int) -> str | None:
    """Return the argument at a place, spaces before it included; None if there is none."""
    begin = place + len(text[place:]) - len(text[place:].lstrip())
    if inner := _TAKES_ARGUMENTS.match(text, begin):
        end = inner.end()
        for _ in range(2 if inner[1] else 1):
            group = _ARGUMENT.match(text, end)
            if group is None:
                return None
            end = group.end()
        return text[place:end]
    found = _ARGUMENT.match(text, begin)
    return text[place : found.end()] if found else None


def _as_commands(text: str) -> str:
    """Replace characters outside of ASCII by commands."""
    if text.isascii():
        return text
    text = _FRACTION_SIGN.sub(_fraction, text)
    text = _RAISED.sub(_power, text)
    text = _LOWERED.sub(lambda lowered: f"_{{{unicodedata.normalize('NFKC', lowered[0])}}}", text)
    text = text.replace("ℝ", r"\mathbb{R}").replace("ℤ", r"\mathbb{Z}")
    text = _COMPATIBLE.sub(lambda found: unicodedata.normalize("NFKC", found[0]), text)
    text = _BARRED.sub(lambda found: rf"\overline{{{found[0][::2]}}}", text)
    text = _DOTTED.sub(r"\\dot{\1}", text)
    text = _MINUS.sub("-", text.translate(_CHARACTERS))
    return _GREEK.sub(lambda letter: _greek(letter[0]), text)


def _in_decimal(number: re.Match[str]) -> str:
    """Return a number of a program in decimal digits; words for one that has a wrong digit."""
    try:
        return str(int(number[0].rstrip("."), 0))
    except ValueError:
        return rf"\text{{number {number[0]}}}"


def _fraction(sign: re.Match[str]) -> str:
    numerator, denominator = unicodedata.normalize("NFKC", sign[0]).split("⁄")
    return rf"\frac{{{numerator}}}{{{denominator}}}"


def _units(fraction: re.Match[str]) -> str:
    r"""Return `\frac{km}{h}` behind a number as text, if its names are units and no variables."""
    names = fraction.groups()
    are_units = all(map(is_unit, names)) and max(map(len, names)) > 1
    return rf"\text{{{'/'.join(names)}}}" if are_units else fraction[0]


def _unit_fraction(fraction: re.Match[str]) -> str:
    """Return a fraction of products of units as one text: `J/(kg K)`."""
    over, under = (
        " ".join(
            re.sub(r"\\text(?=\{)|\\cdot(?![a-z])|[{}]", " ", part).replace(" ^ ", "^").split()
        )
        for part in fraction.groups()
        if part
    )
    return rf"\text{{{over}/({under})}}" if " " in under else rf"\text{{{over}/{under}}}"


def _power(raised: re.Match[str]) -> str:
    power = unicodedata.normalize("NFKC", raised[0])
    next_is_digit = raised.string[raised.end() : raised.end() + 1].isdigit()
    return f"^{power}" if len(power) == 1 and not next_is_digit else f"^{{{power}}}"


def _greek(letter: str) -> str:
    *_, size, _, name = unicodedata.name(letter).split()
    return f"\\{name.lower() if size == 'SMALL' else name.capitalize()} "


def _as_text(command: re.Match[str]) -> str:
    operator = command[3]
    if operator is not None and FUNCTION.fullmatch(operator.strip()):
        return f"\\{operator.strip()} "
    if operator is not None and not is_unit(operator.strip()):
        return command[0]
    content = next(group for group in command.groups() if group is not None).strip()
    content = re.sub(r"\\cdot(?![a-zA-Z])", " ", _INNER_TEXT.sub(r"\1", content))
    if "$" in content.replace(r"\$", ""):
        # Formulas within text.
        parts = re.split(r"(?<!\\)\$", content)
        return "".join(part if n % 2 else _in_text(part) for n, part in enumerate(parts))
    return f" {content} " if "\\" in content or _NUMBERS.fullmatch(content) else _in_text(content)


def _in_text(words: str) -> str:
    r"""Return words in `\text{}`, with a number that leads them before the command."""
    if not re.search(r"[^\W\d_]", words):
        return f" {words} "
    number, rest = _LEADING_NUMBER.match(words), re.sub(r"[{}$]", "", words).strip()
    if number is None:
        return rf"\text{{{rest}}}"
    return rf"{number[0].strip()}\text{{{words[number.end() :].strip()}}}"


def _roots(text: str) -> str:
    r"""Write root signs and bare `sqrt(…)` as `\sqrt{…}`, the last first, for roots in roots."""
    for sign in reversed(list(_ROOT.finditer(text))):
        index = f"[{sign['index']}]" if sign["index"] else _ROOT_INDEX.get(sign[0], "")
        rest = text[sign.end() :]
        inner, after = _group(rest.lstrip())
        if inner is None:
            radicand = _RADICAND.match(rest)
            if radicand is None:
                continue
            inner, after = radicand[1], rest[radicand.end() :]
        text = rf"{text[: sign.start()]}\sqrt{index}{{{inner}}}{after}"
    return text


def _powers(text: str) -> str:
    """Write Python's powers `x**2` with `^`, the last first, for powers of powers."""
    for sign in reversed(list(_PYTHON_POWER.finditer(text))):
        rest = text[sign.end() :]
        inner, after = _group(rest)
        if inner is None and (exponent := _EXPONENT.match(rest)):
            inner, after = exponent[0], rest[exponent.end() :]
        if inner is not None:
            text = f"{text[: sign.start()]}^{{{inner}}}{after}"
    return text


def _group(text: str) -> tuple[str | None, str]:
    """Return the content of the bracket that begins a text, and what follows the bracket."""
    if not text or text[0] not in "({":
        return None, text
    depth = 0
    for end, character in enumerate(text):
        depth += (character in "({") - (character in ")}")
        if depth == 0:
            return text[1:end], text[end + 1 :]
    return None, text


def _without_quotes(text: str) -> str:
    """Return an answer without quotation marks around it, or left behind it; the sign of a
    derivative, or of another name, stays.
    """
    quoted = text.lstrip("'\"` ")
    if text[: len(text) - len(quoted)].strip():
        return quoted.rstrip("'\"` ")
    marked = text.rstrip('"` ')
    bare = marked.rstrip("'")
    return marked if _PRIMED.search(bare[-2:]) else bare


def _without_outer_braces(text: str) -> str:
    while text.startswith("{") and text.endswith("}") and _group(text) == (text[1:-1], ""):
        text = tidy(text[1:-1])
    return text


_BASE_WORDS = {
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
    "nine": 9,
    "ten": 10,
    "eleven": 11,
    "twelve": 12,
    "sixteen": 16,
}
_BASE = re.compile(
    r"\(?([0-9A-F]+(?:\.[0-9A-F]+)?)\)?\s*"
    r"(?:_\s*\{?\s*(?:\\text\{)?\(?\s*(?:base\s*)?(\d+|[a-z]+)\s*\)?\}?\}?"
    r"|(?:\\text\{)?\(?(?:in\s+)?base[\s-]*(?:\}\s*)?(\d+|[a-z]+)\)?\}?)"
)
_LETTER_IN_TEXT = re.compile(r"\\text\{([a-zA-Z])\}")
_WITHOUT = re.compile(r"\\mathbb\{R\}\s*(?:-|\\backslash|\\smallsetminus)\s*(?=\\\{)")
_POSITIVE = re.compile(r"\\mathbb\{R\}\s*[\^_]\s*\{?\+\}?$")
_NO_MEMBERS = re.compile(r"\\\{\s*\\\}")
_OUTWARD = re.compile(r"(?=\]|.*\[$)([\](\[])([^()\[\]]+,[^()\[\]]+)([\[)\]])")
"""An interval with a bracket that turns outward at an open end: `]2, 5[`."""
_CHOOSE = re.compile(r"\{\s*([^{}]+?)\s*\\choose\s*([^{}]+?)\s*\}")
TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")
_DEGREE_NUMBER = re.compile(r"\{?(\d+(?:\.\d+)?)\}?\s*°")
_SIGNED_POWER = re.compile(r"\^\s*([-+]\s*\d+)")
_LONG_POWER = re.compile(r"\^\s*(\d\d+)")
_SCIENTIFIC = re.compile(
    r"([-+]?)\s*\{?(\d*\.?\d+)\}?(?:[eE]| ?(?:\\times|\\cdot|\\ast|\*|x) ?\{?10\}?\s*\^)"
    r"\s*\{?\s*([-+]?\s*\d{1,3})\s*\}?"
)
_MIXED = re.compile(r"([-+]?\d+) (\d+)\s*/\s*(\d+)")
_RECURRING = re.compile(
    r"(\d*)\.(\d*?)(?:\\(?:overline|bar|overbar)\s*(?:\{(\d+)\}|(\d))|((?:\\dot\s*\{?\d\}?)\d*(?:\\dot\s*\{?\d\}?)?)|\((\d+)\))"
)
_SHARE = re.compile(
    r"(?<![\d.])(\d+(?:\.\d+)?)\s*\\%\s*(?:\\text\{\s*of\s*\}|\bof\b)\s*(?=[\d(.\\{])"
)
"""A percentage of a number: `15\\% of 200`."""
_LOG_BASE = re.compile(r"\\log\s*_\s*(?:\{\s*e\s*\}|e(?![a-zA-Z]))")


_POWER_WORD = re.compile(r"(\d+)\s*(?:\\text\{)?\s*(squared|cubed|factorial)\s*\}?", re.ASCII)
_POWER_SIGNS = {"squared": "^{2}", "cubed": "^{3}", "factorial": "!"}


def as_latex(value: str) -> str:
    """Return a value in plain LaTeX as math-verify reads it, with decimals and powers exact."""
    value = _POSITIVE.sub(r"(0,\\infty)", _WITHOUT.sub(r"\\mathbb{R} \\setminus ", value))
    value = _NO_MEMBERS.sub(r"\\emptyset", _radians(value))
    if interval := _OUTWARD.fullmatch(value):
        left, ends, right = interval.groups()
        value = f"{'(' if left == ']' else left}{ends}{')' if right == '[' else right}"
    if number := _SCIENTIFIC.fullmatch(value):
        # In decimal digits: in binary, SymPy's 1.1 times 100 is not 110.
        exponent = re.sub(r"\s", "", number[3])
        return f"{Decimal(f'{number[1]}{number[2]}e{exponent}'):f}"
    if power := _POWER_WORD.fullmatch(value):
        return f"{power[1]}{_POWER_SIGNS[power[2]]}"
    if based := _BASE.fullmatch(value):
        base = based[2] or based[3]
        if base.isdigit() or base in _BASE_WORDS:
            return f"{based[1]}_{{{_BASE_WORDS.get(base, base)}}}"
    value = _LETTER_IN_TEXT.sub(r" \1 ", value)
    value = _SIGNED_POWER.sub(r"^{\1}", value)
    value = _LONG_POWER.sub(r"^{\1}", value)
    value = _RECURRING.sub(_recurring_fraction, value)
    value = _LOG_BASE.sub(r"\\ln ", value)
    value = _SHARE.sub(r"\\frac{\1}{100} \\cdot ", value)
    if number := _MIXED.fullmatch(value):
        return rf"{number[1]}\frac{{{number[2]}}}{{{number[3]}}}"
    return value


def _radians(text: str) -> str:
    """Return a value with the degrees within its functions in radians; elsewhere the sign goes."""
    if TRIGONOMETRY.search(text):
        text = _DEGREE_NUMBER.sub(r"{\\frac{\1 \\pi}{180}}", text)
    return text.replace("°", "")


def _recurring_fraction(decimal: re.Match[str]) -> str:
    whole, fixed, *periods = decimal.groups()
    period = re.sub(r"\D", "", next(filter(None, periods)))
    head = int(whole + fixed or "0")
    numerator = int(f"{head}{period}") - head
    return rf"\frac{{{numerator}}}{{{'9' * len(period)}{'0' * len(fixed)}}}"
