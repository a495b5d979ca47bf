"""Reasons against a request: values that would end SGLang 0.5.16, hang it, or be misread.

Pure functions, called at one place, `request_door.py`. Each reason names the field, its value and
the values that are served.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from typing import Any

import msgspec
import numpy as np

from lim_sglang.compat import CPU_GRAMMARS
from lim_sglang.config import PROGRAM_NAMES, is_like_a_program
from lim_sglang.errors import cut, reasons_that_hold

MAX_SAMPLES = 4096
"""Samples of one request, over all its prompts: SGLang's default of running requests."""
MAX_OPENAI_LOGPROBS = 20
"""Candidates a token on OpenAI's routes."""
MAX_LOGPROBS = 10_000_000
"""Candidates that one request may ask for, over all its tokens: about 1 GB of Python objects."""
MAX_NESTING = 100
"""Levels of lists and objects in a body or a grammar: far below Python's own limit."""
MAX_BODY_BYTES = 256 << 20
"""Bytes of a request body."""
MAX_BIAS = 1e9
"""Size of a logit bias: divided by the lowest temperature, its sum with a logit stays finite."""
SCHEMA_INTEGERS = range(-(2**63) + 2, 2**64)
"""Whole numbers in a JSON schema; llguidance 1.9 crashes at a constant just below them."""
ALL_TOKENS = 1 << 30
"""SGLang's value of `top_k` for the whole vocabulary, which a request writes as -1."""
MAX_INT32, MAX_INT64, MAX_FLOAT32 = 2**31 - 1, 2**63 - 1, 3.4e38
SAMPLING_BOUNDS: Mapping[str, tuple[float, float]] = {
    "temperature": (0, MAX_FLOAT32),
    "top_p": (1e-6, 1),  # a lower one is 0 in 32 bits, and no token is left to sample
    "top_k": (1, ALL_TOKENS),
    "repetition_penalty": (1e-3, 2),  # logits are divided by it, and must not overflow
    "min_new_tokens": (0, MAX_INT32),
    "stream_interval": (1, MAX_INT32),
    "sampling_seed": (-MAX_INT64, MAX_INT64),
}
"""The least and the largest number that is served."""

INTERNAL_FIELDS = (
    *("lora_id", "http_worker_ipc", "mm_data_mooncake", "encoder_urls", "num_items_assigned"),
    "need_wait_for_mm_inputs",
)
"""Fields of a request that SGLang fills in itself, and trusts."""
INTERNAL_SAMPLING = (
    *("stop_strs", "stop_regex_strs", "stop_str_max_len", "stop_regex_max_len", "is_normalized"),
)
"""Sampling parameters that SGLang fills in itself, and trusts."""
PER_PROMPT_FIELDS = (
    *("rid", "sampling_params", "return_logprob", "logprob_start_len", "top_logprobs_num"),
    *("return_sampling_mask", "return_hidden_states", "lora_path", "custom_logit_processor"),
    *("bootstrap_host", "bootstrap_port", "bootstrap_room", "bootstrap_pair_key"),
    *("decode_tp_size", "extra_key", "image_data", "video_data", "audio_data"),
)
"""Fields that may hold a list with one value for each prompt of a batch."""
UNTYPED_FIELDS = (
    *("input_ids", "mm_inputs", "time_stats", "mm_data_mooncake", "num_items_assigned"),
    "positional_embed_overrides",
)
"""Fields of a tokenized request that are checked elsewhere, or come from SGLang itself."""


MEDIA = ("image_data", "video_data", "audio_data")
"""Fields of which an empty list means none."""


@dataclass(frozen=True)
class Limits:
    """Properties of a server that bound its requests."""

    vocab_size: int
    context: int
    """Tokens of the longest request, prompt and answer."""
    hidden_size: int
    """Numbers of one token's embedding."""
    grammar_backend: str
    """The compiler of grammars, as SGLang calls it."""
    reads_media: bool
    """True if the model takes images, videos or sound."""


