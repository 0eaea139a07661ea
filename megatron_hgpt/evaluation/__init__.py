"""Scores of both tasks, and the results a report is made from."""
