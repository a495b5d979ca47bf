"""`lim train-gate`: its options, texts, checkpoints and progress, and the gate at its end.

The command line imports this file: torch is imported by the functions that need it.
"""

import hashlib
import json
import os
import random
import shlex
import signal
import sysconfig
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from filelock import FileLock, Timeout
from rich.console import Console

from lim_sglang.errors import INTERRUPTED, ConfigError, DataError, ModelError, bullets
from lim_sglang.gates.files import (
    BLOCK,
    CONFIG_FILE,
    archived,
    load_archive,
    replace_file,
    write_gates,
)
from lim_sglang.models import check_model, model_digest
from lim_sglang.progress import duration, plain_console, print_plain, rate, show_progress

if TYPE_CHECKING:
    from torch import Tensor

    from lim_sglang.gates.distillation import FrozenModel, GateTrainer, Recall

CHECKPOINT_FILE = "checkpoint.pt"
CHECKPOINT_STEPS = 50
"""Steps between two checkpoints."""
HELD_OUT = 2
"""Texts, of the training's length, on which recall is measured."""
MAX_SEED = 2**63 - 1
"""Largest seed that torch takes."""
LOCK_FILE = "lim.lock"
_TOKENIZED_AT_ONCE = 64


@dataclass(frozen=True)
class Settings:
    """Options that decide the result of a training."""

    model: str
    texts: tuple[str, ...]
    """Files of text; none: Python sources of the installed packages."""
    steps: int
    length: int
    """Tokens of a step's text."""
    seed: int

    @property
    def tokens(self) -> int:
        """Tokens that are trained on."""
        return self.steps * self.length


def train_gate(
    model: Annotated[str, typer.Argument(help="A model folder or a hub id: Llama, Qwen2, Qwen3.")],
    texts: Annotated[
        list[Path] | None,
        typer.Option(
            help="Training texts, .jsonl with a text a line or plain text; repeatable. Never "
            "benchmark questions.",
            show_default="Python sources of the installed packages",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the gate, and of checkpoints until the gate is done.",
            show_default="gates/ and the model's name",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps, of one text each.")] = 1000,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a text.")] = 4096,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Of first weights and order of texts.")
    ] = 0,
    budget: Annotated[
        int, typer.Option(min=1, help="Tokens of the sets whose recall is shown at the end.")
    ] = 512,
) -> None:
    """Train a gate of policy seer for a model, by distillation of the model's own attention. Stop
    with Ctrl-C; the same command goes on. Never train on benchmark questions, or their scores mean
    nothing."""
    source = check_model(model)
    folder = out or Path("gates", Path(model).resolve().name)
    settings = Settings(model, tuple(map(str, texts or ())), steps, length, seed)
    try:
        recall = train(source, settings, budget, folder, plain_console(stderr=True))
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    typer.echo(recall_table(recall))
    words = ["lim", "serve", model, "--policy", "seer", "--lim-gate", str(folder)]
    typer.echo(f"\nThe gate is in {folder}. Next:\n{shlex.join(words)}")


def recall_table(recall: "Recall") -> str:
    """Return recall of attention mass by method, in percent."""
    title = (
        f"Share of attention mass in {recall.budget:,} tokens, mean over layers and "
        f"{recall.queries} queries of held-out texts"
    )
    shares = {
        "this gate": recall.gate,
        "Quest's pages": recall.quest,
        "random blocks": recall.at_random,
    }
    rows = [f"{name:>15}  {100 * share:5.1f} %" for name, share in shares.items()]
    return "\n".join([title, *rows])


def python_sources() -> list[Path]:
    """List the Python files of the installed packages, without their tests, in a fixed order."""
    root = Path(sysconfig.get_path("purelib"))
    return [
        path
        for path in sorted(root.rglob("*.py"))
        # No folder, pipe or dangling link of that name.
        if path.is_file() and not _is_test(path.relative_to(root))
    ]


