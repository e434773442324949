"""An external judge over HTTP, in all its moods: a judgement, a failure with its reason, never a silent number."""

from __future__ import annotations

import asyncio
import json
import math
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rubrics.critics.pointwise import Pointwise
from rubrics.endpoint import Endpoint, EndpointSettings
from rubrics.models import RunModel, bind_run_model, model_from
from tests.rubrics.critics import critic
from tests.rubrics.judging import judged

CLARITY = [{"name": "clarity", "text": "Is it clear?", "choices": ["poor", "good"]}]


class Server(ThreadingHTTPServer):
    """Answers as `mood` says: a function from the request's body to (status, headers, text)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.moods, self.seen = [], []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.seen.append(body)
        moods = self.server.moods
        status, headers, text = (moods.pop(0) if len(moods) > 1 else moods[0])(body)
        self.send_response(status)
        for name, value in {"content-type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        pass


def says(choice, **more):
    def mood(body):
        token = re.search(r"VERDICT (\w+) ", body["messages"][-1]["content"])[1]
        content = f'Clear.\nVERDICT {token} {{"clarity": "{choice}"}}'
        usage = {"prompt_tokens": 100, "completion_tokens": 10}
        choices = [{"message": {"role": "assistant", "content": content}, "finish_reason": "stop", **more}]
        return 200, {}, json.dumps({"choices": choices, "usage": usage})

    return mood


def fixed(text, status=200, **headers):
    return lambda body: (status, {k.replace("_", "-"): v for k, v in headers.items()}, text)


@pytest.fixture
def server():
    made = Server()
    yield made
    made.shutdown()
    made.server_close()


def judge(url, **settings):
    made = Endpoint(
        EndpointSettings(url, "j-1", timeout_s=20, **{"retries": 2, **settings}), first_wait_s=0.01
    )
    return Pointwise(made, [])


def test_a_judgement_and_what_it_cost(server):
    server.moods = [says("good")]
    asked = judge(server.url, prompt_price=2.0, completion_price=10.0)
    verdict = judged(asked, "Ice floats.", rubric=CLARITY)
    assert verdict.value == 1
    assert verdict.judge.startswith("j-1@http://127.0.0.1")
    usage = asked.model.usage
    assert (usage.requests, usage.prompt_tokens, usage.completion_tokens) == (1, 100, 10)
    assert usage.cost == pytest.approx(0.0003)
    assert "response_format" not in server.seen[0]


def test_a_server_that_can_be_held_to_a_schema(server):
    def mood(body):
        schema = body["response_format"]["json_schema"]["schema"]
        token = schema["properties"]["token"]["const"]
        assert list(schema["properties"]) == ["reasoning", "token", "verdict"]
        content = json.dumps({"reasoning": "Clear.", "token": token, "verdict": {"clarity": "good"}})
        return 200, {}, json.dumps({"choices": [{"message": {"content": content}}]})

    server.moods = [mood]
    assert judged(judge(server.url, constrained=True), "Ice floats.", rubric=CLARITY).value == 1


def tells(*top, **more):
    content = [{"token": top[0][0], "top_logprobs": [{"token": t, "logprob": math.log(p)} for t, p in top]}]
    choice = {"message": {"content": top[0][0]}, "finish_reason": "length", "logprobs": {"content": content}}
    return fixed(json.dumps({"choices": [choice | more], "usage": {"prompt_tokens": 7}}))


def test_probabilities_of_words_are_those_of_the_tokens_that_begin_them(server):
    # " go" and "Good" begin "good", "p" begins "poor"; "o" and "" begin none of them.
    server.moods = [tells((" go", 0.3), ("Good", 0.1), ("o", 0.2), ("", 0.1), ("p", 0.1))]
    model = judge(server.url).model
    asked = Pointwise(model, [], brief=True, by_probability=True)
    assert judged(asked, "Ice floats.", rubric=CLARITY).value == pytest.approx(0.8)
    body = server.seen[0]
    assert (body["max_tokens"], body["logprobs"], body["top_logprobs"]) == (1, True, 20)
    assert model.usage.prompt_tokens == 7


@pytest.mark.parametrize(
    ("mood", "reason"),
    [
        (tells(("x", 0.9)), "none of its likeliest tokens begins one of: poor, good"),
        (tells(("good", 0.9), logprobs=None), "tells no log-probs"),
        (tells(("good", 0.9), logprobs={"content": []}), "tells no log-probs"),
        (
            tells(("x", 0.9), logprobs={"content": [{"top_logprobs": [{"token": "good", "logprob": "a"}]}]}),
            "tells no log-probs",
        ),
        (
            tells(("x", 0.9), logprobs={"content": [{"top_logprobs": [{"token": "good", "logprob": 1e9}]}]}),
            "tells no log-probs",
        ),
        (fixed("{}"), "no chat completion"),
    ],
)
def test_probabilities_that_are_not_told_are_a_failure(server, mood, reason):
    server.moods = [mood]
    asked = Pointwise(judge(server.url).model, [], brief=True, by_probability=True)
    verdict = judged(asked, "Ice floats.", rubric=CLARITY)
    assert verdict.value is None
    assert reason in verdict.failure


def test_what_passes_is_waited_for(server):
    server.moods = [fixed("slow down", 429, retry_after="0"), fixed("busy", 503), says("good")]
    assert judged(judge(server.url), "Ice floats.", rubric=CLARITY).value == 1
    assert len(server.seen) == 3


@pytest.mark.parametrize(
    ("mood", "reason"),
    [
        (fixed("<html><body>Login</body></html>", content_type="text/html"), "no JSON (text/html)"),
        (fixed("slow down", 429, retry_after="0"), "does not answer, 3 tries: HTTP 429"),
        (fixed("broken", 500), "3 tries: HTTP 500"),
        (fixed("who are you", 401), "HTTP 401: who are you"),
        (fixed("", 302, location="http://127.0.0.1:1/"), "HTTP 302"),
        (fixed("{}"), "no chat completion"),
        (fixed("null"), "no chat completion"),
        (fixed('{"choices": []}'), "no chat completion"),
        (fixed('{"choices": [{"message": {"content": null}}]}'), "empty reply"),
        (fixed('{"choices": [{"message": {"content": "NaN"}}]}'), "no verdict with its token"),
        (says("NaN"), "none of: poor, good"),
        (says("good", finish_reason="length"), "cut at max_tokens=1024"),
    ],
)
def test_what_goes_wrong_is_a_failure_with_its_reason(server, mood, reason):
    server.moods = [mood]
    verdict = judged(judge(server.url), "Ice floats.", rubric=CLARITY)
    assert verdict.value is None
    assert reason in verdict.failure


def test_nobody_there_and_nobody_answering():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        assert "does not answer, 3 tries: ConnectError" in judged(judge(url), "x", rubric=CLARITY).failure
        taken.listen()
        verdict = judged(judge(url), "x", 0.3, rubric=CLARITY)
        assert "no verdict within 0.3 s" in verdict.failure


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"url": "127.0.0.1", "name": "x"}, "must begin with http"),
        ({"url": "http://a/v1"}, "missing required field `name`"),
        ({"url": "http://a/v1", "name": "x", "temp": 1}, "unknown field `temp`"),
        ({"url": "http://a/v1", "name": "x", "retries": -1}, "retries not negative"),
        ("gpt", "must be policy, or an endpoint"),
        (None, "must be policy, or an endpoint"),
    ],
)
def test_models_that_make_no_sense(spec, reason):
    with pytest.raises(ValueError, match=reason):
        model_from(spec)


def test_the_model_of_a_run_is_bound_by_it():
    rubric = Pointwise("policy", [])
    assert "there is no run" in judged(rubric, "x", rubric=CLARITY).failure
    assert bind_run_model(rubric, critic(lambda blocks, draw: {"clarity": "good"}))
    assert judged(rubric, "x", rubric=CLARITY).value == 1
    assert isinstance(rubric.model, RunModel)


def test_a_client_for_every_loop(server):
    server.moods = [says("good")]
    asked = judge(server.url)
    for text in ("one", "two"):
        assert judged(asked, text, rubric=CLARITY).value == 1
    asyncio.run(asked.close())
