"""TRL's side of the comparison, run by `trl_compare.py` in TRL's own environment; settings: see there."""

import sys
import tempfile
import time
from itertools import islice
from typing import Any, TextIO

import torch
import trl_task
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

STEPS = 10_000
"""More than anyone asks for: the driver ends the worker by closing its input."""


class TakeTurns(TrainerCallback):
    """Holds each step until the driver asks for it, and reports how long it took."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.samples = self.tokens = 0
        self.started = 0.0

    def reward(
        self, completions: list[Any], completion_ids: list[list[int]], answer: list[int], **_: Any
    ) -> list[float]:
        self.samples += len(completion_ids)
        self.tokens += sum(len(ids) for ids in completion_ids)
        texts = [completion[0]["content"] for completion in completions]
        return [trl_task.reward(text, number) for text, number in zip(texts, answer, strict=True)]

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        trl_task.say(self.stream, {"ready": True})

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if not sys.stdin.readline():
            sys.exit(0)
        self.samples = self.tokens = 0
        self.started = time.monotonic()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        seconds = time.monotonic() - self.started
        trl_task.say(self.stream, {"seconds": seconds, "samples": self.samples, "tokens": self.tokens})


def main() -> None:
    model_path, dtype, micro_batch = sys.argv[1], sys.argv[2], int(sys.argv[3])
    turns = TakeTurns(trl_task.protocol_stream())
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=getattr(torch, dtype))
    system = {"role": "system", "content": trl_task.SYSTEM}
    rows = [
        {"prompt": [system, {"role": "user", "content": question}], "answer": answer}
        for question, answer in islice(trl_task.problems(), 64 * trl_task.PROMPTS_PER_STEP)
    ]
    with tempfile.TemporaryDirectory() as scratch:
        settings = GRPOConfig(
            output_dir=scratch,
            use_cpu=True,
            bf16=False,  # the weights are in the dtype already: autocast on top only costs
            max_steps=STEPS,
            # Generated as one batch of all 64, trained on in parts: one pass over all took 12 GB.
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=trl_task.SAMPLES_PER_STEP // micro_batch,
            num_generations=trl_task.GROUP_SIZE,
            max_completion_length=trl_task.MAX_TOKENS,
            temperature=trl_task.TEMPERATURE,
            shuffle_dataset=False,
            learning_rate=trl_task.LEARNING_RATE,
            beta=0.0,
            gradient_checkpointing=False,
            eval_strategy="no",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=model,
            args=settings,
            reward_funcs=turns.reward,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[turns],
        )
        trainer.train()


if __name__ == "__main__":
    main()