def _is_test(path: Path) -> bool:
    """Return True for a file, or a file in a folder, of tests."""
    return bool({"test", "tests", "testing"} & set(path.parts)) or bool(
        path.stem == "conftest" or path.stem.startswith("test_") or path.stem.endswith("_test")
    )


def read_texts(files: Sequence[str], seed: int) -> Iterator[str]:
    """Yield documents in an order drawn from the seed.

    Args:
        files: `.jsonl` files with a `text` a line, or plain text, each file a document. Without
            files: Python sources of the installed packages.

    Raises:
        DataError: a file is missing, or has another form.
    """
    order = random.Random(seed)
    if not files:
        sources = python_sources()
        order.shuffle(sources)
        yield from (path.read_text(encoding="utf-8", errors="replace") for path in sources)
        return
    documents = [text for file in files for text in _read_file(Path(file))]
    order.shuffle(documents)
    yield from documents


def _read_file(path: Path) -> list[str]:
    """Return the documents of one file."""
    if path.suffix != ".jsonl":
        return [_read_content(path)]
    documents = []
    for place, row in read_json_lines(path):
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise DataError(f'{place}: expected an object such as {{"text": "…"}}')
        documents.append(check_text(row["text"], place))
    return documents


def _read_content(path: Path) -> str:
    """Return a text of UTF-8, without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no readable text ({error}): name files of UTF-8") from None


def read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield what the lines of a file hold, each with its place for errors; blank lines are skipped.

    Lines end at `\\n` alone: JSON may hold the other characters that end lines.

    Yields:
        `FILE, line N`, and the line's value; None if the line is no JSON.

    Raises:
        DataError: the file cannot be read.
    """
    for number, line in enumerate(_read_content(path).split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield f"{path}, line {number}", row


def check_text(text: str, place: str) -> str:
    """Return a text that a tokenizer can read.

    Raises:
        DataError: the text holds half of a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{place} holds half a surrogate pair, which is not valid text") from None
    return text


def tokenize(tokenizer: Any, documents: Iterator[str]) -> Iterator[list[int]]:
    """Yield the token ids of each document, with the end token after it if there is one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    while batch := list(islice(documents, _TOKENIZED_AT_ONCE)):
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            yield ids + end


def load_texts(settings: Settings, tokenizer: Any, console: Console) -> "tuple[Tensor, Tensor]":
    """Join documents, and cut them into the held-out texts and those of the steps.

    Returns:
        two tensors [texts, length] int32.

    Raises:
        DataError: the texts have too few tokens.
    """
    import torch

    needed = (HELD_OUT + settings.steps) * settings.length
    joined = array("i")
    text = f"Reading {needed:,} tokens"
    with show_progress(console, needed, text) as show:
        for ids in tokenize(tokenizer, read_texts(settings.texts, settings.seed)):
            joined.extend(ids)
            show(min(len(joined), needed), f"{text}: {len(joined):,} so far")
            if len(joined) >= needed:
                break
    if len(joined) < needed:
        steps = len(joined) // settings.length - HELD_OUT
        raise DataError(
            f"the texts have {len(joined):,} tokens, expected {needed:,} for {settings.steps} "
            f"steps and {HELD_OUT} held-out texts of {settings.length:,} each: give more --texts, "
            + "or "
            + (f"--steps {steps} at most" if steps > 0 else "a smaller --length")
        )
    texts = torch.tensor(joined[:needed], dtype=torch.int32).view(-1, settings.length)
    return texts[:HELD_OUT], texts[HELD_OUT:]


def check_settings(settings: Settings, budget: int) -> None:
    """Refuse lengths at which nothing could be learnt or measured, all at once.

    Raises:
        ConfigError: with the reasons.
    """
    reasons = []
    if settings.length % BLOCK:
        reasons.append(f"--length {settings.length}: use a multiple of {BLOCK}, a block")
    if budget % BLOCK or budget < 2 * BLOCK:
        reasons.append(f"--budget {budget}: use a multiple of {BLOCK} from {2 * BLOCK}")
    least = 2 * BLOCK * -(-budget // BLOCK) + 2 * BLOCK
    if settings.length < least:
        reasons.append(
            f"--length {settings.length}: recall at {budget} tokens is measured beyond them, in "
            f"the second half of a text, so use {least} or more, or a smaller --budget"
        )
    if reasons:
        raise ConfigError(f"the gate cannot be trained so:{bullets(reasons)}")


_CHECKPOINT_KEYS = {"step", "gates", "optimizer", "settings", "tokens of the texts", "model"}


def read_checkpoint(out: Path, settings: Settings) -> dict[str, Any] | None:
    """Return the newest checkpoint of a folder; None if there is none.

    Raises:
        ConfigError: the checkpoint is of other settings, or the folder holds a finished gate.
        DataError: the checkpoint cannot be read.
    """
    file = out / CHECKPOINT_FILE
    if not file.is_file():
        if (out / CONFIG_FILE).exists():
            raise ConfigError(f"{out} holds a {CONFIG_FILE} already: name another --out")
        return None
    try:
        stored = load_archive(file.read_bytes())
        if not isinstance(stored, dict) or not isinstance(stored.get("settings"), dict):
            raise ValueError("it has no settings")
        if missing := _CHECKPOINT_KEYS - stored.keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is no checkpoint ({error}): delete it to begin anew") from None
    before = stored["settings"]
    now = _plain(settings)
    changed = [
        f"--{name} is {now[name]}, {before.get(name)} in the checkpoint".replace("--model", "MODEL")
        for name in now
        if now[name] != before.get(name)
    ]
    if changed:
        raise ConfigError(
            f"{file} is of another training; give the same options, or name another --out:"
            f"{bullets(changed)}"
        )
    checkpoint: dict[str, Any] = stored
    return checkpoint


def _plain(settings: Settings) -> dict[str, Any]:
    """Return settings of plain types, as they are stored."""
    return asdict(settings) | {"texts": list(settings.texts)}


def train(source: str, settings: Settings, budget: int, out: Path, console: Console) -> "Recall":
    """Train a gate for each layer of a model, or go on from the folder's checkpoint, and write it.

    Args:
        source: what transformers loads, a folder or a hub id.
        settings: all that decides the result.
        budget: tokens of the sets whose recall is measured.
        out: folder of checkpoints and, at the end, of the gate.
        console: shows progress.

    Raises:
        ConfigError: the settings, or those of the checkpoint, do not allow it.
        DataError: the texts are too short or cannot be read, or the folder cannot be written.
        ModelError: the model cannot be loaded or its gates could not be served.
        KeyboardInterrupt: a checkpoint is written, if there was a step.
    """
    check_settings(settings, budget)
    check_folder(out)
    read_checkpoint(out, settings)
    import torch

    from lim_sglang.gates.distillation import FrozenModel, GateTrainer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config, tokenizer = _load_config(source, settings.length)
    held_out, training = load_texts(settings, tokenizer, console)
    inputs = {"tokens of the texts": _digest(held_out, training), "model": model_digest(source)}
    with alone_in(out, "lim train-gate"):
        checkpoint = read_checkpoint(out, settings)  # again, as nobody else writes there now
        changed = [name for name in inputs if checkpoint and checkpoint[name] != inputs[name]]
        if changed:
            raise ConfigError(
                f"the {' and the '.join(changed)} changed since {out / CHECKPOINT_FILE} was "
                "written: name another --out to begin anew"
            )
        model = FrozenModel(source, config, device)
        trainer = GateTrainer(
            model, steps=settings.steps, length=settings.length, seed=settings.seed
        )
        if checkpoint:
            trainer.load(checkpoint)
            print_plain(console, f"Going on from step {trainer.step} of {settings.steps}")

        def keep() -> None:
            state = archived(trainer.state() | inputs | {"settings": _plain(settings)})
            with disk_errors(out):
                replace_file(out / CHECKPOINT_FILE, state)

        _run_steps(trainer, training, keep, console)
        print_plain(console, f"Measuring recall on {HELD_OUT} held-out texts")
        recall = trainer.recall(list(held_out), budget)
        with disk_errors(out):
            write_gates(out, trainer.finished_gates(), _described(model, settings, recall))
            (out / CHECKPOINT_FILE).unlink()
    return recall


def check_folder(out: Path) -> None:
    """Refuse a folder that cannot be made or written, before hours of work."""
    with disk_errors(out):
        place = next(each for each in (out, *out.absolute().parents) if each.exists())
        if not place.is_dir():
            raise NotADirectoryError(f"{place} is no folder")
        if not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(f"no permission in {place}")


@contextmanager
def alone_in(out: Path, command: str) -> Iterator[None]:
    """Make the folder of a command's results, and refuse one to which another process writes."""
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / LOCK_FILE, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise DataError(
                f"another {command} is writing to {out}: wait for its end, or name another --out"
            ) from None
    try:
        yield
    finally:
        (out / LOCK_FILE).unlink(missing_ok=True)
        lock.release()


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Say in words that a folder cannot be written."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{out} cannot be written ({error}): make room, or name another --out"
        ) from None


def _digest(*texts: "Tensor") -> str:
    """Return a digest of tokens."""
    digest = hashlib.sha256()
    for tokens in texts:
        digest.update(tokens.numpy().tobytes())
    return digest.hexdigest()


def _load_config(source: str, length: int) -> tuple[Any, Any]:
    """Load a model's configuration, which must suit the gate, and its tokenizer."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from lim_sglang.gates.distillation import load_config

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = load_config(source)
    if length > config.max_position_embeddings:
        raise ConfigError(
            f"--length {length}: the model takes {config.max_position_embeddings} tokens at most"
        )
    try:
        return config, AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ModelError(f"the tokenizer of {source} cannot be loaded: {error}") from None


def _run_steps(
    trainer: "GateTrainer", training: "Tensor", keep: Callable[[], None], console: Console
) -> None:
    """Take the remaining steps; keep a checkpoint now and then, at the end, and at Ctrl-C."""
    first, steps = trainer.step, len(training)
    start_s = time.monotonic()
    with (
        _interrupts() as interrupted,
        show_progress(console, steps, f"Training {steps} steps", completed=first) as show,
    ):
        while trainer.step < steps and not interrupted.is_set():
            loss = trainer.learn(training[trainer.step])
            show(trainer.step, _progress(trainer.step, first, training, loss, start_s))
            if trainer.step % CHECKPOINT_STEPS == 0 or trainer.step == steps:
                keep()
        if interrupted.is_set():
            keep()
    if interrupted.is_set():
        print_plain(
            console,
            f"Stopped after step {trainer.step} of {steps}, which is kept: "
            "the same command goes on from there",
        )
        raise KeyboardInterrupt


def _progress(step: int, first: int, training: "Tensor", loss: float, start_s: float) -> str:
    """Describe the newest step: number, loss, speed and time left."""
    steps, length = training.shape
    elapsed_s = time.monotonic() - start_s
    left = duration(elapsed_s / (step - first) * (steps - step))
    speed = rate((step - first) * length, elapsed_s)
    return f"step {step} of {steps}, loss {loss:.4f}, {speed} tokens/s, {left} left"


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C sets, so that no step is cut; a second ends at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: object) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def _described(model: "FrozenModel", settings: Settings, recall: "Recall") -> dict[str, Any]:
    """Return the keys of `config.json`: the model's own, as published, and `lim_training`."""
    from lim_sglang.gates.distillation import LAST_RATE, LOSS_SCALE, PEAK_RATE, WARM_UP

    config = json.loads(model.config.to_json_string())
    config.setdefault("rope_theta", (config.get("rope_parameters") or {}).get("rope_theta"))
    trained = _plain(settings) | {
        "peak_rate": PEAK_RATE,
        "last_rate": LAST_RATE,
        "warm_up": WARM_UP,
        "loss_scale": LOSS_SCALE,
        "dtype": str(model.dtype).removeprefix("torch."),
        "recall": asdict(recall),
    }
    return config | {
        "base_model": settings.model,
        "tokens_seen": settings.tokens,
        "lim_training": trained,
    }
