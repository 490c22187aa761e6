"""Processes that stay: they pay for their imports once, and then run one function after the other together."""

import multiprocessing.connection
import os
import socket
import time
import traceback

SECONDS = 240  # that a case may take
GRACE = 5  # that others may take behind one that has failed


class RankPool:
    """So many ranks of one job, as an external launcher starts them; behind a failure they are started anew.

    Args:
        size: Number of ranks.
        cache: Folder of the token cache.
        context: How processes come to be.
    """

    def __init__(self, size, cache, context="spawn"):
        self.size, self.cache, self.context = size, cache, multiprocessing.get_context(context)
        self.pipes, self.processes = [], []
        self.start()

    def start(self):
        """Start the processes."""
        environment = {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(self.size),
            "LOCAL_WORLD_SIZE": str(self.size), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "tests",
            "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(self.cache), "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        self.pipes, self.processes = [], []
        for rank in range(self.size):
            here, there = self.context.Pipe()
            ours = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = self.context.Process(target=_work, args=(there, ours))  # no daemon: those may not have workers
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def send(self, function, *args, **kwargs):
        """Have each rank run a function of a module."""
        for pipe in self.pipes:
            pipe.send((function, args, kwargs))

    def run(self, function, *args, **kwargs):
        """What a function of a module gives on each rank."""
        self.send(function, *args, **kwargs)
        results, deadline = {}, time.monotonic() + SECONDS
        while len(results) < self.size and time.monotonic() < deadline:
            waiting = {pipe: rank for rank, pipe in enumerate(self.pipes) if rank not in results}
            for pipe in multiprocessing.connection.wait(list(waiting), deadline - time.monotonic()):
                results[waiting[pipe]] = _received(pipe)
                if results[waiting[pipe]][1]:  # the others may wait for it
                    deadline = min(deadline, time.monotonic() + GRACE)
        failures = [f"rank {rank}: {error}" for rank, (_, error) in sorted(results.items()) if error]
        silent = [f"rank {rank} says nothing" for rank in range(self.size) if rank not in results]
        if failures or silent:
            self.close()
            self.start()
        assert not failures + silent, "\n".join(failures + silent)
        return [results[rank][0] for rank in range(self.size)]

    def close(self):
        """Kill the processes."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def _received(pipe):
    try:
        return pipe.recv()
    except EOFError:
        return None, "has died"


def _work(pipe, environment):
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # of workers: the usual one, not that of this process
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            function, args, kwargs = pipe.recv()
        except EOFError:  # the tests have ended
            os._exit(0)
        try:
            pipe.send((function(*args, **kwargs), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))


def _free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
