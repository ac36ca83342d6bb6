"""Contract suites that implementations join by overriding a fixture, a clock that tests move, and small data.

The only folder that imports pytest; importing it loads no torch. A suite is a class of tests: subclass it in a test module.

    class TestMyBackend(BackendContract):
        @pytest.fixture
        def backend(self) -> Iterator[Backend]: ...
"""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite(
    *(f"{__name__}.{part}" for part in ("backend", "backend_failures", "backend_parts", "backend_sampling", "backend_streams", "backend_training", "loss"))
)

from .backend import BackendContract  # noqa: E402 - after the line above, so that failed asserts show their values
from .backend_streams import StreamContract  # noqa: E402
from .builders import make_batch, make_data, make_dataset, make_datum, text_datum  # noqa: E402
from .loss import LossContract  # noqa: E402
from .virtual import VirtualClock  # noqa: E402

__all__ = ["BackendContract", "LossContract", "StreamContract", "VirtualClock", "make_batch", "make_data", "make_dataset", "make_datum", "text_datum"]