def reason_against_body(body: bytes) -> str | None:
    """Return why a JSON body cannot be served, None if it can or is no JSON at all."""
    if b"\0" in body or not _is_utf8(body):
        return "the body is not in UTF-8, which JSON is sent in"
    if is_nested_too_deeply(body):
        return f"the body is nested more than {MAX_NESTING} levels deep"
    if _HALF_PAIR.search(body) and _has_half_pair(body):
        return (
            "the body has half of a surrogate pair, such as \\ud83d alone, which is no character: "
            "send both halves, or the character in UTF-8"
        )
    return None


_HIGH, _LOW = rb"\\u[dD][89abAB][0-9a-fA-F]{2}", rb"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_HALF_PAIR = re.compile(rb"%b(?!%b)|(?<!%b)%b" % (_HIGH, _LOW, _HIGH, _LOW))
"""Half of a surrogate pair, unless the backslash before it is itself escaped."""
_STRINGS_AND_BRACKETS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)


def _is_utf8(body: bytes) -> bool:
    try:
        body.decode()
    except UnicodeDecodeError:
        return False
    return True


def is_nested_too_deeply(text: bytes) -> bool:
    """Return True if lists and objects of a JSON text are nested over `MAX_NESTING` levels."""
    if text.count(b"[") + text.count(b"{") <= MAX_NESTING:
        return False
    depth = 0
    for match in _STRINGS_AND_BRACKETS.finditer(text):
        sign = match[0]
        if sign in b"[{":
            depth += 1
            if depth > MAX_NESTING:
                return True
        elif sign in b"]}":
            depth -= 1
    return False


def _has_half_pair(body: bytes) -> bool:
    try:
        json.dumps(json.loads(body), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    except ValueError:  # no JSON: SGLang says so
        return False
    return False


_VOTE = re.compile(r"[a-z_]+@\d+(\?.*)?")
"""Model of a request for votes, of a program that need not exist."""


def reasons_against_model_name(model: object, served: str | None = None) -> list[str]:
    """List why no model of a server is called so: any name is served but that of a vote, also of a
    misspelt one, and of a program alone.

    Args:
        served: the name of the server's model, which may be like a vote's; None if unknown.
    """
    if not isinstance(model, str) or (served and _last_part(served) == _last_part(model)):
        return []
    name, *behind = re.split("[@?]", model)
    is_like = is_like_a_program(_last_part(name), PROGRAM_NAMES, is_alone=not behind)
    if not (_VOTE.fullmatch(model) or is_like):
        return []
    return [
        f"model {_shown(model)} is a vote, which a server does not count: send the request to lim "
        f"proxy, where a vote is PROGRAM@SAMPLES with one of {', '.join(PROGRAM_NAMES)}; or name "
        f"the model of this server{f', {cut(served, 200)}' if served else ''}"
    ]


def _last_part(name: str) -> str:
    """Return a name without the path of its provider."""
    return name.rpartition("/")[2].strip()


def reasons_against_batch(request: Any, *, is_openai: bool) -> list[str]:
    """List the reasons against a request as it came in, before its lists are expanded.

    Args:
        request: SGLang's `GenerateReqInput`, or an object with some of its attributes.
        is_openai: True on OpenAI's routes.
    """
    reasons = [
        f"{name}: SGLang fills it in itself, so leave it out"
        for name in INTERNAL_FIELDS
        if getattr(request, name, None) is not None
    ]
    if _is_json(getattr(request, "positional_embed_overrides", None)):
        reasons.append("positional_embed_overrides: tensors are expected, so they need Python")
    reasons += _reasons_against_lists(request)
    given = getattr(request, "sampling_params", None)
    for sampling in given if isinstance(given, list) else [given]:
        reasons += _reasons_against_raw_sampling(sampling, num_prompts(request) or 1)
    asked = getattr(request, "top_logprobs_num", None)
    if is_openai and isinstance(asked, int) and asked > MAX_OPENAI_LOGPROBS:
        reasons.append(f"{asked} logprobs a token: at most {MAX_OPENAI_LOGPROBS} on this route")
    return list(dict.fromkeys(reasons))


def num_prompts(request: Any) -> int | None:
    """Return the number of prompts of a batch, None for one prompt that is not in a list."""
    text, ids = (getattr(request, name, None) for name in ("text", "input_ids"))
    if isinstance(text, list):
        return len(text)
    if text is None and isinstance(ids, list) and ids and isinstance(ids[0], list):
        return len(ids)
    return None


def _reasons_against_lists(request: Any) -> list[str]:
    """List the per-prompt lists whose length is not the number of prompts."""
    number = num_prompts(request)
    if number is None:
        return []
    lists = {name: getattr(request, name, None) for name in PER_PROMPT_FIELDS}
    nested = getattr(request, "token_ids_logprob", None)
    if isinstance(nested, list) and any(isinstance(ids, list) for ids in nested):
        lists["token_ids_logprob"] = nested
    return [
        f"{name} has {len(values)} values for {number} prompts"
        for name, values in lists.items()
        if isinstance(values, list) and len(values) != number and (values or name not in MEDIA)
    ]


def _reasons_against_raw_sampling(sampling: Any, prompts: int) -> list[str]:
    if sampling is None:
        return []
    if not isinstance(sampling, Mapping):
        return [f"sampling_params: expected an object, got {_shown(sampling)}"]
    reasons = [
        f"sampling_params.{name}: SGLang fills it in itself, so leave it out"
        for name in INTERNAL_SAMPLING
        if name in sampling
    ]
    reasons += [
        f"sampling_params.{name}: expected {expected}, got {_shown(value)}"
        for name, (expected, has_type) in SAMPLING_TYPES.items()
        if (value := sampling.get(name)) is not None and not has_type(value)
    ]
    samples = sampling.get("n", 1)
    if samples is not None and not _is_within(samples, 1, MAX_SAMPLES):
        reasons.append(f"n: expected 1 to {MAX_SAMPLES} samples, got {_shown(samples)}")
    elif samples not in (None, 1) and samples * prompts > MAX_SAMPLES:
        reasons.append(
            f"n: {samples} samples of {prompts} prompts are over {MAX_SAMPLES}: send fewer at once"
        )
    return reasons


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (_is_whole(value) and abs(value) <= MAX_FLOAT32)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)
    )


