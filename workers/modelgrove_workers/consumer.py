"""Celery's consumer without its machinery for delayed messages.

With quorum queues Celery declares 28 further queues for ETA and countdown, which we never use.
"""

from __future__ import annotations

from typing import ClassVar

from celery.worker.consumer import Consumer as CeleryConsumer


class Consumer(CeleryConsumer):  # type: ignore[misc]  # celery has no types
    """The consumer of our workers."""

    class Blueprint(CeleryConsumer.Blueprint):  # type: ignore[misc]  # celery has no types
        """Celery's start-up steps but one."""

        default_steps: ClassVar[list[str]] = [
            step for step in CeleryConsumer.Blueprint.default_steps if not step.endswith(":DelayedDelivery")
        ]
