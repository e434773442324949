"""Plays a task of verifiers' (v1) at an OpenAI-compatible endpoint; for a Python that has verifiers."""

import asyncio
import json
import os
import sys
from typing import Any

import openai
import verifiers.v1 as vf


class SumData(vf.TaskData):
    answer: str


class SumTask(vf.Task[SumData]):
    @vf.reward
    async def right(self, trace: vf.Trace) -> float:
        return float(self.data.answer in (trace.last_reply or ""))


class Doubting(vf.Harness[vf.HarnessConfig]):
    """Asks twice. The harnesses that verifiers ships want `uv`, and a network to install programs from."""

    NEEDS_CONTAINER = False

    async def setup(self, runtime: Any) -> None:
        pass

    async def launch(
        self,
        ctx: Any,
        trace: Any,
        runtime: Any,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: Any,
        tool_interception_url: str | None = None,
    ) -> vf.ProgramResult:
        messages: list[Any] = [{"role": "user", "content": data.prompt}]
        async with openai.AsyncOpenAI(base_url=endpoint, api_key=secret) as model:
            for _ in range(2):
                answer = await model.chat.completions.create(model=ctx.model, messages=messages)
                messages.append({"role": "assistant", "content": answer.choices[0].message.content})
                messages.append({"role": "user", "content": "Are you sure?"})
        return vf.ProgramResult(exit_code=0, stdout="", stderr="")


async def main() -> None:
    task = json.loads(sys.stdin.readline())["data"]
    client = vf.EvalClientConfig(base_url=os.environ["OPENAI_BASE_URL"], api_key_var="OPENAI_API_KEY")
    agent = vf.make_agent(vf.AgentConfig(runtime=vf.SubprocessConfig(), model="policy", client=client))
    agent.harness = Doubting(vf.HarnessConfig())
    trace = await agent.run(SumTask(SumData(prompt=task["question"], answer=task["answer"])))
    if trace.errors:
        sys.exit(str(trace.errors))
    json.dump({"reward": sum(reward.value for reward in trace.rewards.values())}, sys.stdout)


asyncio.run(main())
