"""One process of the multi-process suite as srun starts it; ends with 1 and says why if a check failed."""

import sys
from pathlib import Path

import jax

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "multiprocess")]

if __name__ == "__main__":
    jax.distributed.initialize()  # finds everything in SLURM's variables
    import exchange_worker

    failed = exchange_worker.core_of_four()["failed"]
    for name, error in failed.items():
        print(f"process {jax.process_index()}, {name}:\n{error}", flush=True)
    print(f"process {jax.process_index()} of {jax.process_count()} is through", flush=True)
    sys.exit(1 if failed else 0)
