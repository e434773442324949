"""A game served by the real OpenEnv: `python openenv_server.py PORT`, in an environment that has it."""

import random
import sys

import uvicorn
from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app


class Guess(Action):
    message: str


class Hint(Observation):
    text: str


class GuessEnvironment(Environment):
    """Guess a number between 1 and 50."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self):
        super().__init__()
        self.secret, self.turns = 0, 0

    def reset(self, seed=None, episode_id=None, **kwargs):
        self.secret, self.turns = random.Random(seed).randint(1, 50), 0
        return Hint(text="Guess my number between 1 and 50.", done=False, reward=0.0)

    def step(self, action, timeout_s=None, **kwargs):
        self.turns += 1
        if not action.message.isdigit():
            return Hint(text="Write a number.", done=self.turns == 6, reward=0.0)
        guess = int(action.message)
        won = guess == self.secret
        hint = "right" if won else "higher" if guess < self.secret else "lower"
        return Hint(text=hint, done=won or self.turns == 6, reward=float(won))

    @property
    def state(self):
        return State(step_count=self.turns)


if __name__ == "__main__":
    app = create_fastapi_app(GuessEnvironment, Guess, Hint, max_concurrent_envs=8)
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
