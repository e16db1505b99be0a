"""Environment loops that feed a server: one small file per kind of actor."""
