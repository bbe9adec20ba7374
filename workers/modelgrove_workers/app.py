"""The Celery app, made from our settings, and the dispatcher that publishes through it.

Celery only carries job ids. Nothing is lost with a message (the row is the truth) and nothing
is done twice (a job is claimed), so results, retries, priorities and ETA stay unused.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from celery import Celery
from kombu import Connection, Exchange, Queue
from kombu.exceptions import KombuError

from modelgrove_hub.errors import StorageError, UsageError
from modelgrove_hub.settings import Settings

TASK = "modelgrove.run"
_PREFIX = "modelgrove."
_POLLING_SECONDS = 0.1
_CONNECT_SECONDS = 3
_DAY = 24 * 3600
_TASKS_PER_CHILD = 100
_NO_SUCH_QUEUE = "404"

_REDIS: dict[str, Any] = {
    # Celery gives a message to a second worker after this; our claim makes that harmless, but it is waste.
    "visibility_timeout": _DAY,
    "socket_connect_timeout": _CONNECT_SECONDS,
    "socket_keepalive": True,
    "health_check_interval": 25,
}
_RABBITMQ: dict[str, Any] = {"confirm_publish": True}
_OPTIONS = {
    "redis": _REDIS, "rediss": _REDIS,
    "amqp": _RABBITMQ, "amqps": _RABBITMQ, "pyamqp": _RABBITMQ,
}  # fmt: skip


def make_app(config: Settings) -> Celery:
    """A Celery app for the broker of the settings: a folder in `home`, Redis or RabbitMQ.

    Raises:
        UsageError: the broker is of another kind.
        StorageError: the folder cannot be made.
    """
    app = Celery("modelgrove", set_as_current=False, include=["modelgrove_workers.tasks"])
    app.conf.update(
        **_broker(config),
        broker_connection_retry_on_startup=True,
        broker_connection_timeout=_CONNECT_SECONDS,
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        task_default_queue=_PREFIX + "cpu",
        worker_prefetch_multiplier=1,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        worker_redirect_stdouts=False,
        # A forked child hangs in torch or FAISS when its parent has computed with them.
        worker_pool_start_method="spawn",
        worker_proc_alive_timeout=60,
        worker_lost_wait=1.0,  # a killed process blocks its slot this long; its job comes back by its lease
        worker_max_tasks_per_child=_TASKS_PER_CHILD,
        worker_consumer="modelgrove_workers.consumer:Consumer",
    )
    return app


def make_queue(config: Settings, name: str) -> Queue:
    """The broker's queue for our queue `name`; on RabbitMQ a quorum queue, which survives the loss of a node."""
    arguments = None
    if _scheme(config) in ("amqp", "amqps", "pyamqp"):
        # By default RabbitMQ closes the channel of a job that runs longer than 30 minutes.
        arguments = {"x-queue-type": "quorum", "x-consumer-timeout": _DAY * 1000}
    exchange = Exchange(_PREFIX + "jobs", type="direct")
    return Queue(_PREFIX + name, exchange, routing_key=_PREFIX + name, queue_arguments=arguments)


class CeleryDispatcher:
    """Implements `modelgrove_hub.jobs.dispatch.Dispatcher` (entry point "celery")."""

    def __init__(self, config: Settings) -> None:
        self._config = config
        self._app = make_app(config)

    def publish(self, job_id: str, queue: str) -> None:
        """Send the job's id to a queue.

        Raises:
            StorageError: the broker does not take it.
        """
        with self._connection() as connection:
            try:
                self._app.send_task(
                    TASK, (job_id,), queue=make_queue(self._config, queue), connection=connection, retry=False
                )
            except self._faults(connection) as error:
                raise self._unreachable(error) from error

    def waiting(self, queue: str) -> int:
        """How many messages in a queue no worker has taken yet.

        Raises:
            StorageError: the broker does not answer.
        """
        with self._connection() as connection:
            try:
                bound = make_queue(self._config, queue)(connection.default_channel)
                return int(bound.queue_declare(passive=True).message_count)
            except self._faults(connection) as error:
                if str(getattr(error, "reply_code", "")) == _NO_SUCH_QUEUE:
                    return 0
                raise self._unreachable(error) from error

    def _connection(self) -> Connection:
        # One attempt: who publishes does not wait for a broker that is down, the row does.
        return self._app.connection_for_write(transport_options={"max_retries": 0})

    @staticmethod
    def _faults(connection: Connection) -> tuple[type[BaseException], ...]:
        return (*connection.connection_errors, *connection.channel_errors, KombuError, OSError)

    def _unreachable(self, error: BaseException) -> StorageError:
        where = self._config.broker_url or self._config.queue
        return StorageError(f"broker {Connection(str(where)).as_uri() if self._config.broker_url else where}: {error}")


def _scheme(config: Settings) -> str:
    return urlsplit(config.broker_url).scheme


def _broker(config: Settings) -> dict[str, Any]:
    if not config.broker_url:
        return _embedded(config)
    scheme = _scheme(config)
    if scheme not in _OPTIONS:
        raise UsageError(
            f"broker_url: {scheme or config.broker_url!r} is not supported; use redis://…, amqp://… (RabbitMQ), "
            "or leave it empty for a folder in the hub's home"
        )
    return {"broker_url": config.broker_url, "broker_transport_options": dict(_OPTIONS[scheme])}


def _embedded(config: Settings) -> dict[str, Any]:
    messages, control = config.queue / "messages", config.queue / "control"
    try:
        for folder in (messages, control):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"the queue folder cannot be made: {error}") from error
    options = {
        "data_folder_in": str(messages), "data_folder_out": str(messages), "control_folder": str(control),
        "polling_interval": _POLLING_SECONDS,
    }  # fmt: skip
    return {"broker_url": "filesystem://localhost/", "broker_transport_options": options}
