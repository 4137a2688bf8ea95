"""Can this machine do what a recipe asks for, and if not, what has to change?

Nothing that could fail is imported: versions come from package metadata, GPUs from the driver's program. Each check
belongs to one or both backends, so that the last line can say which of them this machine can serve.

    report = examine(needs=None)
    report.render(), report.serves("torch")
"""

from trtllm_redrafter.doctor.checks import examine
from trtllm_redrafter.doctor.report import Check, DoctorReport, Needs, State

__all__ = ["Check", "DoctorReport", "Needs", "State", "examine"]
