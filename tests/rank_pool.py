"""Processes that stay: they pay for their imports once, and then run one function after the other together."""

import os
import socket
import traceback

import torch.multiprocessing as multiprocessing

SECONDS = 240  # that a case may take


class RankPool:
    """So many ranks of one job, as an external launcher starts them.

    Args:
        size: Number of ranks.
        cache: Folder of the token cache.
    """

    def __init__(self, size, cache):
        self.size = size
        context = multiprocessing.get_context("spawn")
        environment = {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "tests", "OMP_NUM_THREADS": "1",
            "HF_DATASETS_CACHE": str(cache), "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        self.pipes, self.processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            ours = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = context.Process(target=_work, args=(there, ours), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, function, *args, **kwargs):
        """What a function of a module gives on each rank."""
        for pipe in self.pipes:
            pipe.send((function, args, kwargs))
        results = []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(SECONDS), f"rank {rank} of {self.size} says nothing for {SECONDS} s"
            results.append(pipe.recv())
        failures = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(results) if error]
        assert not failures, "\n".join(failures)
        return [result for result, _ in results]

    def close(self):
        """End the processes."""
        for process in self.processes:
            process.kill()


def _work(pipe, environment):
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    while True:
        function, args, kwargs = pipe.recv()
        try:
            pipe.send((function(*args, **kwargs), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))


def _free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
