"""Find, load and talk to language models."""
