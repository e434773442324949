"""Customer service: a backend with state, a policy in words, a user who wants something."""
