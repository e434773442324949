import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

import k2rl
from k2rl.config import TrackingConfig
from k2rl.evaluation.results import EvaluationResult, save_result, summarise
from k2rl.tracking import phases
from k2rl.tracking.report import main, write_report
from k2rl.tracking.report_charts import running_mean, step_bars
from k2rl.tracking.report_data import PHASE_COLORS, load_run
from k2rl.tracking.report_examples import MAX_CHARS, build_examples
from k2rl.tracking.tracker import Tracker
from k2rl.types import Message, ToolCall, Trajectory

MakeRun = Callable[..., Path]
Make = Callable[..., Trajectory]
VOID = {"meta", "br", "hr", "link", "img", "input"}


class Page(HTMLParser):
    """Checks that tags close in order, and collects the text that is shown."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.shown: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []
        self.text = re.sub(r"\s+", " ", " ".join(self.shown))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.shown.append(data)


def report(run: Path) -> Page:
    path = write_report(run)
    assert path == run / "report.html"
    html = path.read_text(encoding="utf-8")
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ET.fromstring(svg)
    return Page(html)


def test_a_whole_run_is_told_from_its_folder(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(tmp_path / "my-run", evaluations=("base", "before", "after"))
    text = report(run).text
    for part in (
        "model smollm2-135m environment calculator seed 7 folder my-run finished after 15 steps",
        "held-out reward, before RL → after RL 0.175 → 0.647",
        "+0.472 by RL alone 95 % interval [+0.354, +0.571]",
        "The interval leaves out zero",
        "The untouched model scores 0.025",
        "n = 119, 1 failed",
        "Reward over the run",
        "word_problem 0.100 n = 40 0.385 n = 39, 1 failed",
        "Log-prob gap, trainer against vLLM",
        "Cut at the token budget",
        "Sampling temperature",
        "Where the time went",
        "step 15",
        "What the model does",
        "2 of 96 episodes failed: sandbox died: out of memory",
        "optimizer: {name: muon",
        f"k2rl {k2rl.__version__}",
    ):
        assert part in text


def test_the_title_is_the_name_of_the_configuration_and_the_start(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(tmp_path / "0", steps=1)
    (title,) = re.findall(r"<h1>(.*)</h1>", write_report(run).read_text(encoding="utf-8"))
    assert re.fullmatch(r"calculator · \d{4}-\d\d-\d\d \d\d:\d\d", title)

    versions = run / "versions.json"
    versions.write_text(
        re.sub(r'"started": "[^"]*"', '"started": "2026-01-31T12:00:59+01:00"', versions.read_text())
    )
    with Tracker(run, TrackingConfig(live="off", tensorboard=False), 2, resume_step=1):
        pass
    assert "<h1>calculator · 2026-01-31 12:00</h1>" in write_report(run).read_text(encoding="utf-8")
    assert "<title>calculator · 2026-01-31 12:00 · k2rl</title>" in (run / "report.html").read_text(
        encoding="utf-8"
    )


def test_the_page_needs_nothing_but_itself(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(tmp_path / "run", evaluations=("before", "after"))
    page = report(run)
    html = (run / "report.html").read_text(encoding="utf-8")
    assert page.tags.isdisjoint({"script", "link", "img", "iframe", "object"})
    assert not re.search(r"https?://|url\(|@import|src=|href=", html)


@pytest.mark.parametrize(
    ("steps", "evaluations", "parts"),
    [
        (0, (), ["no evaluation yet", "not finished: 0 of 15 steps so far"]),
        (0, ("before",), ["held-out reward before RL", "0.175", "no gain to report"]),
        (1, ("before",), ["no gain to report", "not finished: 1 of 15 steps"]),
        (7, ("before",), ["before RL → after 5 steps", "by RL alone so far", "After 5 steps"]),
        (7, (), ["no evaluation yet", "Reward over the run"]),
    ],
)
def test_an_unfinished_run_has_a_report(
    tmp_path: Path, make_run: MakeRun, steps: int, evaluations: tuple[str, ...], parts: list[str]
) -> None:
    text = report(make_run(tmp_path / "run", steps=steps, evaluations=evaluations)).text
    for part in parts:
        assert part in text
    assert not re.search(r"\b(nan|None|inf|undefined)\b", text)


def test_phases_are_told_apart_and_steps_are_rows_of_their_own_phases(
    tmp_path: Path, make_run: MakeRun
) -> None:
    run = load_run(make_run(tmp_path / "run", evaluations=("base", "before", "after")))
    assert {phase.phase for phase in run.phases} <= set(phases.ALL)
    assert len(set(PHASE_COLORS.values())) == len(phases.ALL)
    titles = ET.fromstring(step_bars(run).svg).itertext()
    shown = {text.split(",")[0] for text in titles if ", step " in text}
    assert shown == {phases.ROLLOUT, phases.TRAIN, phases.PUBLISH}


def test_an_empty_folder_has_a_report(tmp_path: Path) -> None:
    text = report(tmp_path).text
    assert "no evaluation yet" in text
    assert f"k2rl run report {tmp_path.name} " in text


def test_a_change_within_the_noise_is_called_that(
    tmp_path: Path, evaluation: Callable[..., EvaluationResult]
) -> None:
    save_result(tmp_path, evaluation("before", 0, 0.5))
    save_result(tmp_path, evaluation("after", 9, 0.5))
    text = report(tmp_path).text
    assert "The interval includes zero: this may be noise." in text
    assert "leaves out zero" not in text


def test_an_evaluation_in_which_all_failed_makes_no_claim(tmp_path: Path, trajectory: Make) -> None:
    save_result(tmp_path, summarise("before", 0, [trajectory(reward=None)]))
    save_result(tmp_path, summarise("after", 9, [trajectory(reward=1.0)]))
    text = report(tmp_path).text
    assert "by RL alone" not in text
    assert "sandbox died: out of memory" in text


def test_nothing_the_model_wrote_becomes_markup(tmp_path: Path, trajectory: Make) -> None:
    attack = "<script>alert(1)</script><img src=x onerror=alert(2)>&\"'\x00\x1b[2J"
    run = tmp_path / "<i>run"
    nasty = trajectory(task=f"t{attack}", kind=f"k{attack}")
    call = ToolCall("functions.x:0", attack, {attack: attack})
    nasty.messages = [Message("user", attack), Message("assistant", attack, tool_calls=(call,))]
    with Tracker(run, TrackingConfig(live="off", tensorboard=False), 1) as tracker:
        (run / "config.yaml").write_text("name: '<script>x</script>'\n")
        with tracker.phase("<script>phase", 1):
            pass
        tracker.step(1, {"reward/mean": 0.5})
        tracker.note(attack)
        tracker.evaluation(summarise("before", 0, [nasty]))
        tracker.evaluation(summarise("after", 1, [nasty]))
    page = report(run)
    assert page.tags.isdisjoint({"script", "img", "i" * 2})
    assert page.text.count("<script>alert(1)</script>") >= 5
    html = (run / "report.html").read_bytes()
    assert b"\x00" not in html
    assert b"\x1b" not in html


def test_what_is_known_of_a_critic_is_shown_beside_the_reward(tmp_path: Path) -> None:
    with Tracker(tmp_path, TrackingConfig(live="off", tensorboard=False), 3) as tracker:
        for step in (1, 2, 3):
            agreement = {} if step == 2 else {"critic/agreement": 0.5 + step / 10}  # no pair was held out
            bias = {"critic/bias/praise": 0.25 - step / 8, "critic/bias/padding": 0.0}
            judges = {"reward/component/verifier": 0.1 * step, "reward/component/critic": 0.5}
            judges["critic/first_answers"] = 0.3
            tracker.step(
                step, {"reward/mean": 0.2 * step, "critic/trust": step / 3, **agreement, **bias, **judges}
            )
    html = write_report(tmp_path).read_text(encoding="utf-8")
    text = Page(html).text
    for part in ("Critic and verifier", "held-out pairs of the step", "share of its weight", "0.5 is chance"):
        assert part in text
    critic = text.split("The critic: reward and biases")[1].split("Health of the training")[0]
    assert "Bias probes of the critic" in critic
    assert "What critic and verifier give" in critic
    assert "over the steps" not in text.split("Critic and verifier")[1].split("Bias probes")[0]
    titles = [
        title
        for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL)
        for title in ET.fromstring(svg).itertext()
    ]
    for shown in (
        "held-out pairs of the step, step 3: 0.800",
        "share of its weight, step 3: 1.000",
        "praise, step 3: \u22120.125",
        "padding, step 1: 0.000",
        "verifier, step 2: 0.200",
        "the same critic, of the first step's answers, step 2: 0.300",
    ):
        assert shown in titles, titles


def test_metrics_that_were_not_numbers_leave_gaps(tmp_path: Path) -> None:
    with Tracker(tmp_path, TrackingConfig(live="off", tensorboard=False), 3) as tracker:
        for step, reward in ((1, 0.5), (2, float("nan")), (3, 0.7)):
            tracker.step(step, {"reward/mean": reward, "train/loss": float("inf")})
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert "Policy loss" not in html
    assert "nan" not in Page(html).text


def test_a_long_run_stays_readable(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(tmp_path / "run", steps=130, total=130)
    text = report(run).text
    assert "Every 4 steps." in text
    html = (run / "report.html").read_text(encoding="utf-8")
    assert ">step 5</text>" in html
    assert ">step 2</text>" not in html
    assert "and its mean over 5 steps" in text
    assert "The whole run" not in text


def results(trajectory: Make, outcomes: dict[str, tuple[float | None, float | None]]) -> list:  # type: ignore[type-arg]
    before = summarise(
        "before", 0, [trajectory(f"b{t}", pair[0], task=t) for t, pair in outcomes.items()], 99
    )
    after = summarise("after", 9, [trajectory(f"a{t}", pair[1], task=t) for t, pair in outcomes.items()], 99)
    return [("before RL", "c-before", before), ("after RL", "c-after", after)]


def test_examples_take_turns_through_the_outcomes(trajectory: Make) -> None:
    outcomes = {f"up{n}": (0.0, 1.0) for n in range(5)}
    outcomes |= {"down": (1.0, 0.0), "same": (1.0, 1.0), "lost": (1.0, None)}
    examples = build_examples(results(trajectory, outcomes), 5)
    assert [(e.task, e.outcome) for e in examples.shown] == [
        ("up0", "improved"),
        ("down", "got worse"),
        ("same", "unchanged"),
        ("lost", "not comparable"),
        ("up1", "improved"),
    ]
    assert examples.kept == 8
    assert examples.tally == {"improved": 5, "got worse": 1, "unchanged": 1, "not comparable": 1}


def test_an_example_shows_the_task_once_and_both_answers(trajectory: Make) -> None:
    examples = build_examples(results(trajectory, {"t": (0.0, 1.0)}), 3)
    (example,) = examples.shown
    assert [bubble.role for bubble in (*examples.system, *example.prompt)] == ["system", "user"]
    before, after = example.sides
    assert [bubble.role for bubble in before.bubbles] == ["assistant", "tool", "assistant"]
    assert (before.score, before.good, after.score, after.good) == ("0.00", False, "1.00", True)
    assert after.bubbles[-1].text.startswith("The answer is")


def test_only_tasks_of_both_evaluations_are_compared(trajectory: Make) -> None:
    before, after = results(trajectory, {"a": (0.0, 1.0), "b": (0.0, 1.0)})
    other = summarise("after", 9, [trajectory("x", 1.0, task="a"), trajectory("y", 1.0, task="z")])
    assert [e.task for e in build_examples([before, (*after[:2], other)], 9).shown] == ["a"]


def test_long_messages_are_cut_and_say_so(trajectory: Make) -> None:
    wordy = trajectory()
    wordy.messages = [Message("assistant", "x" * (MAX_CHARS + 7))]
    (example,) = build_examples([("after", "c-after", summarise("after", 1, [wordy]))], 1).shown
    assert (len(example.sides[0].bubbles[0].text), example.sides[0].bubbles[0].omitted) == (MAX_CHARS, 7)


def test_running_mean_looks_back_only() -> None:
    assert running_mean([(1, 1.0), (2, 3.0), (3, 5.0)], window=2) == [(1, 1.0), (2, 2.0), (3, 4.0)]


def test_the_command_writes_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    assert main([str(tmp_path / "missing")]) == 2
    assert "usage:" in capsys.readouterr().err


def test_tracking_and_report_do_not_import_torch() -> None:
    code = (
        "import sys, k2rl.tracking.report, k2rl.tracking.tracker; "
        "sys.exit(bool({'torch', 'ray', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    root = Path(k2rl.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
