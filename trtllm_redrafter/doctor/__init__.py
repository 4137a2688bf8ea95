"""Is this machine able to do what a recipe says, and if not, what to change.

Nothing is imported that could fail: versions come from package metadata, GPUs from the driver's program. Each check
belongs to one or both backends, so that the last line can say which of them this machine can serve.

    report = examine(needs=None)
    report.render(), report.serves("torch")
"""

from trtllm_redrafter.doctor.report import Check, DoctorReport, Needs, State, examine

__all__ = ["Check", "DoctorReport", "Needs", "State", "examine"]
