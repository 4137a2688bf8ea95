"""Prompts in, results out: a batch of prompts from the command line, a recipe or a JSONL file, run on an engine."""

from trtllm_redrafter.generation.batch import run_jobs
from trtllm_redrafter.generation.jobs import Defaults, Job, Outcome, prompt_jobs, read_jobs
from trtllm_redrafter.generation.results import ResultsFile
from trtllm_redrafter.generation.session import defaults_for, open_runner
from trtllm_redrafter.generation.summary import Summary

__all__ = [
    "Defaults",
    "Job",
    "Outcome",
    "ResultsFile",
    "Summary",
    "defaults_for",
    "open_runner",
    "prompt_jobs",
    "read_jobs",
    "run_jobs",
]
