"""Moves the trainer's weights into the inference engines: manifest, transport, receiver."""