def _is_ids(value: Any) -> bool:
    is_list = isinstance(value, Collection) and not isinstance(value, str | bytes | Mapping)
    return is_list and all(each is None or _is_id(each) for each in value)


def _is_id(value: Any) -> bool:
    """Return True for what SGLang's `int(value)` keeps: integral numbers, and digits as text."""
    if isinstance(value, str):
        return bool(re.fullmatch("-?[0-9]{1,18}", value))
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return is_number and bool(value == value // 1)


def _is_bias(value: Any) -> bool:
    return isinstance(value, Mapping) and all(re.fullmatch("-?[0-9]+", str(key)) for key in value)


SAMPLING_TYPES: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(
        ("max_new_tokens", "min_new_tokens", "top_k", "stream_interval", "sampling_seed"),
        ("a whole number", _is_whole),
    ),
    **dict.fromkeys(("temperature", "top_p", "min_p"), ("a number", _is_number)),
    **dict.fromkeys(
        ("frequency_penalty", "presence_penalty", "repetition_penalty"), ("a number", _is_number)
    ),
    **dict.fromkeys(("stop", "stop_regex"), ("a string, or a list of strings", _is_text)),
    "stop_token_ids": ("a list of token ids", _is_ids),
    "logit_bias": ('token ids as keys, such as {"42": -5.0}', _is_bias),
}
"""Types of sampling parameters, None aside, in words and as a check, before SGLang computes with
them; `n` is checked by its bounds."""


def reasons_against_request(request: Any, limits: Limits) -> list[str]:
    """List the reasons against one tokenized request, as SGLang is about to send it on.

    Args:
        request: SGLang's `TokenizedGenerateReqInput`, or another msgspec struct with its fields.
    """
    reasons = type_faults(request)
    if reasons:  # the bounds below are those of numbers
        return reasons
    return [
        *_reasons_against_prompt(request, limits),
        *_reasons_against_logprobs(request, limits),
        *reasons_against_sampling(request.sampling_params, limits),
        *_reasons_against_mask(request, limits),
    ]


