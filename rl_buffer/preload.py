"""Imported by the forkserver of a `launch.ProcessGroup` alone, before all that it preloads."""

from rl_buffer.launch import prepare_forkserver

prepare_forkserver()
