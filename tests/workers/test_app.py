"""The Celery app and the dispatcher, on every broker."""

import json

import pytest
from celery.worker.consumer import Consumer as CeleryConsumer
from kombu import Connection, Exchange, Queue

from modelgrove_hub.errors import StorageError, UsageError
from modelgrove_hub.jobs.dispatch import dispatcher
from modelgrove_hub.settings import Settings
from modelgrove_workers.app import CeleryDispatcher, make_app, make_queue
from modelgrove_workers.consumer import Consumer


@pytest.fixture
def database_url(sqlite_url):
    """SQLite alone: brokers are tested here."""
    return sqlite_url


def connect(config):
    return make_app(config).connection_for_write()


def test_a_published_job_waits_as_its_id_and_nothing_else(grove):
    config, post = grove.hub.settings, dispatcher(grove.hub.settings)
    assert isinstance(post, CeleryDispatcher)
    assert post.waiting(grove.queue) == 0
    for name in ("one", "two"):
        post.publish(name, grove.queue)
    assert post.waiting(grove.queue) == 2
    assert post.waiting(grove.queue) == 2, "looking takes nothing"

    with connect(config) as connection:
        message = make_queue(config, grove.queue)(connection.default_channel).get()
        assert message.content_type == "application/json"
        arguments, keywords, _ = json.loads(message.body)
        message.ack()
    assert (arguments, keywords) in ((["one"], {}), (["two"], {}))  # messages of one millisecond have no order


def test_on_rabbitmq_queues_are_quorum_queues(rabbitmq_url, tmp_path):
    config = Settings(home=tmp_path, broker_url=rabbitmq_url)
    dispatched = CeleryDispatcher(config)
    name = f"test-{tmp_path.name}"
    try:
        dispatched.publish("one", name)
        with connect(config) as connection:
            classic = Queue(f"modelgrove.{name}", Exchange("modelgrove.jobs"), f"modelgrove.{name}")
            with pytest.raises(connection.channel_errors, match=r"PRECONDITION_FAILED.*x-queue-type"):
                classic(connection.default_channel).declare()
    finally:
        with connect(config) as connection:
            make_queue(config, name)(connection.default_channel).delete()


@pytest.mark.parametrize("url", ["redis://:secret@127.0.0.1:1/0", "amqp://me:secret@127.0.0.1:1//"])
def test_a_broker_that_is_down_is_the_operators_matter_and_its_password_is_not_told(url, tmp_path):
    post = CeleryDispatcher(Settings(home=tmp_path, broker_url=url))

    for ask in (lambda: post.publish("one", "cpu"), lambda: post.waiting("cpu")):
        with pytest.raises(StorageError, match=r"^broker (redis|amqp)://.*127\.0\.0\.1:1") as caught:
            ask()
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["sqla+sqlite:///jobs.db", "memory://", "localhost"])
def test_a_broker_that_loses_jobs_is_refused(url, tmp_path):
    with pytest.raises(UsageError, match="is not supported; use redis://"):
        make_app(Settings(home=tmp_path, broker_url=url))


def test_a_queue_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "queue").write_text("in the way")

    with pytest.raises(StorageError, match="the queue folder cannot be made"):
        make_app(Settings(home=tmp_path))
    with pytest.raises(StorageError, match="the queue folder cannot be made"):
        dispatcher(Settings(home=tmp_path))


def test_a_message_of_another_kind_than_json_is_refused(tmp_path):
    assert make_app(Settings(home=tmp_path)).conf.accept_content == ["json"]


def test_our_consumer_lacks_celerys_28_delay_queues_and_nothing_else():
    ours, theirs = Consumer.Blueprint.default_steps, CeleryConsumer.Blueprint.default_steps

    assert set(theirs) - set(ours) == {"celery.worker.consumer.delayed_delivery:DelayedDelivery"}
    assert [step for step in theirs if step in ours] == ours


def test_an_unused_connection_is_closed(tmp_path):
    connection = connect(Settings(home=tmp_path))
    assert isinstance(connection, Connection)
    connection.close()
