"""Scores of both tasks, and the results a report is made from.

Must not import: megatron, engines, trainer, report.
"""
