"""The program that a Ray cluster runs for one job: training/run.py on each of its workers.

Ray places the workers, on one machine or several. To torch.distributed they are what torchrun's
processes are. The environment variable LCM_LORA_RAY holds the order that follower.py wrote. Exit
status 0 if every worker ended well; the job's folder has the details.
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
        """The address of this machine, and a free port."""
        with socket.socket() as free:
            free.bind(("", 0))
            return ray.util.get_node_ip_address(), free.getsockname()[1]

    def run(self, spec: str, environment: dict[str, str]) -> int:
        """run.py's exit status. Its output goes to the job's log, as a local trainer's does."""
        os.environ.update(environment)
        rank = environment["RANK"]
        name = "log.txt" if rank == "0" else f"log-{rank}.txt"
        with open(os.path.join(os.path.dirname(spec), name), "ab") as log:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
        # The working directory is the package that was sent.
        path = os.path.join(os.getcwd(), "lcm_lora", "training", "run.py")
        file = importlib.util.spec_from_file_location("lcm_lora_run", path)
        assert file is not None and file.loader is not None
        run = importlib.util.module_from_spec(file)
        file.loader.exec_module(run)
        return run.main([spec])


def main() -> int:
    order = json.loads(os.environ["LCM_LORA_RAY"])
    ray.init()
    count, needs = order["workers"], {"CPU": order["cpus"], "GPU": order["gpus"]}
    places = placement_group([needs] * count, strategy="PACK")
    ray.get(places.ready())
    workers = [
        Worker.options(  # type: ignore[attr-defined]
            num_cpus=order["cpus"],
            num_gpus=order["gpus"],
            scheduling_strategy=PlacementGroupSchedulingStrategy(places, i),
        ).remote()
        for i in range(count)
    ]
    address, port = ray.get(workers[0].address.remote())
    common = {"MASTER_ADDR": address, "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    # A worker sees only the devices that Ray gave it, so its local rank is 0.
    running = [
        worker.run.remote(order["spec"], common | {"RANK": str(rank), "LOCAL_RANK": "0"})
        for rank, worker in enumerate(workers)
    ]
    worst = 0
    while running and not worst:
        ended, running = ray.wait(running)
        worst = max(map(abs, ray.get(ended)))
    return worst  # when this program ends, Ray ends the other workers


if __name__ == "__main__":
    sys.exit(main())
