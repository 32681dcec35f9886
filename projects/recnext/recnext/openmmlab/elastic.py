"""torchrun's agent for training: it starts a failed group again, but not after a failure that would come back."""

import os
import signal
import sys
from collections.abc import Sequence

from torch.distributed import DistError
from torch.distributed import run as torchrun
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousError
from torch.distributed.launcher import api

from ..utils.errors import FINAL, START_AGAIN


class Agent(LocalElasticAgent):
    """One machine's agent, with a word for failures that are final.

    The others hear of one as torchrun lets them: the meeting place is closed, and there is no other round.
    """

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        failures = list(result.failures.values())
        if any(map(is_final, failures)):
            self._remaining_restarts = 0
        elif worker_group.spec.max_restarts and any(failure.exitcode == START_AGAIN for failure in failures):
            self._remaining_restarts += 1  # which is taken off next: they were asked to stop and have not failed
        return result


def is_final(failure: ProcessFailure) -> bool:
    """Whether a process has said that starting again would be of no use (:func:`utils.errors.report_final`)."""
    return bool(failure.error_file_data.get(FINAL))


def main(arguments: Sequence[str] | None = None) -> None:
    """torchrun with our agent.

    Exits with 0 when all processes have; with 1 when they failed for good; with 75, "start me again", when it was told
    to end (SIGTERM, SIGUSR1), or has lost the others; with 130 after Ctrl-C.

    Args:
        arguments: Those of torchrun.
    """
    # Defect: agents that stay keep the address of a store that may have gone with its agent, and wait for it. Repair:
    # each round has a store of its own, with a free port.
    os.environ.setdefault('TORCH_DISABLE_SHARE_RDZV_TCP_STORE', '1')
    if hasattr(signal, 'SIGUSR1'):  # torchrun knows of no such; its processes are told with SIGTERM
        signal.signal(signal.SIGUSR1, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))
    api.LocalElasticAgent = Agent
    try:
        torchrun.run(torchrun.parse_args(arguments))
    except ChildFailedError as error:
        failures = error.failures.values()
        if any(map(is_final, failures)):
            sys.exit(1)  # said by the process itself
        print(error, file=sys.stderr)
        sys.exit(START_AGAIN if any(failure.exitcode == START_AGAIN for failure in failures) else 1)
    except SignalException as error:
        sys.exit(130 if error.sigval == signal.SIGINT else START_AGAIN)
    except RendezvousClosedError:
        sys.exit('error: training has ended with a failure on another machine, whose output says why.')
    except (RendezvousError, DistError) as error:  # the second of a store that goes while it is asked
        print(f'The other machines are out of reach ({error}). Start again.', file=sys.stderr)
        sys.exit(START_AGAIN)


if __name__ == '__main__':
    main()
