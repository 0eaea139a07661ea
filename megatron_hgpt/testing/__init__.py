"""What the project's own tests share: tiny models, processes that form a group, short training runs, syntax trees.

Must not import: pytest, cli, planner, report.
"""
