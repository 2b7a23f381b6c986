"""The loops, one stage a file: plain functions, the whole order of operations in one place."""
