"""k2rl: agentic RL post-training after the Kimi K2 report.

Importing the package is cheap: torch, Ray and vLLM are imported by the rooms that use them.
"""

__version__ = "0.1.0"
