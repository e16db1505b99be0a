"""Learners: one readable file per algorithm, and what they share."""
