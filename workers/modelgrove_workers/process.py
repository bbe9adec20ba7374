"""One Celery worker, as the supervisor starts it: `python -m modelgrove_workers.process QUEUES CONCURRENCY`."""

from __future__ import annotations

import os
import sys
import warnings

from modelgrove_hub.settings import settings


def main() -> int:
    """Work on the queues until told to stop; the exit code for the shell."""
    from celery.platforms import SecurityWarning

    from modelgrove_workers.app import make_queue
    from modelgrove_workers.tasks import app

    # Celery warns of root because of pickled messages; ours are JSON.
    warnings.simplefilter("ignore", SecurityWarning)
    queues, concurrency = sys.argv[1].split(","), int(sys.argv[2])
    app.conf.task_queues = [make_queue(settings(), queue) for queue in queues]
    worker = app.Worker(
        hostname=f"{'-'.join(queues)}-{os.getpid()}@{os.uname().nodename}",
        pool_cls="prefork", concurrency=concurrency, loglevel="WARNING", quiet=True,
        without_mingle=True, without_gossip=True, without_heartbeat=True,
    )  # fmt: skip
    worker.start()
    return int(worker.exitcode or 0)


if __name__ == "__main__":
    sys.exit(main())
