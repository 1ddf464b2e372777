"""The record book's parts behind compare_runs.py; each module is imported only when it is needed."""
