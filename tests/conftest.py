"""What every test begins from: the same seed, one thread, the same drawn examples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import hypothesis
import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

# The same examples at every run, so that a failure in CI is a failure at the desk; no deadline, since
# the first example of a law pays for what torch sets up.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("same")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let golden pictures be written anew, to be read in the diff."""
    parser.addoption(
        "--overwrite-pictures",
        action="store_true",
        help="write the golden DOT texts in tests/pictures anew instead of comparing with them",
    )


@pytest.fixture(autouse=True)
def determinism() -> Iterator[None]:
    """Give every test torch's generator as it is after seed 0, and one thread.

    With several threads the order of a sum may differ from run to run, and bit-equal
    with it.
    """
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
