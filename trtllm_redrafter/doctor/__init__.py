"""Can this machine do what a recipe asks for? If not, what has to change?

Nothing that could fail is imported: versions come from package metadata, GPUs from `nvidia-smi`. Each check belongs to
one or both backends, so that the last lines can tell which of them can be used on this machine.

    report = examine(needs=None)
    report.render(), report.serves("torch")
"""

from trtllm_redrafter.doctor.checks import Check, DoctorReport, Needs, State, examine

__all__ = ["Check", "DoctorReport", "Needs", "State", "examine"]
