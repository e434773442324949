"""Generation: the engine's protocol, and vLLM behind it."""
