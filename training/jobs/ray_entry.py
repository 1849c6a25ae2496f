"""What a Ray cluster runs for one job: training/run.py on each of its workers.

Ray finds the workers their places, on one machine or several; they are to torch.distributed what
torchrun's processes are. Told by the environment variable LCM_LORA_RAY what ray_job.py wrote there.
Exit status 0 when every worker ended well; the words about the job are in its folder.
"""

import importlib.util
import json
import os
import socket
import sys

# This script's folder leaves the import path, where its file names would hide other modules.
sys.path[:] = [path for path in sys.path if path != os.path.dirname(os.path.abspath(__file__))]

import ray  # noqa: E402
from ray.util.placement_group import placement_group  # noqa: E402
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy  # noqa: E402


@ray.remote(max_restarts=0)
class Worker:
    def address(self) -> tuple[str, int]:
        """Of this machine, and a port of it that is free now."""
        with socket.socket() as free:
            free.bind(("", 0))
            return ray.util.get_node_ip_address(), free.getsockname()[1]

    def run(self, spec: str, environment: dict[str, str]) -> int:
        """run.py's exit status. What it prints goes to the job's log, as a local one's does."""
        os.environ.update(environment)
        rank = environment["RANK"]
        name = "log.txt" if rank == "0" else f"log-{rank}.txt"
        with open(os.path.join(os.path.dirname(spec), name), "ab") as log:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
        # The working directory is the package that was sent.
        path = os.path.join(os.getcwd(), "lcm_lora", "training", "run.py")
        found = importlib.util.spec_from_file_location("lcm_lora_run", path)
        run = importlib.util.module_from_spec(found)
        found.loader.exec_module(run)
        return run.main([spec])


def main() -> int:
    told = json.loads(os.environ["LCM_LORA_RAY"])
    ray.init()
    count, needs = told["workers"], {"CPU": told["cpus"], "GPU": told["gpus"]}
    places = placement_group([needs] * count, strategy="PACK")
    ray.get(places.ready())
    workers = [
        Worker.options(
            num_cpus=told["cpus"], num_gpus=told["gpus"],
            scheduling_strategy=PlacementGroupSchedulingStrategy(places, i),
        ).remote()
        for i in range(count)
    ]  # fmt: skip
    address, port = ray.get(workers[0].address.remote())
    common = {"MASTER_ADDR": address, "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    # A worker sees the devices that Ray gave it only, so it is the first of its machine.
    running = [
        worker.run.remote(told["spec"], common | {"RANK": str(rank), "LOCAL_RANK": "0"})
        for rank, worker in enumerate(workers)
    ]
    worst = 0
    while running and not worst:
        ended, running = ray.wait(running)
        worst = max(map(abs, ray.get(ended)))
    return worst  # with the job its other workers end too


if __name__ == "__main__":
    sys.exit(main())
