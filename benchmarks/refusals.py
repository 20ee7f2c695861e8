"""Count the refusals that torchrun hides on a busy machine: it ends all ranks when one has ended.

    python benchmarks/refusals.py [LAUNCHES]

Each launch starts two ranks with a wrong option, which each rank finds by itself, or with damaged
data, which the ranks find together. Meanwhile three processes a core do nothing else than
count. Prints how many launches showed the reason, and how many showed it once.
"""

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

REPOSITORY = Path(__file__).resolve().parents[1]
FAULTS = {
    "a wrong option": (["--rank", "-1"], "--rank must be"),
    "damaged data": (["--data", "{folder}/damaged.jsonl"], "This line is not valid JSON"),
}
LAUNCHES = 10
BUSY_A_CORE = 3


def launch(options: list[str], folder: str) -> str:
    """Return what two ranks under torchrun print on stderr."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words = [word.format(folder=folder) for word in options]
    command = [*torchrun, "--nproc_per_node", "2", "launcher/train.py", *words]
    return subprocess.run(
        [*command, "--output_dir", f"{folder}/run"],
        cwd=REPOSITORY,
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ).stderr


def main() -> None:
    """Launch, and count."""
    launches = int(sys.argv[1]) if sys.argv[1:] else LAUNCHES
    with ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory())
        Path(folder, "damaged.jsonl").write_text('{"prompt": "a", "resp\n')
        for _ in range(BUSY_A_CORE * (os.cpu_count() or 1)):
            busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.callback(busy.kill)
        for name, (options, reason) in FAULTS.items():
            said = [launch(options, folder).count(reason) for _ in range(launches)]
            shown, once = sum(count > 0 for count in said), said.count(1)
            print(f"{name}: shown in {shown} of {launches} launches, once in {once}", flush=True)


if __name__ == "__main__":
    main()
