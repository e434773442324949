import signal
import subprocess
import sys

import gymnasium
import pytest

import envs
from envs.calculator import CalculatorEnv
from k2rl import cli
from k2rl.errors import ConfigError
from rubrics import EnvironmentReward

MODULE = '''
from envs.calculator import CalculatorEnv

class HardCalculator(CalculatorEnv):
    """Only products."""

    rubric = "strict"
'''


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """An installed distribution with one environment."""
    (tmp_path / "plugged_envs.py").write_text(MODULE)
    info = tmp_path / "acme-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[k2rl.envs]\nhard = plugged_envs:HardCalculator\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("plugged_envs", None)


def test_built_in_environments():
    env = envs.make("calculator", max_calls=3)
    assert isinstance(env, CalculatorEnv)
    assert env.max_calls == 3
    assert envs.resolve("calculator") is CalculatorEnv
    assert envs.available()["calculator"].startswith("Word problems, easy to hard")
    assert type(envs.make("envs.calculator:CalculatorEnv")) is CalculatorEnv


def test_an_environment_from_an_installed_package(plugin):
    assert type(envs.make("hard")).__name__ == "HardCalculator"
    assert envs.available()["hard"] == "Only products."


def test_a_plugin_that_fails_is_named_with_its_traceback(plugin, tmp_path, capsys):
    (tmp_path / "plugged_envs.py").write_text("def load():\n    return {}['prices']\n\nload()\n")
    with pytest.raises(ConfigError, match="cannot import plugged_envs") as caught:
        envs.make("hard")
    (note,) = caught.value.__notes__
    assert note.startswith("Traceback of the plug-in")
    assert 'plugged_envs.py", line 2, in load' in note
    assert "importlib" not in note
    assert note.endswith("KeyError: 'prices'")
    assert cli.main(["envs", "list"]) == 0
    said = capsys.readouterr()
    assert "hard                 cannot be loaded: environment 'plugged_envs:HardCalculator'" in said.out
    assert "hard: Traceback of the plug-in" in said.err
    assert cli.main(["envs", "check", "hard"]) == 2
    assert "KeyError: 'prices'" in capsys.readouterr().err


def test_a_plugin_that_crashes_the_process_is_seen_in_its_stack(tmp_path):
    (tmp_path / "crashing.py").write_text("import signal\nsignal.raise_signal(signal.SIGSEGV)\n")
    command = [sys.executable, "-m", "k2rl.cli", "envs", "check", "crashing:Env"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGSEGV
    assert "Segmentation fault" in done.stderr
    assert 'crashing.py", line 2' in done.stderr


def test_a_module_that_is_not_there_needs_no_traceback():
    with pytest.raises(ConfigError, match="is it installed") as caught:
        envs.make("nowhere.at_all:Env")
    assert not hasattr(caught.value, "__notes__")


def test_ids_of_gymnasium(tmp_path, monkeypatch):
    (tmp_path / "registering.py").write_text(
        "import gymnasium\nfrom envs.calculator import CalculatorEnv\n"
        "gymnasium.register('shop/Sums-v1', entry_point=CalculatorEnv, kwargs={'max_calls': 5})\n"
        "gymnasium.register('shop/Numbers-v0', entry_point='gymnasium.envs.classic_control:CartPoleEnv')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="'shop/Sums-v1': gymnasium.register was not called for it"):
        envs.make("shop/Sums-v1")
    assert envs.make("registering:shop/Sums-v1").max_calls == 5
    assert envs.make("shop/Sums-v1", max_calls=1).max_calls == 1
    assert envs.resolve("shop/Sums-v1") is CalculatorEnv
    with pytest.raises(ConfigError, match="is not a subclass of envs.base.TextEnv"):
        envs.make("shop/Numbers-v0")
    made = gymnasium.make("k2rl/calculator-v0", max_calls=7)
    assert made.unwrapped.max_calls == 7
    assert made.reset(seed=1)[0][1].role == "user"
    sys.modules.pop("registering")


@pytest.mark.parametrize(
    ("id", "kwargs", "message"),
    [
        ("calculater", {}, "did you mean 'calculator'?); `k2rl envs list` shows all"),
        (
            "chess",
            {},
            "unknown environment 'chess'; `k2rl envs list` shows all, or name a class as module:Class",
        ),
        ("envs.calculator:Calculator", {}, "did you mean 'CalculatorEnv'?"),
        ("envs.base:TextEnv", {}, "does not implement: reset, step, tasks"),
        ("k2rl.types:Task", {}, "not a subclass of envs.base.TextEnv"),
        ("calculator", {"max_cals": 3}, "unexpected keyword argument 'max_cals'; it takes: mix, max_calls"),
        ("calculator", {"max_calls": 0}, "max_calls=0 must be a whole number of at least 1"),
        ("calculator", {"max_calls": "two"}, "max_calls='two' must be a whole number"),
        ("calculator", {"mix": {"divide": 1}}, "unknown kinds: divide; there are: add, subtract, multiply"),
        ("calculator", {"mix": {"add": -1}}, "must give shares of at least 0"),
        ("calculator", {"mix": {"add": 0}}, "one kind more than 0"),
        ("calculator", {"mix": {}}, "one kind more than 0"),
        ("calculator", {"mix": {"add": float("nan")}}, "must give shares"),
        ("calculator", {"mix": ["add"]}, "must be a dict of kinds and their shares"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(id, kwargs, message):
    with pytest.raises(ConfigError) as caught:
        envs.make(id, **kwargs)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_rubric_of_an_environment(plugin):
    env = envs.make("calculator")
    assert envs.rubric_of(env) is env.rubric
    other = envs.rubric_of(env, "environment_reward", low=-1)
    assert isinstance(other, EnvironmentReward)
    assert other.reward_range == (-1.0, 1.0)
    with pytest.raises(ConfigError, match="takes no arguments, but got: low"):
        envs.rubric_of(env, "env", low=-1)
    with pytest.raises(ConfigError, match=r"HardCalculator\.rubric is 'strict', not a rubrics\.base\.Rubric"):
        envs.rubric_of(envs.make("hard"))
