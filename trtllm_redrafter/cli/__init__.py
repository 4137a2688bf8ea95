"""The command-line program; the only package that prints."""

from trtllm_redrafter.cli import signals

try:
    from trtllm_redrafter.cli.app import app, main, run_app
except KeyboardInterrupt:  # the first tenths of a second are imports
    raise SystemExit(signals.exit_code() or 130) from None

__all__ = ["app", "main", "run_app"]
