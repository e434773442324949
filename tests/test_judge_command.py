"""`k2rl judge` and `k2rl difficulty`, as they are called."""

from __future__ import annotations

import json

import msgspec
import pytest

from k2rl.cli import main
from k2rl.errors import ConfigError
from k2rl.evaluation import difficulty
from k2rl.evaluation.suite_episodes import EpisodeRecord
from k2rl.judging_command import JudgeOptions, read_episodes, rubric_of
from k2rl.types import Message, Task, Trajectory, Verdict
from tests.evaluation.chat_server import chat_server


def written(path, rows):
    path.write_bytes(b"\n".join(msgspec.json.encode(row) for row in rows) + b"\n")
    return str(path)


ROWS = [
    {"prompt": "1+1?", "response": "\\boxed{2}", "answer": "2", "label": 1},
    {"prompt": "1+2?", "response": "\\boxed{4}", "answer": "3", "label": 0},
    {"prompt": "1+3?", "response": "\\boxed{5}", "answer": "4", "label": True},
    {"prompt": "1+4?", "response": "\\boxed{5}", "answer": "5", "label": 0},
    {"prompt": "1+5?", "response": "\\boxed{6}", "label": 1},
]


def test_agreement_confusion_and_failures(tmp_path, capsys):
    file, out = written(tmp_path / "answers.jsonl", ROWS), tmp_path / "judged.jsonl"
    assert main(["judge", file, "reward=math", f"out={out}", "output=json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["episodes"], found["scored"], found["failed_share"]) == (5, 4, pytest.approx(0.2))
    assert found["confusion"] == {"right_right": 1, "right_wrong": 1, "wrong_right": 1, "wrong_wrong": 1}
    assert (found["agreement"], found["kappa"]) == (0.5, 0)
    assert "has no 'answer'" in next(iter(found["failures"]))
    # What is written can be judged again, against the first verdicts.
    assert main(["judge", str(out), "reward=numeric", "reward.place=boxed"]) == 0
    text = capsys.readouterr().out
    assert "4 of 5 episodes judged, failed 20.0%" in text
    assert "agreement with 4 labels: 100.0% (kappa 1.00)" in text


def test_trajectories_with_an_environments_reward(tmp_path, capsys):
    task = Task("t", "e", "k", "train", 0)
    made = [
        Trajectory(
            f"{i}", "g", task, 1.0, messages=[Message("assistant", "x")], env_reward=i, verdict=verdict
        )
        for i, verdict in enumerate([Verdict.scored(0.0), Verdict.scored(1.0), None])
    ]
    made[2].stop_reason, made[2].env_reward = "failed", 0
    assert main(["judge", written(tmp_path / "e.jsonl", made), "reward=env"]) == 0
    out = capsys.readouterr().out
    assert "2 of 3 episodes judged" in out
    assert "agreement with 2 labels: 100.0%" in out


def test_groups_are_compared_by_an_endpoint_and_its_cost_is_told(tmp_path, capsys):
    def reply(request):
        text = request["messages"][-1]["content"]
        token = text.rsplit("VERDICT ", 1)[1].split()[0]
        first = text.index("good") < text.index("bad")
        return f'VERDICT {token} {{"winner": "{"A" if first else "B"}"}}'

    rows = [{"prompt": "Go.", "response": r, "label": int(r == "good")} for r in ("bad", "good")]
    with chat_server(reply) as server:
        model = f'reward.model={{url: "{server.url}", name: j, prompt_price: 1000000}}'
        words = [written(tmp_path / "e.jsonl", rows), "reward=pairwise", "reward.rubrics=[]", model]
        rows[0]["rubric"] = [{"name": "good", "text": "Is it good?"}]
        words[0] = written(tmp_path / "e.jsonl", rows)
        assert main(["judge", *words]) == 0
    out = capsys.readouterr().out
    assert "agreement with 2 labels: 100.0%" in out
    assert "cost: 2 requests, 14 + 20 tokens, 14.0000" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "usage: k2rl judge FILE.jsonl"),
        (["FILE"], "usage"),
        (["FILE", "reward=nothing"], "unknown rubric 'nothing'"),
        (["FILE", "reward=math", "treshold=1"], "did you mean threshold=?"),
        (["FILE", "reward=math", "deadline_s=0"], "deadline_s"),
        (["FILE", "reward=math", "reward.plaice=boxed"], "unexpected keyword argument 'plaice'"),
        (["FILE", "reward=self_critique"], "asks the model of a run"),
        (["FILE", "reward=gone.yaml"], "No such file"),
        (["nowhere.jsonl", "reward=math"], "No such file"),
        (["BROKEN", "reward=math"], "line 2: "),
        (["EMPTY", "reward=math"], "has no episodes"),
        (["NOTHING", "reward=math"], "line 1: a row needs a text `response`"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(tmp_path, capsys, words, message):
    files = {
        "FILE": written(tmp_path / "a.jsonl", ROWS),
        "NOTHING": written(tmp_path / "n.jsonl", [{"prompt": "x"}]),
        "EMPTY": str(tmp_path / "empty.jsonl"),
        "BROKEN": str(tmp_path / "b.jsonl"),
    }
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "b.jsonl").write_text('{"response": "x"}\n{"response": \n')
    assert main(["judge", *(files.get(word, word) for word in words)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_where_nothing_can_be_judged_the_command_fails(tmp_path, capsys):
    assert main(["judge", written(tmp_path / "a.jsonl", ROWS[4:]), "reward=math"]) == 1
    assert "none of 1 episodes was judged" in capsys.readouterr().err


def test_a_file_of_a_rubric(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("id: exact\nkwargs: {place: whole}\n")
    rubric = rubric_of(JudgeOptions(reward=str(path), reward_values={"strict": "true"}))
    assert (rubric.place, rubric.strict) == ("whole", True)
    (tmp_path / "n.jsonl").write_text('{"response": "x", "label": "nan"}')
    with pytest.raises(ConfigError, match="line 1: its label is nan"):
        read_episodes(tmp_path / "n.jsonl")


# Difficulty -------------------------------------------------------------------------------------------


def records(**solved):
    return [
        EpisodeRecord(f"suite/{task}", "k", ("algebra",), i, reward)
        for task, rewards in solved.items()
        for i, reward in enumerate(rewards)
    ]


def test_tasks_that_teach_are_kept_with_their_difficulty(tmp_path, capsys):
    answers = records(
        never=[0, 0, 0, 0], always=[1, 1, 1, 1], some=[1, 0, 0, None], guess=[1, 0, 1, 0], lost=[None]
    )
    for folder, found in {"full": answers, "fast": records(some=[0, 0], guess=[1, 0])}.items():
        (tmp_path / folder).mkdir()
        written(tmp_path / folder / "episodes.jsonl", found)
    tasks = written(
        tmp_path / "tasks.jsonl", [{"id": t, "q": t} for t in ("never", "always", "some", "guess", "lost")]
    )
    words = [str(tmp_path / "full"), f"tasks={tasks}", f"out={tmp_path / 'new.jsonl'}", "k=1,2"]
    assert main(["difficulty", *words, f"guess={tmp_path / 'fast'}"]) == 0
    out = capsys.readouterr().out
    assert "dropped: 1 never solved, 1 always solved, 1 guessed, 1 not judged" in out
    rows = [json.loads(line) for line in (tmp_path / "new.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["some"]
    assert rows[0]["tags"] == ["algebra", "moderate"]
    assert rows[0]["difficulty"] == {
        "answers": 3, "solved": 1, "pass@1": pytest.approx(1 / 3), "pass@2": pytest.approx(2 / 3)
    }  # fmt: skip
    assert main(["difficulty", *words]) == 0
    assert len((tmp_path / "new.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "usage"),
        (["FOLDER"], "usage"),
        (["FOLDER", "out=x", "low=0.5", "high=0.5"], "must be below"),
        (["FOLDER", "out=x", "low=2"], "low"),
        (["FOLDER", "out=x", "k=one"], "no list of numbers"),
        (["FOLDER", "out=x", "tags=geometry", "tasks=TASKS"], "no task is left to write: 1 other tags"),
        (["nowhere", "out=x"], "no folder with results"),
    ],
)
def test_difficulty_refuses(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f").mkdir()
    written(tmp_path / "f" / "episodes.jsonl", records(some=[1, 0]))
    tasks = written(tmp_path / "tasks.jsonl", [{"id": "some"}])
    filled = [word.replace("FOLDER", str(tmp_path / "f")).replace("TASKS", tasks) for word in words]
    assert main(["difficulty", *filled]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_the_suite_of_an_evaluation_gives_the_tasks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", "suite=calculator", "model=null", "limit=4", "out=results"]) == 0
    lines = (tmp_path / "results" / "episodes.jsonl").read_bytes().splitlines()
    first = msgspec.json.decode(lines[0], type=EpisodeRecord)
    again = msgspec.structs.replace(first, sample=1, reward=1.0)
    written(tmp_path / "results" / "episodes.jsonl", [first, again])
    assert main(["difficulty", "results", "out=new.jsonl"]) == 0
    (row,) = [json.loads(line) for line in (tmp_path / "new.jsonl").read_text().splitlines()]
    assert row["id"] == first.task
    assert "moderate" in row["tags"]
    assert difficulty.profile([first, again])[first.task].share == 0.5