def type_faults(struct: msgspec.Struct, prefix: str = "") -> list[str]:
    """List the fields whose values are not of the types that the struct declares.

    SGLang builds its structs without a check and pickles them, so a value of another type gets as
    far as the scheduler.
    """
    faults = []
    for field in msgspec.structs.fields(type(struct)):
        value = getattr(struct, field.name)
        if field.name in UNTYPED_FIELDS:
            continue
        if isinstance(value, msgspec.Struct):
            faults += type_faults(value, f"{prefix}{field.name}.")
            continue
        try:
            msgspec.convert(value, field.type)
        except msgspec.ValidationError as error:
            faults.append(f"{prefix}{field.name}: {error}".replace("Expected", "expected"))
    return faults


def _reasons_against_prompt(request: Any, limits: Limits) -> list[str]:
    ids = request.input_ids
    if request.input_embeds is not None:
        return _reasons_against_embeds(request.input_embeds, limits.hidden_size)
    if request.mm_inputs is not None or ids is None:
        return []
    if not len(ids):
        return ["the prompt has no tokens"]
    known = np.asarray(ids)
    wrong = known[(known < 0) | (known >= limits.vocab_size)]
    places = request.multi_item_delimiter_indices
    return reasons_that_hold(
        (bool(wrong.size), _out_of_vocabulary("the prompt", wrong.tolist(), limits.vocab_size)),
        (
            places is not None and not (places and 0 <= min(places) <= max(places) < len(ids)),
            f"multi_item_delimiter_indices: expected positions of the prompt, got {places}",
        ),
    )


def _reasons_against_embeds(embeds: Sequence[Sequence[float]], hidden_size: int) -> list[str]:
    if not embeds or any(len(row) != hidden_size for row in embeds):
        return [f"input_embeds: expected {hidden_size} numbers for each token of the prompt"]
    return reasons_that_hold(
        (
            not bool((np.abs(np.asarray(embeds)) <= MAX_FLOAT32).all()),
            f"input_embeds: expected numbers of up to {MAX_FLOAT32}",
        )
    )


def _reasons_against_logprobs(request: Any, limits: Limits) -> list[str]:
    asked, start = request.top_logprobs_num, request.logprob_start_len
    ids = request.token_ids_logprob or ()
    new, samples = request.sampling_params.max_new_tokens, request.sampling_params.n
    length = len(request.input_embeds or request.input_ids or ())
    from_prompt = length - start if start >= 0 else 0
    left = max(limits.context - length, 0)
    tokens = samples * (from_prompt + (left if new is None else min(new, left)))
    total = tokens * max(asked, len(ids))
    return reasons_that_hold(
        (
            not 0 <= asked <= limits.vocab_size,
            f"top_logprobs_num: expected 0 to {limits.vocab_size}, the vocabulary, got {asked}",
        ),
        (
            not -1 <= start <= length,
            f"logprob_start_len: expected -1 to {length}, the prompt's tokens, got {start}",
        ),
        (
            bool(request.return_logprob) and max(asked, len(ids)) > 1 and total > MAX_LOGPROBS,
            f"logprobs of {max(asked, len(ids))} candidates for {tokens} tokens are over "
            f"{MAX_LOGPROBS}: ask for fewer candidates or tokens",
        ),
    ) + reasons_against_ids("token_ids_logprob", ids, limits.vocab_size)


def reasons_against_ids(name: str, ids: Iterable[Any], vocab_size: int) -> list[str]:
    """Return one reason if any of the token ids, in lists or not, is none of the vocabulary."""
    flat = [each for part in ids for each in (part if isinstance(part, list) else [part])]
    wrong = [each for each in flat if isinstance(each, int) and not 0 <= each < vocab_size]
    return [_out_of_vocabulary(name, wrong, vocab_size)] if wrong else []


