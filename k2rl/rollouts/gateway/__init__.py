"""An OpenAI-compatible endpoint, owned by a run: agents that know no more than that are trained unchanged.

`wire.py` is what is said, `session.py` one episode's turns token by token, `server.py` the HTTP around them,
`episode.py` an episode that is played through it.
"""
