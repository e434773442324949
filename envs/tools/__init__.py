"""Tools for a policy to call: functions, MCP servers, and how the model families write calls."""

from envs.tools.env import ToolEnv, calling
from envs.tools.tool import Tool, ToolError, tool
from envs.tools.toolbox import Toolbox

__all__ = ["Tool", "ToolEnv", "ToolError", "Toolbox", "calling", "tool"]