def _out_of_vocabulary(name: str, wrong: Sequence[int], vocab_size: int) -> str:
    shown = ", ".join(map(_shown, wrong[:3])) + (", …" if len(wrong) > 3 else "")
    return f"{name} has the token ids {shown}: expected 0 to {vocab_size - 1}"


def reasons_against_sampling(sampling: Any, limits: Limits) -> list[str]:
    """List the sampling parameters out of bounds that SGLang's own `verify` lets through.

    Args:
        sampling: SGLang's `SamplingParams`, normalized.
    """
    values = {name: getattr(sampling, name) for name in SAMPLING_BOUNDS}
    return [
        *(
            f"{name}: expected {least} to {most}, got {_shown(values[name])}"
            for name, (least, most) in SAMPLING_BOUNDS.items()
            if values[name] is not None and not least <= values[name] <= most
        ),
        *reasons_against_ids("stop_token_ids", sampling.stop_token_ids or (), limits.vocab_size),
        *_reasons_against_bias(sampling.logit_bias or {}, limits),
        *_reasons_against_stop_patterns(sampling.stop_regex_strs or ()),
        *_reasons_against_grammars(sampling, limits),
    ]


def _reasons_against_bias(bias: Mapping[str, float], limits: Limits) -> list[str]:
    keys = [int(key) for key in bias if key.isascii() and key.isdigit()]
    if len(keys) < len(bias):
        return ['logit_bias: expected token ids as keys, such as {"42": -5.0}']
    wrong = [value for value in bias.values() if not -MAX_BIAS <= value <= MAX_BIAS]
    return reasons_against_ids("logit_bias", keys, limits.vocab_size) + [
        f"logit_bias: expected values of {-MAX_BIAS:g} to {MAX_BIAS:g}, got {value}"
        for value in wrong[:1]
    ]


def _reasons_against_mask(request: Any, limits: Limits) -> list[str]:
    top_k = request.sampling_params.top_k
    if request.return_sampling_mask and limits.vocab_size < top_k < ALL_TOKENS:
        return [
            f"return_sampling_mask: expected a top_k of at most {limits.vocab_size}, got {top_k}"
        ]
    return []


def _reasons_against_stop_patterns(patterns: Sequence[str]) -> list[str]:
    """List the patterns that Python's `re` does not compile, as the scheduler will."""
    reasons = []
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            reasons.append(f"stop_regex {_shown(pattern)} is no regular expression: {error}")
    return reasons


def _reasons_against_grammars(sampling: Any, limits: Limits) -> list[str]:
    """List the grammars that no compiler survives, and those that no finite text matches.

    A grammar that does not compile is not listed: SGLang's grammar backend says why.
    """
    names = ("json_schema", "structural_tag", "regex", "ebnf")
    given = {name: text for name in names if (text := getattr(sampling, name)) is not None}
    return [
        f"{name} {reason}"
        for name, text in given.items()
        if (reason := _reason_against_grammar(name, text, limits))
    ]


def _reason_against_grammar(name: str, text: str, limits: Limits) -> str | None:
    is_json = name in ("json_schema", "structural_tag")
    if is_json and is_nested_too_deeply(text.encode()):
        return f"is nested more than {MAX_NESTING} levels deep"
    value = _read_json(text) if is_json else None
    if limits.grammar_backend != CPU_GRAMMARS and ("\0" in text or "\\u0000" in text):
        return f"has a character NUL, at which {limits.grammar_backend} would crash: leave it out"
    numbers = [n for each in _objects(value) for key in _BOUNDS for n in _integers(each.get(key))]
    if wrong := [number for number in numbers if number not in SCHEMA_INTEGERS]:
        return f"has the number {_shown(wrong[0])}: whole numbers of 64 bits are served"
    tagged = [each[key] for each in _objects(value) for key in _SCHEMA_KEYS if key in each]
    if any(map(recurs_without_end, [value] if name == "json_schema" else tagged)):
        return (
            "recurs without end, so no finite value can match it: give each recursion another "
            "choice, or make the property that recurs optional"
        )
    return None


