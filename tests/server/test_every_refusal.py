"""Each refusal through SGLang's own parser and the real plugin: refused, named, no traceback."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from lim_sglang.compat import CPU_ENGINE_VAR

SCRIPT = Path(__file__).parent / "refuse_in_process.py"
PLAIN_MODEL = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "num_hidden_layers": 8,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
    "max_position_embeddings": 4096,
}
SLIDING_MODEL = PLAIN_MODEL | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "sliding_window": 1024,
}
MLA_MODEL = PLAIN_MODEL | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "kv_lora_rank": 16,
}
HYBRID_MODEL = PLAIN_MODEL | {"layer_types": ["full_attention", "sliding_attention"] * 4}


@dataclass(frozen=True)
class Start:
    """A command line, and the words that its message must hold; none where it is served."""

    options: tuple[str, ...]
    words: tuple[str, ...] = ()
    model: str = "plain"
    backend: tuple[str, ...] = ("--attention-backend", "lim")


STARTS = {
    "plain": Start(()),
    "full": Start(("--lim-policy", "full")),
    "prefill-elsewhere": Start(
        (),
        backend=(
            *("--prefill-attention-backend", "torch_native"),
            *("--decode-attention-backend", "lim"),
        ),
    ),
    "tp": Start(("--tp-size", "2"), ("--tp-size 2",)),
    "dp-attention": Start(
        ("--tp-size", "2", "--dp-size", "2", "--enable-dp-attention"),
        ("--tp-size 2", "--enable-dp-attention"),
    ),
    "dcp": Start(("--dcp-size", "2"), ("--dcp-size 2",)),
    "attn-cp": Start(("--attn-cp-size", "2"), ("--attn-cp-size 2",)),
    "prefill-cp": Start(("--enable-prefill-cp",), ("--enable-prefill-cp",)),
    "three-at-once": Start(
        ("--enable-mixed-chunk", "--pp-size", "2", "--enable-deterministic-inference"),
        ("--enable-mixed-chunk", "--pp-size 2", "--enable-deterministic-inference"),
    ),
    "speculative": Start(
        ("--speculative-algorithm", "EAGLE", "--enable-mixed-chunk"),
        ("--speculative-algorithm EAGLE", "--enable-mixed-chunk"),
    ),
    "two-batch": Start(("--enable-two-batch-overlap",), ("--enable-two-batch-overlap",)),
    "pdmux": Start(("--enable-pdmux",), ("--enable-pdmux",)),
    "disaggregation": Start(("--disaggregation-mode", "prefill"), ("--disaggregation-mode",)),
    "compile": Start(("--enable-torch-compile",), ("--enable-torch-compile",)),
    "graph": Start(("--cuda-graph-backend-decode", "breakable"), ("--cuda-graph-backend-decode",)),
    "graph-json": Start(
        ("--cuda-graph-config", '{"decode": {"backend": "breakable"}}'), ("--cuda-graph-config",)
    ),
    "graph-debug": Start(("--debug-cuda-graph",), ("--debug-cuda-graph",)),
    "mis": Start(("--enable-mis",), ("--enable-mis",)),
    "hisparse": Start(("--enable-hisparse",), ("--enable-hisparse",)),
    "dllm": Start(("--dllm-algorithm", "LowConfidence"), ("--dllm-algorithm",)),
    "embedding": Start(("--is-embedding",), ("--is-embedding",)),
    "encoder": Start(("--encoder-only",), ("--encoder-only",)),
    "language": Start(("--language-only",), ("--language-only",)),
    "no-cache": Start(("--prefill-only-disable-kv-cache",), ("--prefill-only-disable-kv-cache",)),
    "fp4": Start(("--kv-cache-dtype", "fp4_e2m1"), ("--kv-cache-dtype fp4_e2m1",)),
    "scaled-cache": Start(("--kv-cache-dtype", "mxfp8"), ("--kv-cache-dtype mxfp8",)),
    "pages": Start(("--page-size", "16"), ("--page-size 16",)),
    "sliding": Start((), ("sliding-window",), model="sliding"),
    "mla": Start((), ("MLA",), model="mla"),
    "hybrid": Start((), ("sliding-window",), model="hybrid"),
    "option-and-model": Start(("--enable-mixed-chunk",), ("mixed-chunk", "MLA"), model="mla"),
    "layer-beyond": Start(("--lim-select-layers", "2,8"), ("layer 8", "0 to 7")),
    "bad-budget": Start(("--lim-budget", "0"), ("budget must be",)),
    "bad-json": Start(("--lim-config", '{"bugdet": 1}'), ("'bugdet'", "known settings")),
    "flag-without-backend": Start(
        ("--lim-budget", "9"), ("--lim-budget", "--attention-backend lim"), backend=()
    ),
    "prefill-only": Start(
        (),
        ("--prefill-attention-backend lim",),
        backend=(
            *("--prefill-attention-backend", "lim"),
            *("--decode-attention-backend", "torch_native"),
        ),
    ),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """What every start said, from one process with the plugin in it."""
    folder = tmp_path_factory.mktemp("models")
    models = {
        "plain": PLAIN_MODEL,
        "sliding": SLIDING_MODEL,
        "mla": MLA_MODEL,
        "hybrid": HYBRID_MODEL,
    }
    for name, config in models.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    lines = [
        [
            *("--model-path", str(folder / start.model), "--device", "cpu"),
            *("--skip-tokenizer-init", *start.backend, *start.options),
        ]
        for start in STARTS.values()
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("LIM_", "SGLANG_"))}
    environment |= {CPU_ENGINE_VAR: "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        input=json.dumps(lines),
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(STARTS, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.e2e
@pytest.mark.parametrize("name", STARTS)
def test_a_start_is_refused_or_served_in_words(
    outcomes: dict[str, dict[str, object]], name: str
) -> None:
    words, message = STARTS[name].words, str(outcomes[name]["message"])
    assert outcomes[name]["code"] == (2 if words else 0), message
    assert "Traceback" not in message
    assert not [word for word in words if word not in message], message
