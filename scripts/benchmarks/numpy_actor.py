"""An actor that only writes arrays: `numpy_actor.py ADDRESS`.

Prints a JSON object: when it had a writer (time.monotonic), its memory in bytes, whether torch was imported.
"""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # rl_buffer as it is here

import rl_buffer as rb
from benchmarks.memory import memory_nbytes

if __name__ == "__main__":
    with rb.connect(sys.argv[1]) as client, client.writer("arrays", num_envs=1) as writer:
        connected_at_s = time.monotonic()
        for _ in range(100):
            writer.add(obs=[0.0] * 4, action=0, reward=0.0, done=False, next_obs=[0.0] * 4)
        memory = memory_nbytes(os.getpid())
    figures = {"connected_at_s": connected_at_s, "pss_nbytes": memory["Pss"], "rss_nbytes": memory["Rss"]}
    print(json.dumps(figures | {"imports_torch": "torch" in sys.modules}))
