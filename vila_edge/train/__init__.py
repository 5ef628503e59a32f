"""The training path: stages that turn a text LLM and a vision tower into a VILA."""
