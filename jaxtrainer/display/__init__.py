"""What is drawn on a terminal, in a notebook or into a log file.

Knows numbers, strings and rich; nothing of runs, loops or devices.
"""
