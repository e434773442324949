"""`k2rl sft` without Ray and torch: what it refuses, what it holds out, and that a stopped run goes on."""

from __future__ import annotations

import json
import signal
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from k2rl import composition, sft
from k2rl.cli import main
from k2rl.lifecycle import Interrupted
from k2rl.models.hub import shapes_fingerprint
from k2rl.tracking.metrics import read_metrics
from k2rl.tracking.summary import summarise_run
from k2rl.tracking.tracker import Tracker
from k2rl.training.batch import SupervisedSequence
from k2rl.training.checkpoint import FORMAT, About, checkpoints
from k2rl.training.supervised import Corpus, held_out_of
from tests.lifecycle.conftest import WARM_START_GAIN, FakeWorker, Trouble, interrupt


def chat(question: str, answer: str = "Yes.") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    return write(tmp_path / "chats.jsonl", [chat(f"Is {number} a number?") for number in range(10)])


def config_of(path: Path, *overrides: str) -> Any:
    return composition.compose(["experiment=tiny", f"data.path={path}", *overrides])


BAD = {
    "no data": ([], "needs data.path="),
    "no file": (["data.path=/nowhere.jsonl"], "data.path=/nowhere.jsonl is not a file"),
    "empty": (["data.path=empty.jsonl"], "empty.jsonl: no chats"),
    "no chat": (["data.path=user.jsonl"], "user.jsonl:1: roles must be"),
    "an empty answer": (["data.path=silent.jsonl"], "the assistant message is empty"),
    "too long": (
        ["data.path=chats.jsonl", "train.micro_batch_tokens=9"],
        "are more than train.micro_batch_tokens=9",
    ),
    "one chat": (["data.path=one.jsonl"], "none can be held out"),
    "an overlap": (["data.path=chats.jsonl", "data.held_out=one.jsonl"], "says the same"),
    "rollouts": (["data.path=chats.jsonl", "debug=rollout_only"], "`k2rl sft` has none"),
    "a long warm-up": (
        ["data.path=chats.jsonl", "sft.schedule.warmup_steps=3"],
        "is more than there are steps (2)",
    ),
    "out of bounds": (["data.path=chats.jsonl", "data.held_out_share=1"], "data.held_out_share=1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(
    case: str,
    chats: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    overrides, expected = BAD[case]
    write(tmp_path / "empty.jsonl", [])
    write(tmp_path / "user.jsonl", [{"messages": [{"role": "user", "content": "Hi"}]}])
    write(tmp_path / "silent.jsonl", [chat("Hi", " ")])
    write(tmp_path / "one.jsonl", [chat("Is 3 a number?")])
    monkeypatch.chdir(tmp_path)
    assert main(["sft", "experiment=tiny", *overrides]) == 2
    error = capsys.readouterr().err.strip()
    assert expected in error
    assert error.startswith("k2rl: ")
    assert "\n" not in error
    assert not (tmp_path / "outputs").exists()


def test_a_run_of_rl_takes_no_chats(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "experiment=tiny", "data.path=curated"]) == 2
    assert "is what `k2rl sft` imitates" in capsys.readouterr().err


def test_a_share_of_the_chats_is_held_out_whatever_their_order(chats: Path, tmp_path: Path) -> None:
    texts = sft.prepare(config_of(chats, "data.held_out_share=0.3"))
    assert (len(texts.train), len(texts.held_out)) == (7, 3)
    backwards = tmp_path / "backwards.jsonl"
    backwards.write_text("".join(reversed(chats.read_text().splitlines(keepends=True))))
    again = sft.prepare(config_of(backwards, "data.held_out_share=0.3"))
    assert {s.token_ids for s in again.held_out} == {s.token_ids for s in texts.held_out}
    assert not sft.prepare(config_of(chats, "data.held_out_share=0")).held_out


def test_equal_chats_are_on_the_same_side() -> None:
    texts = [
        SupervisedSequence((1, word), (False, True), str(number))
        for number, word in enumerate([2, 3, 2, 3, 3])
    ]
    train, held_out = held_out_of(texts, 0.5)
    assert {text.token_ids for text in train}.isdisjoint(text.token_ids for text in held_out)
    assert len(train) + len(held_out) == 5


def test_a_corpus_gives_every_text_once_a_pass_and_the_same_to_the_same_step() -> None:
    texts = [SupervisedSequence((1, word), (False, True)) for word in range(6)]
    corpus = Corpus(texts, 4, seed=1)
    seen = [text for step in (1, 2, 3) for text in corpus.sample(step)]
    assert set(seen[:6]) == set(seen[6:]) == set(texts)
    assert Corpus(texts, 4, seed=1).sample(3) == corpus.sample(3)


class Story:
    """Starts of one run, with a worker whose weights are one number."""

    def __init__(self, texts: sft.Texts, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._texts, self.run_dir, self._monkeypatch = texts, run_dir, monkeypatch

    def play(self, trouble: dict[str, Trouble] | None = None, resume: bool = False) -> FakeWorker:
        config = self._texts.config
        config.resume = str(self.run_dir) if resume else None
        shapes = shapes_fingerprint(self._texts.model_path)
        self.worker = FakeWorker(About(FORMAT, {}, "muon", "tiny", shapes), dict(trouble or {}))

        @asynccontextmanager
        async def started_workers(*arguments: Any) -> AsyncIterator[Any]:
            with Tracker(self.run_dir, config.tracking, config.train.steps, arguments[3]) as tracker:
                yield tracker, self.worker

        self._monkeypatch.setattr(sft, "started_workers", started_workers)
        sft.execute(self._texts, self.run_dir, lambda: None)
        return self.worker


@pytest.fixture
def story(chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Story]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    overrides = ["train.steps=3", "train.checkpoint_every=1", "train.eval_every=2", "tracking.live=off"]
    config = config_of(chats, *overrides, "tracking.tensorboard=false", "recovery.max_restarts=0")
    yield Story(sft.prepare(config), tmp_path / "run", monkeypatch)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_run_scores_the_held_out_chats_before_between_and_after(story: Story) -> None:
    worker = story.play()
    assert [call for call in worker.calls if "save" not in call] == [
        *("nll 1", "sft_step 1", "sft_step 2", "nll 2", "sft_step 3", "nll 3")
    ]
    rows = read_metrics(story.run_dir)
    assert [(row["step"], "eval/nll" in row) for row in rows] == [(0, True), (1, False), (2, True), (3, True)]
    summary = summarise_run(story.run_dir)
    assert (summary.nll_before, summary.nll_after) == (1.0, 1 / (1 + 3 * WARM_START_GAIN))
    assert (story.run_dir / "model" / "weights").exists()


@pytest.mark.parametrize("call", ["sft_step 1", "sft_step 2", "save 2", "saved 2", "nll 2", "sft_step 3"])
def test_a_stopped_run_goes_on_to_the_same_end(story: Story, call: str) -> None:
    with pytest.raises(Interrupted, match=f"k2rl sft resume={story.run_dir}"):
        story.play({call: interrupt})
    ((step, _), *_) = reversed(checkpoints(story.run_dir))
    worker = story.play(resume=True)
    assert worker.calls.count("load 1") == 1
    assert worker.weights == 3 * WARM_START_GAIN
    assert [row["step"] for row in read_metrics(story.run_dir)] == [0, 1, 2, 3]
    assert sum(call.startswith("sft_step") for call in worker.calls) == 3 - step


def test_stopped_before_its_first_step_it_leaves_nothing_to_resume(story: Story) -> None:
    with pytest.raises(Interrupted, match="nothing to resume"):
        story.play({"nll 1": interrupt})
    assert not checkpoints(story.run_dir)
