"""The exchange's header: what is written is read, and an empty slot is none."""

import numpy as np

from mpicdsgd.comm.exchange import header as hd
from mpicdsgd.comm.exchange.header import Fault, Header, Reason


def test_a_header_is_read_as_written() -> None:
    slot = np.zeros(hd.HEADER_BYTES, np.uint8)
    fault = Fault(2**40, 2**32 - 7, Reason.NON_FINITE, 4095)
    header = Header(2**32 - 1, 3, 12, 2**41, fault, 17, 2**31, (1 / 3, -2.5e-300))
    hd.write(header, slot)
    assert hd.read(slot) == header
    hd.clear(slot)
    assert hd.read(slot) is None


def test_the_lesser_fault_holds_and_none_is_the_greatest() -> None:
    early, late = Fault(5, 3, Reason.NON_FINITE, 1), Fault(6, 4, Reason.CHANGED_BY_HAND, 0)
    assert min(Fault(), late, early) == early
    first, infected = Fault(5, 2, Reason.NON_FINITE, 1), Fault(5, 3, Reason.NON_FINITE, 0)
    assert min(infected, first) == first
    assert min(Fault(), Fault()) == Fault()
    assert not Header(1).leaving
    assert Header(1, leaver=0).leaving
