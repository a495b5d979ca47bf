"""Served tokens against another implementation: does each win its race in a dense pass?

    python -m tests.soak.served_tokens ask FILE --model MODEL --url URL --questions QUESTIONS
    python -m tests.soak.served_tokens check FILE... --model MODEL

`ask` sends questions with seeds to a server whose sampler is the coupled one. `check` lets the
model of transformers read each prompt and answer densely, and compares each served token with the
winner of the race at its place (`kernels/reference_sampling.py`). With several files, the answers
are compared with those of the first file, too. Results are printed as JSON.

Other kernels round otherwise, so that some tokens lose their race narrowly: a share that a dense
server has, too. Tokens drawn by another position's noise show what a fault would look like.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from torch import Tensor

from lim_sglang.evals.run_store import complete_lines
from lim_sglang.kernels.reference_sampling import exponential_noise, hash_tokens

TEMPERATURE, TOP_P = 0.6, 0.95
CANDIDATES = 1024
"""Likeliest tokens of a place among which its race is run; the filter leaves fewer."""
ROWS = 256
"""Places whose noise is made at once: [256, 152K] hashes of 8 bytes are 300 MiB."""
NEAR = 0.1
"""Nats by which a race may be lost to rounding in 16 bits."""
FAULTS = (0, 1, -1)
"""Places by which the noise is moved; 0 is the server's own."""
PROMPT = "{}\nPlease reason step by step, and put your final answer within \\boxed{{}}."


@dataclass(frozen=True)
class Answer:
    """One sample of one question, as token ids."""

    prompt: list[int]
    output: list[int]
    seed: int


def race_leads(logits: Tensor, tokens: Tensor, seed: int, first_position: int) -> Tensor:
    """Return by how much tokens lose their races.

    Args:
        logits: [T, V] f32, of the queries whose next tokens are drawn.
        tokens: [T] int, those that were served.
        first_position: of the first query.

    Returns:
        [T] f32, nats; 0 where the token wins among those that the filter keeps in any case,
        infinite where the filter drops it in any case.
    """
    num_rows, num_tokens = logits.shape
    logprobs = (logits / TEMPERATURE).log_softmax(-1)
    best, ids = logprobs.topk(min(CANDIDATES, num_tokens))
    before = best.exp().cumsum(-1) - best.exp()
    # Logits that are wrong by `NEAR` change the mass from a token on by this share of it, at most.
    is_sure, is_kept = (before <= TOP_P + (1 - TOP_P) * slack for slack in (-NEAR, NEAR))
    is_sure[:, 0] = True
    positions = first_position + torch.arange(num_rows, device=logits.device)
    noise = exponential_noise(hash_tokens(torch.full_like(positions, seed), positions, num_tokens))
    race = best - noise.gather(-1, ids).log()
    own = torch.where(is_kept & (ids == tokens[:, None]), race, -torch.inf).amax(-1)
    return (torch.where(is_sure, race, -torch.inf).amax(-1) - own).clamp(min=0)


def leads_by_fault(model: Any, answer: Answer) -> dict[int, Tensor]:
    """Return the leads of an answer's tokens by the places that the noise is moved, [T] each."""
    ids = torch.tensor([answer.prompt + answer.output], device=model.device)
    hidden = model.model(ids).last_hidden_state[0, len(answer.prompt) - 1 : -1]
    tokens = ids[0, len(answer.prompt) :]
    leads: dict[int, list[Tensor]] = {fault: [] for fault in FAULTS}
    for first in range(0, len(tokens), ROWS):
        logits = model.lm_head(hidden[first : first + ROWS]).float()
        place = len(answer.prompt) - 1 + first
        for fault, found in leads.items():
            given = tokens[first : first + ROWS], answer.seed, place + fault
            found.append(race_leads(logits, *given).cpu())
    return {fault: torch.cat(found) for fault, found in leads.items()}


def summary(leads: Sequence[Mapping[int, Tensor]]) -> dict[str, Any]:
    """Return the shares of tokens that lose their race, and lose it by more than rounding."""
    every = {fault: torch.cat([each[fault] for each in leads]) for fault in FAULTS}
    return {
        "tokens": len(every[0]),
        "lost": {fault: float((found > 0).float().mean()) for fault, found in every.items()},
        "not_near": {fault: float((found > NEAR).float().mean()) for fault, found in every.items()},
    }


@torch.inference_mode()
def check(files: Sequence[Path], folder: str, limit: int | None) -> dict[str, Any]:
    """Compare recorded answers with dense passes, and with those of the first file."""
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device).eval()
    found, first = {}, read_answers(files[0])
    for file in files:
        answers = read_answers(file)
        leads = [leads_by_fault(model, each) for each in answers[:limit]]
        equal = sum(one == other for one, other in zip(first, answers, strict=True))
        found[file.stem] = {"answers": len(answers), "equal_to_first": equal} | summary(leads)
    return found


def read_answers(file: Path) -> list[Answer]:
    """Return the answers of a file, by seed."""
    answers = [Answer(**json.loads(line)) for _, line, _ in complete_lines(file)]
    return sorted(answers, key=lambda each: each.seed)


async def ask(
    url: str, prompts: Sequence[list[int]], num_new: int, concurrency: int
) -> list[Answer]:
    """Ask a server for one sample of each prompt, whose number is the seed."""
    room = asyncio.Semaphore(concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=None, trust_env=False) as http:

        async def answer(seed: int, prompt: list[int]) -> Answer:
            sampling = {"temperature": TEMPERATURE, "top_p": TOP_P, "sampling_seed": seed}
            body = {"input_ids": prompt, "sampling_params": {**sampling, "max_new_tokens": num_new}}
            async with room:
                response = (await http.post("/generate", json=body)).raise_for_status()
            return Answer(prompt, response.json()["output_ids"], seed)

        return await asyncio.gather(*(answer(*each) for each in enumerate(prompts)))


def read_prompts(questions: Path, folder: str, limit: int | None, repeats: int) -> list[list[int]]:
    """Return the token ids of questions in the model's chat form, each several times."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for _, line, _ in complete_lines(questions)][:limit]
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": PROMPT.format(row["problem"])}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for row in rows
        for _ in range(repeats)
    ]


def main() -> None:
    """Ask a server, or check what it answered."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("command", choices=["ask", "check"])
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="answers, JSON lines")
    parser.add_argument("--model", required=True, help="the model's folder")
    parser.add_argument("--url", help="the server that `ask` asks")
    parser.add_argument("--questions", type=Path, help='JSON lines with "problem"')
    parser.add_argument("--limit", type=int, help="questions asked, or answers of a file checked")
    parser.add_argument("--samples", type=int, default=1, help="of each question")
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--concurrency", type=int, default=48)
    given = parser.parse_args()
    if given.command == "check":
        found = check(given.files, given.model, given.limit)
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
        return
    prompts = read_prompts(given.questions, given.model, given.limit, given.samples)
    answers = asyncio.run(ask(given.url, prompts, given.max_tokens, given.concurrency))
    (file,) = given.files
    file.write_text("".join(json.dumps(asdict(each)) + "\n" for each in answers))


if __name__ == "__main__":
    main()
