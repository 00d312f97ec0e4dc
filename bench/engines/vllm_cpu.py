"""vLLM's CPU build, in bf16: its own latent cache, its own scheduler, one step a call."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Mapping
from importlib import import_module
from typing import Any

NEEDS = {"vllm": ("vllm",)}
CHUNK = 512
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # steps run in this process, where they are timed
    "VLLM_CPU_KVCACHE_SPACE": "2",  # GB
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


class Engine:
    """Loads the checkpoint; decoded tokens are its own, the likeliest."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        os.environ.update(SETTINGS)
        vllm: Any = import_module("vllm")
        torch: Any = import_module("torch")
        start = time.perf_counter()
        self.engine = vllm.LLM(
            model=options["folder"],
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=options["max_context"],
            max_num_seqs=options["max_batch"],
            max_num_batched_tokens=CHUNK,
            enable_prefix_caching=False,
        ).llm_engine
        self.load_seconds = time.perf_counter() - start
        self.units = f"{vllm.__version__}, torch {torch.backends.cpu.get_cpu_capability()}"
        self.asked, self.vocabulary = vllm.SamplingParams, int(options["vocabulary"])
        self.random = random.Random(0)
        self.live: list[str] = []
        self.count = 0

    def add(self, batch: int, tokens: int, wanted: int) -> None:
        """Prompts of random tokens that are to be followed by so many; those before end."""
        self.engine.abort_request(self.live)
        told = self.asked(max_tokens=wanted, ignore_eos=True, temperature=0.0, detokenize=False)
        self.live = [str(self.count + i) for i in range(batch)]
        self.count += batch
        for name in self.live:
            ids = [self.random.randrange(3, self.vocabulary) for _ in range(tokens)]
            self.engine.add_request(name, {"prompt_token_ids": ids}, told)

    def fill(self) -> float:
        """Seconds of steps until every prompt has its first token."""
        seconds, begun = 0.0, set[str]()
        while len(begun) < len(self.live):
            start = time.perf_counter()
            found = self.engine.step()
            seconds += time.perf_counter() - start
            begun |= {each.request_id for each in found if each.outputs[0].token_ids}
        return seconds

    def prefill(self, batch: int, tokens: int) -> float:
        """Seconds of a prompt into empty caches."""
        self.add(batch, tokens, 1)
        return self.fill()

    def start(self, batch: int, context: int, room: int) -> None:
        """Fill the caches."""
        self.add(batch, context, room)
        self.fill()

    def steps(self, count: int) -> list[float]:
        """Seconds of decode steps."""
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            self.engine.step()
            seconds.append(time.perf_counter() - start)
        return seconds
