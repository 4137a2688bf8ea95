"""Run what a recipe asks for: its options, prompts through an engine, the pipeline of stages, and the Python API."""
