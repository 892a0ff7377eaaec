"""Files from strangers: a command reads them correctly, or says what is wrong in a sentence."""

import pytest
from fuzz import MEGABYTES, READERS, case, grown, random_of
from good_files import make_good
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CASES = 140  # of each reader; `python tests/stress/fuzz.py --cases 1000` runs more


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    make_good(folder)
    return folder


@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_or_hostile_file_is_read_correctly_or_refused_in_a_sentence(reader, good):
    start = grown()
    for number in range(CASES):
        try:
            case(reader, random_of(reader, number), good)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # tiktoken's panics are no Exception
            pytest.fail(f"python tests/stress/fuzz.py --only {reader} --first {number} --cases 1: {error!r}")
    assert grown() - start < MEGABYTES


@pytest.mark.parametrize("reader", READERS)
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(rng=st.randoms(use_true_random=False))
def test_hypothesis_finds_no_other_end(reader, good, rng):
    """It chooses what a case does, and shrinks a case that fails."""
    case(reader, rng, good)
