"""Where requests go: never to who does not serve, to who has the prompt, and not all to one."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from k2rl.inference.router import BLOCK_TOKENS, PrefixIndex, Router

REPLICAS = 3
SLACK = 2

prompts = st.integers(0, 5).map(lambda number: [number] * (BLOCK_TOKENS + number))


def serving(replicas: int, slack: int = 8) -> Router:
    router = Router(replicas, slack)
    for replica in range(replicas):
        router.admit(replica, 1)
    return router


def prompt(number: int, blocks: int = 2) -> list[int]:
    return [number * 1000 + position for position in range(blocks * BLOCK_TOKENS)]


def test_nobody_serves_at_first() -> None:
    router = Router(2)
    assert router.begin([1]) is None
    router.admit(1, 7)
    assert (router.begin([1]), router.version(1), router.version(0)) == (1, 7, None)
    router.fence(1)
    assert router.begin([1]) is None


def test_a_group_stays_together_and_groups_are_spread() -> None:
    router = serving(2)
    homes = [{router.begin(prompt(task)) for _ in range(8)} for task in range(4)]
    assert all(len(home) == 1 for home in homes)
    assert [router.running(replica) for replica in range(2)] == [16, 16]


def test_a_later_turn_goes_where_the_earlier_ones_were() -> None:
    router = serving(3)
    first = [router.begin(prompt(task)) for task in range(3)]
    for replica in range(3):
        router.end(replica)
    turns = [router.begin([*prompt(task), *prompt(task + 10)]) for task in (2, 0, 1)]
    assert turns == [first[2], first[0], first[1]]


def test_a_cache_is_no_reason_to_wait() -> None:
    router = serving(2, slack=3)
    homes = [router.begin(prompt(0)) for _ in range(10)]
    assert set(homes) == {0, 1}
    assert abs(router.running(0) - router.running(1)) <= 4


def test_new_weights_empty_the_caches() -> None:
    router = serving(2)
    home = router.begin(prompt(0))
    assert home is not None
    other = 1 - home
    router.end(home)
    router.begin(prompt(5))  # to the first of two that are as good
    for replica in range(2):
        router.admit(replica, 2)
    assert router.begin(prompt(0)) == other


@given(st.lists(st.lists(st.integers(0, 30), max_size=12, unique=True), max_size=30), st.integers(1, 20))
def test_the_index_keeps_what_was_asked_for_last(chains: list[list[int]], capacity: int) -> None:
    index = PrefixIndex(capacity)
    for chain in chains:
        index.add(chain)
        assert index.known(chain) == min(len(chain), capacity)
        assert len(index._blocks) <= capacity


class Routing(RuleBasedStateMachine):
    """Against a plain account of who serves and who does what."""

    def __init__(self) -> None:
        super().__init__()
        self.router = Router(REPLICAS, SLACK)
        self.serving: dict[int, int] = {}
        self.running: list[int] = []

    @rule(replica=st.integers(0, REPLICAS - 1), version=st.integers(0, 9))
    def admit(self, replica: int, version: int) -> None:
        self.router.admit(replica, version)
        self.serving[replica] = version

    @rule(replica=st.integers(0, REPLICAS - 1))
    def fence(self, replica: int) -> None:
        self.router.fence(replica)
        self.serving.pop(replica, None)

    @rule(prompt_ids=prompts)
    def begin(self, prompt_ids: list[int]) -> None:
        chosen = self.router.begin(prompt_ids)
        if not self.serving:
            assert chosen is None
            return
        assert chosen in self.serving
        least = min(self.running.count(replica) for replica in self.serving)
        assert self.running.count(chosen) <= least + SLACK
        self.running.append(chosen)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: Any) -> None:
        ended = data.draw(st.sampled_from(self.running))
        self.router.end(ended)
        self.running.remove(ended)

    @invariant()
    def accounts_agree(self) -> None:
        for replica in range(REPLICAS):
            assert self.router.running(replica) == self.running.count(replica)
            assert self.router.version(replica) == self.serving.get(replica)


TestRouting = Routing.TestCase
