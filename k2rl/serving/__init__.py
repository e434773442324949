"""Environments for other processes and machines: `k2rl envs serve`."""
