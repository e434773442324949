"""The RL objective as pure functions: policy loss, advantages, PTX, schedules and budgets."""
