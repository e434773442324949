import sys

import pytest

from k2rl.errors import ConfigError
from rubrics import EnvironmentReward, registry

MODULE = '''
from rubrics import Rubric
from k2rl.types import Verdict

class Length(Rubric):
    """Rewards short answers."""

    def __init__(self, limit: int = 10) -> None:
        if limit < 0:
            raise ValueError("limit must not be negative:\\nsay 0 or more")
        self.limit = limit

    async def judge(self, trajectory):
        return Verdict.scored(0.0)

class NoJudge(Rubric):
    pass

class Other:
    class Inner(Length):
        """Nested."""

def function():
    pass
'''


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A folder on the path with a module of rubrics and a broken one; gives the folder."""
    (tmp_path / "plugged_rubrics.py").write_text(MODULE)
    (tmp_path / "broken_rubrics.py").write_text("import module_that_is_nowhere\n")
    (tmp_path / "raising_rubrics.py").write_text("raise RuntimeError('two\\nlines')\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("plugged_rubrics", "broken_rubrics", "raising_rubrics"):
        sys.modules.pop(name, None)


def install(folder, name, entry_points):
    """Pretend that a distribution with these entry points is installed in the folder."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[k2rl.rubrics]\n" + entry_points)


def test_built_in_rubrics():
    rubric = registry.make("environment_reward", low=-1, high=2)
    assert isinstance(rubric, EnvironmentReward)
    assert rubric.reward_range == (-1.0, 2.0)
    assert registry.resolve("environment_reward") is EnvironmentReward
    assert registry.available()["environment_reward"].startswith("The sum of the environment's step rewards")


def test_a_rubric_by_module_and_class(plugin):
    rubric = registry.make("plugged_rubrics:Length", limit=3)
    assert type(rubric).__name__ == "Length"
    assert rubric.limit == 3
    assert registry.resolve("plugged_rubrics:Other.Inner").__doc__ == "Nested."


def test_a_rubric_from_an_installed_package(plugin):
    install(plugin, "acme", "short = plugged_rubrics:Length\nbroken = broken_rubrics:Gone\n")
    assert registry.make("short").limit == 10
    available = registry.available()
    assert available["short"] == "Rewards short answers."
    assert available["broken"].startswith("cannot be loaded: ")
    assert "module_that_is_nowhere" in available["broken"]


def test_an_id_claimed_twice_is_an_error(plugin):
    install(plugin, "acme", "short = plugged_rubrics:Length\nenvironment_reward = plugged_rubrics:Length\n")
    install(plugin, "same", "short = plugged_rubrics:Length\n")
    assert registry.make("short").limit == 10
    with pytest.raises(ConfigError, match=r"claimed by rubrics\.environment:\w+ and plugged_rubrics:Length"):
        registry.resolve("environment_reward")


@pytest.mark.parametrize(
    ("id", "kwargs", "message"),
    [
        ("enviroment_reward", {}, "did you mean 'environment_reward'?"),
        ("nothing like it", {}, "unknown rubric 'nothing like it'; use `env`"),
        ("env", {}, "use `env` for the environment's own"),
        ("", {}, "unknown rubric ''"),
        ("nowhere:Length", {}, "cannot import nowhere (ModuleNotFoundError: No module named 'nowhere')"),
        ("..relative:Length", {}, "cannot import ..relative (TypeError"),
        (":Length", {}, "write it as module:Class"),
        ("plugged_rubrics:", {}, "write it as module:Class"),
        ("broken_rubrics:Length", {}, "No module named 'module_that_is_nowhere'"),
        ("raising_rubrics:Length", {}, "RuntimeError: two lines"),
        ("plugged_rubrics:Lenght", {}, "has no class Lenght (did you mean 'Length'?)"),
        ("plugged_rubrics:Other", {}, "not a subclass of rubrics.base.Rubric"),
        ("plugged_rubrics:function", {}, "not a subclass of rubrics.base.Rubric"),
        ("plugged_rubrics:NoJudge", {}, "does not implement: judge"),
        ("plugged_rubrics:Length", {"limt": 3}, "unexpected keyword argument 'limt'; it takes: limit"),
        ("plugged_rubrics:Length", {"limit": -1}, "limit must not be negative: say 0 or more"),
        ("plugged_rubrics:Length", {"limit": "many"}, "'<' not supported"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(plugin, id, kwargs, message):
    with pytest.raises(ConfigError) as caught:
        registry.make(id, **kwargs)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
