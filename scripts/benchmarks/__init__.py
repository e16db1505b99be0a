"""The sections of scripts/bench.py, how they measure, and the report on what they measured."""
