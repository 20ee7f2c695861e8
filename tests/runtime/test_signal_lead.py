"""The warning that a scheduler's signal would come too late."""

import pytest

from sparse_lora_dist.runtime.signal_lead import SignalLead


def test_it_warns_once_and_says_how_long_the_lead_should_be(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lead = SignalLead("60s")
    for seconds in (5.0, 12.0, 8.0):
        lead.step_took(seconds)
    lead.save_took(18.0)  # 2 x 12 + 2 x 18: just enough
    assert capsys.readouterr().out == ""
    lead.save_took(20.0)
    said = capsys.readouterr().out
    assert said.startswith("warning") and "--signal_lead 60s" in said
    assert "12.0 s" in said and "20.0 s" in said and "--signal=USR1@64" in said
    lead.save_took(30.0)
    assert capsys.readouterr().out == ""


def test_no_lead_no_warning(capsys: pytest.CaptureFixture[str]) -> None:
    lead = SignalLead(None)
    lead.step_took(1e3)
    lead.save_took(1e3)
    assert capsys.readouterr().out == ""
