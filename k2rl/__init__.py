"""k2rl: agentic RL post-training after the Kimi K2 report.

Importing the package is cheap: torch, Ray and vLLM are imported by the rooms that use them.
"""

import logging

__version__ = "0.1.0"

# Where no log was set up yet, warnings would land between the one-line errors of the command.
logging.getLogger(__name__).addHandler(logging.NullHandler())
