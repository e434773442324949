"""A workspace with a shell and files, as tools that a policy calls.

`submit` ends the episode, and so does a turn without a call.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

from gymnasium.error import ResetNeeded

from envs.base import StepResult, TextEnv
from envs.tools import Toolbox, ToolError, tool
from envs.tools.formats import parse
from k2rl.types import ToolSpec
from sandboxes.base import Backend, ExecResult, Limits, Sandbox, SandboxSpec, Shell
from sandboxes.errors import SandboxClosedError, SandboxFileError

COMMAND_S = 30.0
LIMITS = Limits(wall_seconds=COMMAND_S, cpu_seconds=COMMAND_S, output_bytes=2**20)
PATIENCE_S = 300.0
"""Seconds for a tool, whose sandbox has deadlines of its own."""
_NO_LINKS: Mapping[str, str] = {}

USAGE = "Work with the tools. When you are done, call submit: your files are judged as they are then."


class Workspace:
    """A sandbox of one episode, and what its tools do there."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self._shell: Shell | None = None
        self._toolbox = Toolbox((self.shell, self.read_file, self.write_file), parallel=False)

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
        """The step that a turn's calls make, one after the other; None if the turn ends the episode.

        Raises:
            SandboxError: the sandbox failed.
        """
        calls = parse(action).calls
        names = [call.name for call in calls]
        before = calls[: names.index("submit")] if "submit" in names else calls
        answered = await self._toolbox.run(before)
        if len(before) < len(calls) or not calls:
            return None
        components = {"calls": float(len(answered.messages)), "bad_calls": float(answered.bad)}
        return answered.messages, 0.0, False, False, {"reward_components": components}

    @tool(timeout_s=PATIENCE_S)
    async def shell(self, command: str) -> str:
        """Run a command; folder and variables stay from one call to the next."""
        return await self._command(command)

    @tool(timeout_s=PATIENCE_S)
    async def read_file(self, path: str) -> str:
        """A file's text."""
        try:
            return (await self.sandbox.read_file(path)).decode("utf-8", "replace")
        except SandboxFileError as error:
            raise ToolError(str(error)) from error

    @tool(timeout_s=PATIENCE_S)
    async def write_file(self, path: str, content: str) -> str:
        """Write a whole file."""
        try:
            await self.sandbox.write_file(path, content.encode())
        except SandboxFileError as error:
            raise ToolError(str(error)) from error
        return "written"

    @tool
    def submit(self) -> str:
        """Say that you are done."""
        raise NotImplementedError("an episode ends before its submit is called")

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

    @property
    def tools(self) -> tuple[ToolSpec, ...]:
        tools = (Workspace.shell, Workspace.read_file, Workspace.write_file, Workspace.submit)
        return tuple(each.spec for each in tools)

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
