from pathlib import Path

import pytest

from k2rl.errors import RunError
from k2rl.evaluation.results import load_result, load_results, rewind_results, save_result, summarise
from k2rl.evaluation.stats import wilson_interval
from k2rl.types import Message, Segment, Task, Trajectory, Verdict


def episode(task: str, reward: float | None, kind: str = "add", name: str = "") -> Trajectory:
    """An episode of 4 sampled tokens (12 if it failed)."""
    count = 4 if reward is not None else 12
    return Trajectory(
        id=name or f"e-{task}",
        group_id=task,
        task=Task(id=task, env="calculator", kind=kind, split="eval", seed=0),
        temperature=1.0,
        segments=[Segment((1,), sampled=False), Segment((2,) * count, True, (-0.5,) * count, 0)],
        stop_reason="env_done" if reward is not None else "failed",
        verdict=Verdict.scored(reward) if reward is not None else Verdict.failed("judge timed out"),
    )


def test_a_failed_episode_is_counted_but_is_not_a_zero() -> None:
    result = summarise("before", 0, [episode("a", 1.0), episode("b", 0.0), episode("c", None)])
    assert (result.reward, result.n, result.failed) == (0.5, 2, 1)
    assert result.ci95 == wilson_interval(1, 2)
    assert result.mean_tokens == 4.0


def test_an_episode_with_a_failed_verdict_alone_is_a_failure_too() -> None:
    broken = episode("a", 1.0)
    broken.verdict = Verdict.failed("rubric raised")
    assert summarise("before", 0, [broken, episode("b", 1.0)]).failed == 1


def test_an_unjudged_episode_is_an_error() -> None:
    unjudged = episode("a", 1.0)
    unjudged.verdict = None
    with pytest.raises(ValueError, match="e-a has no score"):
        summarise("before", 0, [unjudged])


def test_kinds_are_scored_apart() -> None:
    result = summarise(
        "after",
        3,
        [episode("a", 1.0), episode("b", 0.0, "mul"), episode("c", 1.0, "mul"), episode("d", None, "x")],
    )
    assert list(result.per_kind) == ["add", "mul", "x"]
    assert (result.per_kind["mul"].reward, result.per_kind["mul"].n) == (0.5, 2)
    assert (result.per_kind["x"].reward, result.per_kind["x"].failed) == (None, 1)
    assert result.metrics["eval/reward/mul"] == 0.5
    assert "eval/reward/x" not in result.metrics


def test_when_all_failed_there_is_no_reward() -> None:
    result = summarise("before", 0, [episode("a", None)])
    assert (result.reward, result.ci95, result.n, result.failed) == (None, None, 0, 1)
    assert result.estimate is None
    assert "eval/reward" not in result.metrics


def test_examples_are_chosen_by_task_and_not_by_outcome() -> None:
    tasks = [(f"{kind}{n}", kind) for kind in ("add", "mul") for n in range(5)]
    before = summarise("before", 0, [episode(task, 0.0, kind) for task, kind in tasks], max_examples=4)
    after = summarise(
        "after", 9, [episode(task, 1.0, kind) for task, kind in reversed(tasks)], max_examples=4
    )
    chosen = [example.task.id for example in before.examples]
    assert chosen == ["add0", "mul0", "add1", "mul1"]
    assert [example.task.id for example in after.examples] == chosen


def test_several_episodes_of_a_task_give_one_example() -> None:
    result = summarise("x", 0, [episode("a", 0.0, name="e2"), episode("a", 1.0, name="e1")])
    assert [example.id for example in result.examples] == ["e1"]


def test_a_saved_result_comes_back_whole(tmp_path: Path) -> None:
    result = summarise("after", 7, [episode("a", 1.0), episode("b", 0.25), episode("c", None)])
    path = save_result(tmp_path, result)
    assert path == tmp_path / "evaluations" / "after.json"
    assert load_result(path) == result
    assert [file.name for file in path.parent.iterdir()] == ["after.json"]


def test_text_that_is_not_valid_unicode_does_not_stop_a_run(tmp_path: Path) -> None:
    odd = episode("a", 1.0)
    odd.messages = [Message("tool", "caf\udce9 漢字 🙂")]
    (example,) = load_result(save_result(tmp_path, summarise("after", 7, [odd]))).examples
    assert example.messages[0].content == "caf? 漢字 🙂"


def test_a_log_prob_that_is_not_a_number_is_not_saved(tmp_path: Path) -> None:
    broken = episode("a", 1.0)
    broken.segments = [Segment((1,), True, (float("nan"),), 0)]
    with pytest.raises(ValueError, match="JSON compliant"):
        save_result(tmp_path, summarise("after", 7, [broken]))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "after.json"
    path.write_text('{"name": "after"')
    with pytest.raises(RunError, match=r"after\.json is not a saved evaluation"):
        load_result(path)


def test_results_come_in_the_order_of_the_run(tmp_path: Path) -> None:
    for name, step in [("after", 10), ("step_10", 10), ("step_5", 5), ("before", 0), ("base", 0)]:
        save_result(tmp_path, summarise(name, step, [episode("a", 1.0)]))
    assert list(load_results(tmp_path)) == ["base", "before", "step_5", "step_10", "after"]


def test_a_resumed_run_keeps_what_it_had_done_by_then(tmp_path: Path) -> None:
    for name, step in [("before", 0), ("step_5", 5), ("after", 8)]:
        save_result(tmp_path, summarise(name, step, [episode("a", 1.0)]))
    rewind_results(tmp_path, 5)
    assert list(load_results(tmp_path)) == ["before", "step_5"]


def test_a_run_that_goes_on_after_its_end_keeps_that_end_as_a_step(tmp_path: Path) -> None:
    for name, step in [("before", 0), ("after", 8)]:
        save_result(tmp_path, summarise(name, step, [episode("a", 1.0)]))
    rewind_results(tmp_path, 8)
    results = load_results(tmp_path)
    assert list(results) == ["before", "step_8"]
    assert results["step_8"].step == 8
