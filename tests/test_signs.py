"""What is said of a rank that keeps the others waiting; without ranks."""

from __future__ import annotations

import pytest

from keras_tp.signs import Sign, absence, lost, state_of, stuck, verdict

FIT = Sign(7, "fit, train_step", "program.py:12, main")
WAITING = Sign(8, "fit, train_step, layer 'model/dense'", "program.py:12, main", "all_reduce", 60.0)


def later(sign: Sign, **changes: object) -> Sign:
    return Sign(**{**vars(sign), "beat": sign.beat + 2, **changes})  # type: ignore[arg-type]


def test_signs_pass_through_the_store() -> None:
    """A sign that came back otherwise would put words into another rank's mouth."""
    assert Sign.from_text(WAITING.to_text()) == WAITING


@pytest.mark.parametrize(
    ("after", "state"),
    [
        (FIT, "silent"),
        (None, "silent"),
        (later(FIT), "busy"),
        (later(FIT, waits="all_gather"), "waits"),
        (later(FIT, ended="its program came to its end"), "ended"),
        # The last thing it says is the end; nothing more comes.
        (Sign(**{**vars(FIT), "ended": "KeyError: 'x'"}), "ended"),
    ],
)
def test_what_a_rank_does_is_told_by_two_signs(after: Sign | None, state: str) -> None:
    """A stopped rank's last sign may say that it computes: only that no other follows tells."""
    assert state_of(FIT, after) == state


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (FIT, ["Rank 1 gives no sign of life", "Last seen in fit, train_step", "--max-restarts"]),
        (None, ["Rank 1 never gave a sign of life", "--max-restarts"]),
        (later(FIT), ["Rank 1 is busy in fit", "program.py:12", "KERAS_TP_TIMEOUT"]),
        (later(FIT, ended="KeyError: 'x'"), ["Rank 1 has ended: KeyError: 'x'", "whole program"]),
        (
            later(FIT, waits="barrier", doing="save_checkpoint"),
            ["Rank 1 waits in barrier, in save_checkpoint", "parted ways"],
        ),
    ],
)
def test_the_missing_rank_is_named_with_its_place_and_a_remedy(
    after: Sign | None, said: list[str]
) -> None:
    """gloo says only how long it has waited, for nobody in particular."""
    text = verdict(0, WAITING, [FIT, FIT], [WAITING, after])
    assert text.startswith("rank 0 has waited 60 s in all_reduce, in fit, train_step, layer 'model")
    for words in said:
        assert words in text, text


def test_of_many_ranks_the_one_that_is_missing_comes_out() -> None:
    """1,024 lines would hide the one that matters, and those that wait as well are not to blame."""
    others: list[Sign | None] = [later(WAITING)] * 64
    others[5] = WAITING
    text = verdict(0, later(WAITING), [WAITING] * 64, others)
    assert "for rank 5. The job ends here." in text
    assert "Ranks 1 to 4, 6 to 63 waits" not in text
    assert "Ranks 1 to 4, 6 to 63 wait in all_reduce" in text
    assert len(text.splitlines()) == 4
    assert "parted ways" not in text


def test_a_rank_is_stuck_only_if_it_has_waited_long_in_one_place() -> None:
    """A save would be refused while another rank just waits for a slow collective on its way."""
    assert stuck(WAITING, later(WAITING), 5.0)
    assert stuck(FIT, later(FIT, ended="its program came to its end"), 5.0)
    assert not stuck(WAITING, later(WAITING, seconds=2.0), 5.0)
    assert not stuck(WAITING, later(WAITING, waits="all_gather"), 5.0)
    assert not stuck(FIT, later(FIT), 5.0)
    assert not stuck(WAITING, WAITING, 5.0)  # it may have been stopped, and go on


def test_who_is_gone_and_who_did_not_come() -> None:
    """Of a broken connection gloo names an address and a port."""
    gone = later(FIT, ended="RuntimeError: fire")
    text = lost(0, [FIT, FIT, FIT], [later(FIT), gone, later(FIT)])
    assert "rank 0 has lost its connection" in text
    assert "Rank 1 has ended: RuntimeError: fire." in text
    assert "ank 2" not in text
    assert lost(0, [FIT, FIT], [later(FIT), later(FIT)]) == ""
    assert "Rank 1 waits in all_reduce" in absence([FIT, WAITING], [FIT, later(WAITING)], [1])
