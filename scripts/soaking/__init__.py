"""The parts of scripts/soak.py, which tests use too: rows that prove themselves, clients, faults, and the audit."""
