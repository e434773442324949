"""How often vLLM and the trainer send a token to other experts, and how far their log-probs are apart for it.

    python benchmarks/router_mismatch.py [--model k2-mini] [--dtypes float32 bfloat16] [--prompts 16]

vLLM samples; each of its routers tells what it has chosen (in the worker: vLLM itself hands choices out with
Model Runner V2 alone, which needs Triton, which a CPU has not). Then plain transformers computes the same
tokens twice, once with its own choices and once with vLLM's, and log-probs are compared.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from pathlib import Path
from typing import Any

PROMPT_TOKENS, SAMPLED_TOKENS = 40, 40


class Chosen:
    """Mixed into vLLM's worker (`worker_extension_cls`)."""

    model_runner: Any

    def listen(self) -> None:
        """Note from now on which experts each router chooses: [(layer, [tokens, experts])]."""
        from vllm.model_executor.layers.fused_moe.layer import MoERunner

        self._chosen: list[tuple[int, list[list[int]]]] = []
        for module in self.model_runner.get_model().modules():
            if isinstance(module, MoERunner):
                number = module.layer_id
                module.router.set_capture_fn(
                    lambda ids, number=number: self._chosen.append((number, ids.tolist()))
                )

    def heard(self) -> list[tuple[int, list[list[int]]]]:
        return self._chosen


class Routers:
    """The routers of a transformers model, which choose what they are told to."""

    def __init__(self, model: Any, layers: list[int]) -> None:
        self.own: dict[int, Any] = {}
        self.told: dict[int, Any] = {}
        for layer in layers:
            model.model.layers[layer].mlp.gate.register_forward_hook(self._hook(layer))

    def _hook(self, layer: int) -> Any:
        def hook(router: Any, arguments: Any, output: Any) -> Any:
            logits, weights, self.own[layer] = output
            if layer not in self.told:
                return None
            chosen = self.told[layer]
            scores = logits.sigmoid().gather(1, chosen)
            if router.norm_topk_prob:
                scores = scores / (scores.sum(-1, keepdim=True) + 1e-20)
            return logits, (scores * router.routed_scaling_factor).to(weights.dtype), chosen

        return hook


def measure(path: Path, dtype: str, prompts: list[list[int]]) -> None:
    import torch
    from transformers import AutoModelForCausalLM
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    engine = LLM(
        str(path),
        dtype=dtype,
        worker_cls="k2rl.inference.vllm_worker.ColocatedVLLMWorker",
        worker_extension_cls="router_mismatch.Chosen",
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        enable_chunked_prefill=False,
        max_model_len=PROMPT_TOKENS + SAMPLED_TOKENS,
        max_num_seqs=1,
        kv_cache_memory_bytes=2**26,
    )
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    sampling = SamplingParams(
        temperature=1.0, seed=1, max_tokens=SAMPLED_TOKENS, logprobs=0, detokenize=False, ignore_eos=True
    )
    routers: Routers | None = None
    differ, gaps = [], {"own": [], "vLLM's": []}
    for prompt in prompts:
        engine.collective_rpc("listen")
        (output,) = engine.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        ids = list(output.outputs[0].token_ids)
        behaviour = torch.tensor(
            [at[token].logprob for at, token in zip(output.outputs[0].logprobs, ids, strict=True)]
        )
        (heard,) = engine.collective_rpc("heard")
        layers = sorted({layer for layer, _ in heard})
        theirs = {
            layer: torch.tensor([row for number, rows in heard if number == layer for row in rows])
            for layer in layers
        }
        routers = routers or Routers(model, layers)
        for name, told in (("own", {}), ("vLLM's", theirs)):
            routers.told = told
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *ids[:-1]]])).logits[0, len(prompt) - 1 :].float()
            ours = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
            gaps[name].append((ours - behaviour).abs())
            if not told:
                same = [(routers.own[n].sort(-1)[0] == theirs[n].sort(-1)[0]).all(-1) for n in layers]
                differ.append(~torch.stack(same, 1))
    choices = torch.cat(differ)
    sys.stdout.write(
        f"{dtype}: {len(choices)} tokens; other experts in {float(choices.float().mean()):.2%} of a layer's "
        f"choices, {float(choices.any(1).float().mean()):.2%} of tokens\n"
    )
    for name, parts in gaps.items():
        gap = torch.cat(parts)
        sys.stdout.write(
            f"  log-prob gap with {name} choices: mean {float(gap.mean()):.1e}, max {float(gap.max()):.1e}\n"
        )
    sys.stdout.flush()
    engine.llm_engine.engine_core.shutdown()
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="k2-mini")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--prompts", type=int, default=16)
    options = parser.parse_args()
    from k2rl.models.hub import resolve_model

    path = resolve_model(options.model)
    import torch
    from transformers import AutoConfig

    vocabulary = AutoConfig.from_pretrained(path).vocab_size
    torch.manual_seed(0)
    prompts = [torch.randint(3, vocabulary, (PROMPT_TOKENS,)).tolist() for _ in range(options.prompts)]
    for dtype in options.dtypes:
        measure(path, dtype, prompts)


if __name__ == "__main__":
    # One process: what the workers say is handed over as it is.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    main()
