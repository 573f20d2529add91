"""The planted faults can still be planted, and are caught."""

import mutants
import pytest


@pytest.mark.parametrize("module", mutants.TESTS)
def test_every_fault_is_found_exactly_once_and_changes_something(module):
    planted = [mutant for mutant in mutants.MUTANTS if mutant.module == module]
    texts = {mutants.faulty(mutant) for mutant in planted}
    assert len(texts) == len(planted) >= 8
    for text in texts:
        compile(text, module, "exec")


def test_a_text_that_is_gone_is_an_error():
    with pytest.raises(ValueError, match="0 times"):
        mutants.faulty(mutants.Mutant("losses", "no such text", ""))