_SCHEMA_KEYS = ("schema", "json_schema")
"""Keys of a structural tag that hold a JSON schema."""
_BOUNDS = (
    *("const", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    *("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"),
)
"""Keys of a JSON schema that hold a number, or a list that may hold numbers."""


def _read_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Yield all objects inside a JSON value, itself among them."""
    pending = [value]
    while pending:
        each = pending.pop()
        if isinstance(each, dict):
            yield each
            pending += each.values()
        elif isinstance(each, list):
            pending += each


def _integers(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [each for each in values if isinstance(each, int)]


def recurs_without_end(schema: Any) -> bool:
    """Return True if no finite value can match a JSON schema, as with `{"$ref": "#"}`.

    A schema has a finite value once each of its needs has a choice with a finite value. That
    spreads from the schemas without a need; it takes time linear in the references.
    """
    if not isinstance(schema, dict):
        return False
    unmet: dict[int, int] = {}  # by the id of a schema, its needs that have no finite choice yet
    waiting: dict[
        int, list[tuple[int, int]]
    ] = {}  # needs (schema, number) for which it is a choice
    pending = [schema]
    while pending:
        node = pending.pop()
        if id(node) in unmet:
            continue
        needs = _needs(node, schema)
        unmet[id(node)] = len(needs)
        for number, choices in enumerate(needs):
            for choice in choices:
                waiting.setdefault(id(choice), []).append((id(node), number))
                pending.append(choice)
    finite = [key for key, number in unmet.items() if not number]
    met = set()
    while finite:
        for need in waiting.get(finite.pop(), ()):
            if need not in met:
                met.add(need)
                unmet[need[0]] -= 1
                if not unmet[need[0]]:
                    finite.append(need[0])
    return unmet[id(schema)] > 0


def _needs(node: dict[str, Any], root: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Return the choices of schemas, one of each of which a value of a schema has to match."""
    needs: list[list[Any]] = [[part] for part in _listed(node, "allOf")]
    needs += [choices for key in ("anyOf", "oneOf") if (choices := _listed(node, key))]
    if isinstance(node.get("$ref"), str):
        needs.append([_target(node["$ref"], root)])
    if node.get("type") == "object" and isinstance(node.get("properties"), dict):
        names = [name for name in _listed(node, "required") if isinstance(name, str)]
        needs += [[node["properties"].get(name)] for name in names]
    if node.get("type") == "array" and isinstance(number := node.get("minItems"), int):
        needs += _needed_items(node, number)
    # A schema that is no object, or cannot be found, counts as finite.
    return [choices for choices in needs if all(isinstance(each, dict) for each in choices)]


def _needed_items(node: dict[str, Any], number: int) -> list[list[Any]]:
    """Return the needs of a list of at least `number` items."""
    first = _listed(node, "prefixItems")
    rest = [[node.get("items")]] if number > len(first) else []
    return [[item] for item in first[: max(number, 0)]] + rest


def _listed(node: dict[str, Any], key: str) -> list[Any]:
    value = node.get(key)
    return value if isinstance(value, list) else []


def _target(reference: str, root: dict[str, Any]) -> Any:
    """Return the schema that a reference inside the same document names, None for any other."""
    if reference != "#" and not reference.startswith("#/"):  # elsewhere, or an anchor
        return None
    found: Any = root
    for step in reference.removeprefix("#").split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        elif isinstance(found, dict):
            found = found.get(name)
        else:
            return None
    return found


def _is_json(value: Any) -> bool:
    """Return True for a value that came from JSON, None aside."""
    if isinstance(value, list):
        return not value or any(map(_is_json, value))
    return isinstance(value, dict | str | int | float)


def _is_within(value: Any, least: int, most: int) -> bool:
    return _is_whole(value) and bool(least <= value <= most)


def _shown(value: Any) -> str:
    """Return a value for a message, cut if it is long."""
    is_long = isinstance(value, int) and abs(value) >= 10**20
    text = f"{Decimal(value):.3g}" if is_long else repr(value)
    return cut(text, 40)
