"""The list of planted faults stays true to the source, so that `make faults` plants each of them."""

from pathlib import Path

import pytest
from faults import FAULTS

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_a_fault_replaces_one_place_of_the_source(fault):
    assert (ROOT / fault.file).read_text().count(fault.old) == 1
    assert fault.old != fault.new and (ROOT / fault.first).exists()


def test_every_fault_has_a_description_of_its_own():
    assert len({fault.what for fault in FAULTS}) == len(FAULTS)
