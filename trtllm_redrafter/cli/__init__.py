"""The command-line program; the only room that prints."""

from trtllm_redrafter.cli.app import app, main, run_app

__all__ = ["app", "main", "run_app"]
