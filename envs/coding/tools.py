"""A workspace with a shell and files, as tools that a policy calls in its text.

    <tool_call>{"name": "shell", "arguments": {"command": "python3 test_solution.py"}}</tool_call>

The first call of a turn counts. `submit` ends the episode, and so does a turn without a call.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping

import msgspec
from gymnasium.error import ResetNeeded

from envs.base import StepResult, TextEnv
from k2rl.types import Message
from sandboxes.base import Backend, ExecResult, Limits, Sandbox, SandboxSpec, Shell
from sandboxes.errors import SandboxClosedError, SandboxFileError

SHOWN = 4000
"""Characters of a tool's answer; what is longer loses its middle."""
COMMAND_S = 30.0
LIMITS = Limits(wall_seconds=COMMAND_S, cpu_seconds=COMMAND_S, output_bytes=2**20)
_NO_LINKS: Mapping[str, str] = {}

USAGE = (
    "You have these tools, one call a turn, written as\n"
    '<tool_call>{"name": "shell", "arguments": {"command": "ls"}}</tool_call>\n'
    "- shell(command): run a command; folder and variables stay from one call to the next\n"
    "- read_file(path): a file's text\n"
    "- write_file(path, content): write a whole file\n"
    "- submit(): say that you are done; your files are judged as they are then"
)
ARGUMENTS = {"shell": ("command",), "read_file": ("path",), "write_file": ("path", "content"), "submit": ()}
#: Newlines in strings, which models like to write as they are, are taken.
_DECODER = json.JSONDecoder(strict=False)


class Call(msgspec.Struct, frozen=True):
    """A tool call as it was written; `problem` says what is wrong with it, if anything is."""

    name: str
    arguments: dict[str, str] = {}
    problem: str = ""


def call_of(action: str) -> Call | None:
    """The first tool call of a turn; None if there is none."""
    if "<tool_call>" not in action:
        return None
    text = action.split("<tool_call>", 1)[1].lstrip()
    try:
        content, _ = _DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or not isinstance(content.get("arguments", {}), dict):
        return Call("", problem='a call is one JSON object: {"name": …, "arguments": {…}}')
    name, arguments = str(content.get("name")), content.get("arguments", {})
    if name not in ARGUMENTS:
        return Call(name, problem=f"there is no tool {name:.40}; there are: {', '.join(ARGUMENTS)}")
    wanted = ARGUMENTS[name]
    if set(arguments) != set(wanted) or not all(isinstance(value, str) for value in arguments.values()):
        return Call(name, problem=f"{name} takes these arguments, as strings: {', '.join(wanted) or 'none'}")
    return Call(name, arguments)


def spelled(name: str, **arguments: str) -> str:
    """A call as a policy writes it."""
    content = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>{content}</tool_call>"


class Workspace:
    """A sandbox of one episode, and what its tools do there."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self._shell: Shell | None = None

    @classmethod
    async def open(
        cls,
        backend: Backend,
        files: Mapping[str, bytes],
        image: str | None = None,
        limits: Limits = LIMITS,
        links: Mapping[str, str] = _NO_LINKS,
    ) -> Workspace:
        """Open a sandbox with these files; `image`, `limits` and `links` as in `SandboxSpec`.

        Raises:
            SandboxError: it failed.
        """
        sandbox = await backend.open(SandboxSpec(limits=limits, image=image, links=dict(links)))
        try:
            await sandbox.upload(files)
        except BaseException:
            await sandbox.close()
            raise
        return cls(sandbox)

    async def step(self, action: str) -> StepResult | None:
        """The step that a turn's tool call makes; None if the turn ends the episode.

        Raises:
            SandboxError: the sandbox failed.
        """
        call = call_of(action)
        if call is None or (call.name == "submit" and not call.problem):
            return None
        answer = await self.do(call)
        components = {"calls": 1.0, "bad_calls": float(bool(call.problem))}
        return (Message("tool", answer),), 0.0, False, False, {"reward_components": components}

    async def do(self, call: Call) -> str:
        """The answer to a call; what the policy did wrong is an answer, too.

        Raises:
            SandboxError: the sandbox failed.
        """
        if call.problem:
            return f"error: {call.problem}"
        try:
            if call.name == "shell":
                return shortened(await self._command(call.arguments["command"]))
            if call.name == "read_file":
                content = await self.sandbox.read_file(call.arguments["path"])
                return shortened(content.decode("utf-8", "replace"))
            await self.sandbox.write_file(
                call.arguments["path"], call.arguments["content"].encode("utf-8", "replace")
            )
        except SandboxFileError as error:
            return f"error: {error}"
        return "written"

    async def _command(self, command: str) -> str:
        for _ in range(2):
            if self._shell is None or not self._shell.is_alive():
                self._shell = await self.sandbox.shell()
            try:
                ran = await self._shell.run(command, timeout=COMMAND_S)
            except SandboxClosedError:
                # The shell ended since the last command; whether the sandbox did, too, the next one shows.
                self._shell = None
                continue
            return _answer(ran)
        raise SandboxClosedError("the shell ends before it runs anything")

    async def end_processes(self) -> None:
        """End what the policy left running: from here on nobody changes the files."""
        if self._shell is not None:
            await self._shell.close()

    async def close(self) -> None:
        await self.sandbox.close()


class WorkspaceEnv(TextEnv):
    """An episode in a workspace: tool calls, until one of them, or a turn without any, has it judged."""

    _workspace: Workspace | None = None

    async def step(self, action: str) -> StepResult:  # type: ignore[override]
        """Do a tool call, or judge what there is.

        Raises:
            gymnasium.error.ResetNeeded: if no episode is running.
            JudgeError, SandboxError: the judge or the sandbox failed; there is no reward.
        """
        if self._workspace is None:
            raise ResetNeeded("the episode is over or was never begun: call reset()")
        if (answered := await self._workspace.step(action)) is not None:
            return answered
        return await self.judge_workspace(self._workspace)

    async def judge_workspace(self, workspace: Workspace) -> StepResult:
        """End the episode: nothing changes any more while it is judged, and then the sandbox goes."""
        try:
            await workspace.end_processes()
            return await self.judged(workspace)
        finally:
            await self.close()

    @abstractmethod
    async def judged(self, workspace: Workspace) -> StepResult:
        """The last step of an episode; may close the workspace, if that is no longer needed."""

    async def close(self) -> None:  # type: ignore[override]
        """End the episode's sandbox."""
        workspace, self._workspace = self._workspace, None
        if workspace is not None:
            await workspace.close()


def _answer(ran: ExecResult) -> str:
    said = ran.text.rstrip("\n")
    if ran.ended != "exited":
        return f"{said}\n[{ran.ended.replace('_', ' ')}]".lstrip("\n")
    return f"{said}\n[exit code {ran.exit_code}]".lstrip("\n") if ran.exit_code or not said else said


def shortened(text: str) -> str:
    """A text with its middle left out if it is long."""
    if len(text) <= SHOWN:
        return text
    half = SHOWN // 2
    return f"{text[:half]}\n… {len(text) - 2 * half} characters left out …\n{text[-half:]}"
