import json

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.spaces import ChatSpace, FreeText
from k2rl.types import Message, ToolCall

text = st.text(alphabet='ab \n"\\\0ü€𝄞', max_size=5)
tool_calls = st.builds(
    ToolCall,
    id=text,
    name=text,
    arguments=st.dictionaries(text, st.integers() | text, max_size=2),
)
messages = st.builds(
    Message,
    role=st.sampled_from(["system", "user", "tool"]),
    content=text,
    tool_calls=st.lists(tool_calls, max_size=2).map(tuple),
    tool_call_id=st.none() | text,
)
chats = st.lists(messages, max_size=3).map(tuple)


@given(st.lists(chats, max_size=3))
@settings(derandomize=True, deadline=None, max_examples=30)
def test_chats_survive_json(batch):
    space = ChatSpace()
    assert all(chat in space for chat in batch)
    assert space.from_jsonable(json.loads(json.dumps(space.to_jsonable(batch)))) == batch


@pytest.mark.parametrize("space", [ChatSpace(), ChatSpace(roles=["tool"]), FreeText()], ids=repr)
def test_samples_lie_in_the_space_and_follow_the_seed(space):
    space.seed(3)
    first = [space.sample() for _ in range(50)]
    space.seed(3)
    assert first == [space.sample() for _ in range(50)]
    assert all(sample in space for sample in first)
    assert len(set(first)) > 5
    space.seed(4)
    assert first != [space.sample() for _ in range(50)]


def test_a_seed_may_be_given_at_construction():
    assert ChatSpace(seed=1).sample() == ChatSpace(seed=1).sample()
    assert FreeText(seed=1).sample() == FreeText(seed=1).sample()


@pytest.mark.parametrize(
    "stranger",
    [
        None,
        "text",
        [Message(role="user", content="a list")],
        (Message(role="assistant", content="the policy's own"),),
        (Message(role="user", content=None),),
        (Message(role="user", content="x", tool_calls=("call",)),),
        (Message(role="user", content="x", tool_call_id=3),),
        ({"role": "user", "content": "x"},),
    ],
    ids=str,
)
def test_what_is_no_chat_is_not_contained(stranger):
    assert stranger not in ChatSpace()


def test_any_text_is_an_action():
    assert "" in FreeText()
    assert "ünï\n\0" * 1000 in FreeText()
    assert 3 not in FreeText()


def test_equality_and_names():
    assert ChatSpace() == ChatSpace(roles=("tool", "user", "system"))
    assert ChatSpace() != ChatSpace(roles=("user",))
    assert ChatSpace() != FreeText()
    assert FreeText() == FreeText()
    assert repr(ChatSpace(roles=["user"])) == "ChatSpace(roles=('user',))"
    assert eval(repr(ChatSpace()), {"ChatSpace": ChatSpace}) == ChatSpace()


def test_wrong_use_is_refused():
    with pytest.raises(ValueError, match="must be some of"):
        ChatSpace(roles=["robot"])
    with pytest.raises(ValueError, match="must be some of"):
        ChatSpace(roles=[])
    with pytest.raises(ValueError, match="cannot be sampled with a mask"):
        ChatSpace().sample(mask=1)
    with pytest.raises(ValueError, match="cannot be sampled with a mask"):
        FreeText().sample(probability=1)
    with pytest.raises(msgspec.ValidationError):
        ChatSpace().from_jsonable([[{"role": "robot", "content": ""}]])
