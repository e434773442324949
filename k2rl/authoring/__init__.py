"""For those who write environments: `k2rl envs check` and `k2rl envs new`. No torch, Ray or vLLM."""
