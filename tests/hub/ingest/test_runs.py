"""When a source is due."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from modelgrove_hub.errors import UsageError
from modelgrove_hub.ingest.runs import following

NOON = datetime(2026, 3, 28, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("schedule", "due"),
    [
        ("15m", datetime(2026, 3, 28, 12, 15, tzinfo=UTC)),
        ("6h", datetime(2026, 3, 28, 18, tzinfo=UTC)),
        ("1d", datetime(2026, 3, 29, 12, tzinfo=UTC)),
        ("0 3 * * *", datetime(2026, 3, 29, 3, tzinfo=UTC)),
        ("0 3 * * * Asia/Tokyo", datetime(2026, 3, 28, 18, tzinfo=UTC)),
        ("30 4 * * * Europe/Berlin", datetime(2026, 3, 29, 2, 30, tzinfo=UTC)),  # summer time began in that night
    ],
)
def test_a_schedule_says_when_the_next_run_is(schedule, due):
    assert following(schedule, NOON) == due


def test_without_a_schedule_there_is_no_next_run():
    assert following("", NOON) is None


@pytest.mark.parametrize(
    "text",
    ["0m", "5", "m", "1w", "1h30m", "-1h", "1.5h", "٣h", "999999d", "61 3 * * *", "0 3 * * * Mars/Base", "0 3 * *",
     "0 3 30 2 *"],
)  # fmt: skip
def test_a_schedule_of_another_form_is_refused(text):
    with pytest.raises(UsageError, match="schedule"):
        following(text)
